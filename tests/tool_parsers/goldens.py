"""Outputs of models, and what a parser must find in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from nanoengine.api import Tool

WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "at": {"type": "object"},
            "notes": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
    },
)
TIME = Tool(name="get_time")
TOOLS = (WEATHER, TIME)
HARD = {"city": 'Zürich "A" \\ {[(</tool_call>)]}\n\t☃😀', "at": {"a": [1, -2.5e3, True, None, {"b": {}}], "": ""}}
H = json.dumps(HARD, ensure_ascii=False)
ESCAPED = json.dumps(HARD)


@dataclass(frozen=True)
class Golden:
    """content: all of it, joined. calls: names, with arguments as a value, or as text where they are cut off."""

    parser: str
    text: str
    calls: tuple[tuple[str, Any], ...] = ()
    content: str = ""


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


HERMES = {
    "one": Golden("hermes", hermes("get_weather", H), (("get_weather", HARD),)),
    "escaped": Golden("hermes", hermes("get_weather", ESCAPED), (("get_weather", HARD),)),
    "several, text around": Golden(
        "hermes",
        f"I look.\n{hermes('get_weather', H)}\n{hermes('get_time', '{}')} and <tool> then",
        (("get_weather", HARD), ("get_time", {})),
        "I look.\n\n and <tool> then",
    ),
    "text only": Golden("hermes", "1 < 2 <tool_cal <tool> ☃", content="1 < 2 <tool_cal <tool> ☃"),
    "empty": Golden("hermes", ""),
    "arguments first": Golden(
        "hermes", '<tool_call>{"arguments": {"city": "x"}, "name": "f"}</tool_call>', (("f", {"city": "x"}),)
    ),
    "no arguments": Golden("hermes", '<tool_call>{"name": "f"}</tool_call>x', (("f", {}),), "x"),
    "null arguments": Golden("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', (("f", {}),)),
    "arguments as text": Golden(
        "hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', (("f", {"a": 1}),)
    ),
    "parameters, more keys": Golden(
        "hermes",
        '<tool_call>{"id": 7, "name": "f", "parameters": {"a": []}, "x": [{}]}</tool_call>',
        (("f", {"a": []}),),
    ),
    "list": Golden(
        "hermes",
        '<tool_call>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]</tool_call>',
        (("f", {"a": 1}), ("g", {})),
    ),
    "several in one": Golden(
        "hermes",
        '<tool_call>\n{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}\n</tool_call>',
        (("f", {}), ("g", {})),
    ),
    "no closing tag": Golden("hermes", '<tool_call>{"name": "f", "arguments": {}} ok', (("f", {}),), " ok"),
    "newline in a string": Golden(
        "hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\n\ty"}}</tool_call>', (("f", {"a": "x\n\ty"}),)
    ),
    "cut in arguments": Golden(
        "hermes", 'a<tool_call>{"name": "f", "arguments": {"a": "x\\u26', (("f", '{"a": "x\\u26'),), "a"
    ),
    "cut before arguments": Golden("hermes", '<tool_call>{"name": "f', content='<tool_call>{"name": "f'),
    "cut in the tag": Golden("hermes", "a <tool_ca", content="a <tool_ca"),
    "malformed": Golden(
        "hermes",
        f"<tool_call>nothing</tool_call>{hermes('f', '{}')}",
        (("f", {}),),
        "<tool_call>nothing</tool_call>",
    ),
    "malformed in arguments": Golden(
        "hermes",
        f'<tool_call>{{"name": "f", "arguments": {{"a": 01}}}}</tool_call>{hermes("g", "{}")}',
        (("f", '{"a": 0'), ("g", {})),
        "1}}</tool_call>",
    ),
    "arguments that are no object": Golden("hermes", hermes("f", "[1]"), content=hermes("f", "[1]")),
    "name that is no text": Golden(
        "hermes", '<tool_call>{"name": 1, "arguments": {}}', content='<tool_call>{"name": 1, "arguments": {}}'
    ),
    "NaN": Golden("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}', (("f", '{"a": '),), "NaN}}"),
    "nested too deeply": Golden(
        "hermes", hermes("f", '{"a": ' + "[" * 200), (("f", '{"a": ' + "[" * 99),), "[" * 101 + "}\n</tool_call>"
    ),
}

LLAMA3 = {
    "bare": Golden("llama3", f'{{"name": "get_weather", "parameters": {H}}}', (("get_weather", HARD),)),
    "tag": Golden("llama3", f'<|python_tag|>{{"name": "get_weather", "parameters": {H}}}', (("get_weather", HARD),)),
    "text before the tag": Golden(
        "llama3", 'So: <|python_tag|>{"type": "function", "name": "f", "parameters": {}}', (("f", {}),), "So: "
    ),
    "several": Golden(
        "llama3",
        ' {"name": "f", "parameters": {"a": 1}}; {"name": "g", "arguments": {}}\n{"name": "h", "parameters": {}} x',
        (("f", {"a": 1}), ("g", {}), ("h", {})),
        " x",
    ),
    "JSON that is no call": Golden("llama3", '{"name": "Ann", "age": 3}', content='{"name": "Ann", "age": 3}'),
    "no arguments": Golden("llama3", '{"name": "Ann"}', content='{"name": "Ann"}'),
    "code": Golden("llama3", "<|python_tag|>print({})", content="<|python_tag|>print({})"),
    "cut": Golden("llama3", '{"name": "f", "parameters": {"a": tr', (("f", '{"a": tr'),)),
    "text that has braces": Golden(
        "llama3", 'As {"name": "f", "parameters": {}}', content='As {"name": "f", "parameters": {}}'
    ),
}

MISTRAL = {
    "new": Golden("mistral", f"[TOOL_CALLS]get_weather[ARGS]{H}", (("get_weather", HARD),)),
    "several new, text before": Golden(
        "mistral",
        f"Hi [x] [TOOL_CALLS]get_weather[ARGS]{H}[TOOL_CALLS]f-g.h[CALL_ID]a1B2[ARGS]{{}}[TOOL_CALLS] h{{}}",
        (("get_weather", HARD), ("f-g.h", {}), ("h", {})),
        "Hi [x] ",
    ),
    "list": Golden(
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {H}, "id": "x"}}, {{"name": "g", "arguments": {{}}}}] ok',
        (("get_weather", HARD), ("g", {})),
        " ok",
    ),
    "empty list": Golden("mistral", "[TOOL_CALLS] []", content="[TOOL_CALLS] []"),
    "list with a malformed one": Golden(
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"nam": 1}, 2]',
        (("f", {}),),
        ', {"nam": 1}, 2]',
    ),
    "malformed": Golden("mistral", "[TOOL_CALLS]f(1) [TOOL_", content="[TOOL_CALLS]f(1) [TOOL_"),
    "cut in the id": Golden("mistral", "[TOOL_CALLS]f[CALL_ID]a", content="[TOOL_CALLS]f[CALL_ID]a"),
    "cut in arguments": Golden("mistral", '[TOOL_CALLS]f[ARGS]{"a": [1', (("f", '{"a": [1'),)),
}

PYTHON = (
    """{'city': 'Zürich "A" \\\\ {[(</tool_call>)]}\\n\\t☃😀', "at": """
    """{'a': [1, -2.5e3, True, None, {"b": {}}], '': ""}}"""
)
PYTHONIC = {
    "one": Golden("pythonic", "[get_weather(city='Paris', days=3)]", (("get_weather", {"city": "Paris", "days": 3}),)),
    "nested": Golden("pythonic", f"[f(a={PYTHON})]", (("f", {"a": HARD}),)),
    "JSON in it": Golden(
        "pythonic", '[f(a={"x": [true, null]}, b=false)]', (("f", {"a": {"x": [True, None]}, "b": False}),)
    ),
    "several": Golden(
        "pythonic",
        " [f( a = (1, +2) , ), g(),a.b(x='')] ok",
        (("f", {"a": [1, 2]}), ("g", {}), ("a.b", {"x": ""})),
        " ok",
    ),
    "strings": Golden(
        "pythonic",
        '[f(a="""x"\n"y""", b=\'it\\\'s, (\', c="a\nb", d=r"\\n", e="")]',
        (("f", {"a": 'x"\n"y', "b": "it's, (", "c": "a\nb", "d": "\\n", "e": ""}),),
    ),
    "tags": Golden(
        "pythonic",
        "Hm <|python_start|>[f(a=1)]<|python_end|>.<|python_start|>x",
        (("f", {"a": 1}),),
        "Hm .<|python_start|>x",
    ),
    "text": Golden("pythonic", "[see (this)](http://x) [f(a=1)]", content="[see (this)](http://x) [f(a=1)]"),
    "no name of an argument": Golden("pythonic", "[f(1)]", content="[f(1)]"),
    "expression": Golden("pythonic", "[f(a=1, b=1+1, c=2)] x", (("f", '{"a": 1'),), ", b=1+1, c=2)] x"),
    "cut": Golden("pythonic", "[f(a='x', b='y", (("f", '{"a": "x", "b": "y'),)),
    "lone surrogate": Golden("pythonic", "[f(a='é\\ud800')]", (("f", {"a": "é\ud800"}),)),
    "infinite": Golden("pythonic", "[f(a=(1e999,))]", (("f", ""),), "a=(1e999,))]"),
}

JSON = {
    "object": Golden("json", f'{{"name": "get_weather", "arguments": {H}}}', (("get_weather", HARD),)),
    "list": Golden(
        "json",
        f'\n[ {{"name": "get_weather", "parameters": {H}}} ,{{"name": "f", "arguments": {{}}}}]\n',
        (("get_weather", HARD), ("f", {})),
        "\n",
    ),
    "other JSON": Golden("json", '[{"city": "x"}]', content='[{"city": "x"}]'),
    "text": Golden("json", " Hello {", content=" Hello {"),
    "cut": Golden(
        "json",
        '[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "argum',
        (("f", {"a": 1}),),
        ', {"name": "g", "argum',
    ),
}

CODER = {
    "one": Golden(
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        (("get_weather", {"city": "Paris", "days": 3}),),
    ),
    "values": Golden(
        "qwen3_coder",
        'Hm\n<tool_call><function=get_weather><parameter=city>\n\n{"x": "\\n"} </param\n\n</parameter><parameter=at>'
        f"{json.dumps(HARD['at'])}</parameter><parameter=notes>null</parameter><parameter=days>soon</parameter>"
        "<parameter=other>1</parameter></function></tool_call>.",
        (
            (
                "get_weather",
                {"city": '\n{"x": "\\n"} </param\n', "at": HARD["at"], "notes": None, "days": "soon", "other": "1"},
            ),
        ),
        "Hm\n.",
    ),
    "several, no outer tags": Golden(
        "qwen3_coder",
        "<function=get_time>\n</function>\n<function=get_weather><parameter=at>{'a': True}</parameter></function> x",
        (("get_time", {}), ("get_weather", {"at": {"a": True}})),
        "\n x",
    ),
    "no end of the function": Golden("qwen3_coder", "<tool_call>\n<function=f>\n</tool_call>\nx", (("f", {}),), "\nx"),
    "cut in a string": Golden(
        "qwen3_coder", '<function=get_weather><parameter=city>\nA "b"\n', (("get_weather", '{"city": "A \\"b\\"\\n'),)
    ),
    "cut in a value": Golden(
        "qwen3_coder", '<function=get_weather><parameter=at>\n{"a": ', (("get_weather", '{"at": {"a": '),)
    ),
    "malformed": Golden("qwen3_coder", "<tool_call>\n{}<function=f g>", content="<tool_call>\n{}<function=f g>"),
    "malformed in it": Golden(
        "qwen3_coder",
        "<function=f><parameter=a>x</parameter>y</function>",
        (("f", '{"a": "x"'),),
        "y</function>",
    ),
}

GOLDENS = {
    f"{golden.parser}: {name}": golden
    for group in (HERMES, LLAMA3, MISTRAL, PYTHONIC, JSON, CODER)
    for name, golden in group.items()
}
