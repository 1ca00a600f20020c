"""Each parser finds the same in its golden outputs however the text is cut, and loses nothing."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoengine.api import Content, ParserEvent, ToolCallBegin
from nanoengine.plugins.tool_parsers.hermes import Hermes

from .goldens import GOLDENS, HERMES, TOOLS, Golden, H
from .support import PARSERS, calls_of, content_of, events_of, joined, parsed, values

each_golden = pytest.mark.parametrize("golden", GOLDENS.values(), ids=GOLDENS)


@each_golden
def test_whole(golden: Golden) -> None:
    events = parsed(golden.parser, [golden.text], TOOLS)
    assert values(calls_of(events), golden.calls) == list(golden.calls)
    assert content_of(events) == golden.content


def every_cut(text: str) -> list[list[str]]:
    """Every split in two, and the single characters."""
    return [[text[:at], text[at:]] for at in range(1, len(text))] + [list(text), ["", *text, ""]]


@each_golden
def test_a20_every_split_of_every_golden_output_gives_the_same_call(golden: Golden) -> None:
    whole = parsed(golden.parser, [golden.text], TOOLS)
    for pieces in every_cut(golden.text):
        assert parsed(golden.parser, pieces, TOOLS) == whole, pieces


@given(st.data())
def test_many_pieces_give_the_same(data: st.DataObject) -> None:
    golden = GOLDENS[data.draw(st.sampled_from(sorted(GOLDENS)))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(golden.text)), max_size=12)))
    pieces = [golden.text[a:b] for a, b in zip([0, *cuts], [*cuts, len(golden.text)], strict=True)]
    assert parsed(golden.parser, pieces, TOOLS) == parsed(golden.parser, [golden.text], TOOLS)


FRAGMENTS = sorted({
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_start|>"),
    *("<function=", "<parameter=a>", "</parameter>", "</function>", '"a": ', "[f(a=", ")]"),
    '{"name": "f", "arguments": {',
    *("\\x4", "\\u26", "\\N{SNOW", "MAN}", "\\12", "\\'", "'''", "r'"),
    *'{}[]()<>|"\\,:;= \nfa1-.t', "true", "null", '"x"', "'", '"""', "{}", "\\u00e9", "☃", "name", '"parameters"',
})  # fmt: skip


@given(st.sampled_from(sorted(PARSERS)), st.lists(st.sampled_from(FRAGMENTS), max_size=25))
def test_no_text_fails_or_depends_on_the_cut(parser: str, pieces: list[str]) -> None:
    whole = parsed(parser, ["".join(pieces)], TOOLS)
    assert parsed(parser, pieces, TOOLS) == whole
    assert parsed(parser, "".join(pieces), TOOLS) == whole
    if not any(isinstance(event, ToolCallBegin) for event in whole):
        assert content_of(whole) == "".join(pieces)


@each_golden
def test_nothing_is_lost_when_the_output_ends_early(golden: Golden) -> None:
    """Cut anywhere, the calls are a beginning of the whole calls, and text without calls is all content."""
    calls = calls_of(parsed(golden.parser, [golden.text], TOOLS))
    for end in range(len(golden.text)):
        events = parsed(golden.parser, [golden.text[:end]], TOOLS)
        found = calls_of(events)
        if golden.parser != "qwen3_coder":  # there a value without its end is text
            assert all(w.startswith(f) and n == m for (n, f), (m, w) in zip(found, calls, strict=False)), (end, found)
        if not found:
            assert content_of(events) == golden.text[:end]


STREAMED = {
    "hermes": '<tool_call>{"name": "get_weather", "arguments": ',
    "llama3": '{"name": "get_weather", "parameters": ',
    "mistral": "[TOOL_CALLS]get_weather[ARGS]",
    "mistral_list": '[TOOL_CALLS] [{"name": "get_weather", "arguments": ',
    "json": '[{"name": "get_weather", "arguments": ',
}


@pytest.mark.parametrize("parser", STREAMED)
def test_arguments_are_reported_as_they_come(parser: str) -> None:
    made, events = PARSERS[parser](TOOLS), list[ParserEvent]()
    assert made.feed(STREAMED[parser]) == []
    for end, char in enumerate(H, 1):
        events += made.feed(char)
        assert calls_of(events) == [("get_weather", H[:end])]


def test_arguments_of_other_forms_are_reported_one_by_one_and_strings_as_they_come() -> None:
    pythonic, coder = PARSERS["pythonic"](TOOLS), PARSERS["qwen3_coder"](TOOLS)
    events = pythonic.feed("[get_weather(city='Pa")
    assert calls_of(events) == [("get_weather", '{"city": "Pa')]
    events += pythonic.feed("ris', days=")
    assert calls_of(events) == [("get_weather", '{"city": "Paris"')]
    events = coder.feed("<tool_call><function=get_weather><parameter=days>3</parameter><parameter=city>\nNew\nYo")
    assert calls_of(events) == [("get_weather", '{"days": 3, "city": "New\\nYo')]


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=20), st.sampled_from(["'", '"', "'''", '"""', "repr"]))
def test_a_string_of_python_has_its_value(value: str, quote: str) -> None:
    inside = value.replace("\\", "\\\\").replace(quote[0], f"\\{quote[0]}")
    literal = repr(value) if quote == "repr" else f"{quote}{inside}{quote}"
    for pieces in ([f"[f(a={literal})]"], list(f"[f(a={literal})]")):
        assert [json.loads(arguments) for _, arguments in calls_of(parsed("pythonic", pieces))] == [{"a": value}]


ESCAPES = (
    "\\x41", "\\u00e9", "\\ud83d\\ude00", "\\U0001F600", "\\N{SNOWMAN}", "\\0", "\\12", "\\123", "\\1234", "\\a", "\\v",
    "\\z", "\\/", "\\\n", "\\\\", "\\'", '\\"', "\\n",
)  # fmt: skip


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("quote", ["'", '"', '"""'])
def test_escapes_of_python_strings(escape: str, quote: str) -> None:
    text = f"[f(a={quote}x{escape}y{escape}{quote})]"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = ast.literal_eval(text[5:-2]).encode("utf-16", "surrogatepass").decode("utf-16")
    if escape == "\\/" and quote[0] == '"':
        value = "x/y/"  # as in JSON
    for pieces in ([text], list(text)):
        assert [json.loads(arguments) for _, arguments in calls_of(parsed("pythonic", pieces))] == [{"a": value}]


@pytest.mark.parametrize("wrong", ["\\x4", "\\xg", "\\u12", "\\U00110000", "\\N{NO SUCH NAME}", "\\N{"])
def test_a_wrong_escape_is_content_from_there_on(wrong: str) -> None:
    events = parsed("pythonic", [f"[f(a='x{wrong}')] b"])
    assert calls_of(events) == [("f", '{"a": "x')]
    assert content_of(events) == f"{wrong}')] b"


# -- a parser that loses text at a split is noticed --------------------------------------------------------------------


class DropsWhitespaceAtACut(Hermes):
    def feed(self, text: str) -> list[ParserEvent]:
        return super().feed(text.lstrip(" "))


class TakesTagsOnlyWhole(Hermes):
    """Looks for tags in each piece alone, as many parsers did."""

    def feed(self, text: str) -> list[ParserEvent]:
        return super().feed(text) if self._calls or "<tool_call>" in text else [Content(text)] if text else []


class LosesWhatIsHeldAtTheEnd(Hermes):
    def finish(self) -> list[ParserEvent]:
        return []


@pytest.mark.parametrize("mutant", [DropsWhitespaceAtACut, TakesTagsOnlyWhole, LosesWhatIsHeldAtTheEnd])
def test_a_mutant_is_seen(mutant: Callable[..., Hermes]) -> None:
    wrong = [
        name
        for name, golden in HERMES.items()
        for pieces in every_cut(golden.text)
        if joined(events_of(mutant(TOOLS), pieces)) != parsed("hermes", [golden.text], TOOLS)
    ]
    assert len(set(wrong)) >= 2
