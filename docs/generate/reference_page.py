"""The text of docs/reference.md: the frame (reference.md.in) with tables of options and methods with docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

from reference_facts import sampling_facts, sections

import nanoengine
from nanoengine import LLM, AsyncLLM, SamplingParams, Stream
from nanoengine.api.errors import NanoEngineError
from nanoengine.api.structured_outputs import StructuredOutputsParams
from nanoengine.lab.facts import Fact, default, facts, meanings, source
from nanoengine.params.arguments import ChatOptions
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.sampling_fields import NOT_SUPPORTED
from nanoengine.params.speculation import SpeculationOptions
from nanoengine.plugins.drafters import register_drafters
from nanoengine.plugins.policies import register_policies
from nanoengine.server.config import ServerConfig
from nanoengine.service.output_stream import OutputStream
from nanoengine.setup.config.config import AttentionSection, ModelSection, RunConfig
from nanoengine.setup.config.engine_options import OPTIONS_NOT_SUPPORTED
from nanoengine.setup.config.prompts import PromptFile


def page(frame: str) -> str:
    """docs/reference.md: the frame, with the tables and the methods in the places that it names."""
    makers: Mapping[str, Callable[[], str]] = {
        "engine": lambda: table(facts(EngineOptions)),
        "sampling": _sampling,
        "structured_outputs": lambda: table(facts(StructuredOutputsParams)),
        "speculation": lambda: table(facts(SpeculationOptions, given={"method": "ngram"})),
        "drafters": lambda: _parts(register_drafters(), "method"),
        "policies": lambda: _parts(register_policies(), "policy"),
        "unsupported_params": lambda: _instead(NOT_SUPPORTED),
        "unsupported_options": lambda: _instead(OPTIONS_NOT_SUPPORTED),
        "server": lambda: table(facts(ServerConfig)),
        "configuration": _configuration,
        "chat_options": lambda: table(_typed_dict(ChatOptions)),
        "llm": lambda: methods(LLM),
        "stream": lambda: methods(Stream),
        "async_llm": lambda: methods(AsyncLLM),
        "output_stream": lambda: methods(OutputStream),
        "sampling_params": lambda: methods(SamplingParams),
        "outputs": _outputs,
        "errors": _errors,
    }
    used = re.findall(r"^<!-- (\w+) -->$", frame, re.MULTILINE)
    assert sorted(used) == sorted(makers), "the frame must have each part once"
    return re.sub(r"^<!-- (\w+) -->$", lambda found: makers[found[1]]().strip(), frame, flags=re.MULTILINE)


def table(rows: Iterable[Fact]) -> str:
    """A table of names, types, defaults and meanings. Fields that one sentence describes together are one row."""
    lines = ["| name | type | default | meaning |", "|---|---|---|---|"]
    for meaning, same in groupby(rows, lambda fact: fact.meaning):
        each = [*same]
        names = ", ".join(f"`{fact.name}`" for fact in each)
        kinds, defaults = (
            ", ".join(dict.fromkeys(f"`{text}`".replace("|", "\\|") for text in texts if text))
            for texts in ((fact.kind for fact in each), (fact.default for fact in each))
        )
        rules = "; ".join(dict.fromkeys(fact.rules for fact in each if fact.rules))
        bold = f". **{rules[0].upper()}{rules[1:]}**" if rules else ""
        lines.append(f"| {names} | {kinds} | {defaults} | {_cell(meaning + bold)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text in a table. What looks like HTML, as "</think>", is code."""
    text = re.sub(r'(?<!`)"?(</?\w[\w|]*>)"?(?!`)', r"`\1`", text)
    return text.replace("|", "\\|")


def _sampling() -> str:
    parts = list[str]()
    for owner, rows in sampling_facts():
        parts += [f"Of the logits processor `{owner}`:" if owner else "Of the engine itself:", table(rows)]
    return "\n\n".join(parts)


def _parts(specs: Iterable[Any], what: str) -> str:
    """The parameters of the plugins of a kind."""
    blocks = list[str]()
    for spec in specs:
        says = f": {spec.help[0].lower()}{spec.help[1:]}" if getattr(spec, "help", "") else "."
        rows = facts(spec.params) if dataclasses.fields(spec.params) else []
        blocks.append(f"`{spec.name}`{says}" + (f"\n\n{table(rows)}" if rows else " It has no keys of its own."))
    return "\n\n".join(blocks)


def _instead(names: Mapping[str, str]) -> str:
    rows = [f"| `{name}` | {_cell(instead)} |" for name, instead in names.items()]
    return "\n".join(["| name | instead |", "|---|---|", *rows])


def _configuration() -> str:
    given = {"model": {"source": "m"}, "prompts": {"file": "f"}}
    sections = {"model": ModelSection, "attention": AttentionSection, "prompts": PromptFile}
    rows = [Fact(f"{name}.{f.name}", f.kind, f.default, f.meaning, f.rules)
            for name, cls in sections.items() for f in facts(cls, given=given.get(name))]  # fmt: skip
    said = meanings(RunConfig)
    plain = [f for f in dataclasses.fields(RunConfig) if f.name in ("sampler", "engine", "output", "chat")]
    rows += [Fact(f.name, source(f.type), "" if f.name == "engine" else default(f), said[f.name]) for f in plain]
    return table(rows)


def _typed_dict(cls: Any) -> list[Fact]:
    said = meanings(cls)
    return [Fact(name, source(kind), "", said[name]) for name, kind in inspect.get_annotations(cls).items()]


def methods(cls: type[Any]) -> str:
    """The public methods and properties that a class itself has, with their docstrings."""
    blocks = list[str]()
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        doc = inspect.getdoc(function)
        if doc is None:
            raise LookupError(f"{cls.__name__}.{name} has no docstring")
        shown = _property(cls, name, function) if isinstance(value, property) else _call(cls, name, function)
        blocks.append(f"### `{cls.__name__}.{name}`\n\n```py\n{shown}\n```\n\n{_markdown(doc)}")
    return "\n\n".join(blocks)


def _property(cls: type[Any], name: str, function: Any) -> str:
    return f"{cls.__name__}.{name}: {inspect.get_annotations(function)['return']}"


def _call(cls: type[Any], name: str, function: Any) -> str:
    signature = inspect.signature(function)
    shown = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    if any(each.default is ... for each in shown):  # any of the parameters above
        shown = [each.replace(name="changes") for each in shown if each.kind is each.VAR_KEYWORD]
    words = [str(each).replace("'", "") if each.default in (each.empty, None) else str(each) for each in shown]
    words = [re.sub(r": '([^']*)'", r": \1", word) for word in words]
    first = next((i for i, each in enumerate(shown) if each.kind is each.KEYWORD_ONLY), None)
    if first is not None:
        words.insert(first, "*")
    start = "await " if inspect.iscoroutinefunction(inspect.unwrap(function)) else ""
    returns = str(signature.return_annotation).strip("'")
    line = f"{start}{cls.__name__}.{name}({', '.join(words)}) -> {returns}"
    if len(line) <= 110:
        return line
    return f"{start}{cls.__name__}.{name}(\n" + "".join(f"    {word},\n" for word in words) + f") -> {returns}"


def _markdown(doc: str) -> str:
    parts = sections(doc)
    text = [parts.pop("")]
    for name, body in parts.items():
        if name == "Returns":
            text.append(f"Returns: {' '.join(body.split())}")
            continue
        rows = [re.sub(r"^([\w, ]+): ", r"`\1`: ", line).replace(", ", "`, `", 0) for line in body.splitlines() if line]
        text.append(f"{name}:\n\n" + "\n".join(f"- {row}" for row in rows))
    return "\n\n".join(_cell(each).replace("\\|", "|") for each in text if each)


OUTPUTS = (
    "RequestOutput", "CompletionOutput", "RequestMetrics", "Logprob", "EmbeddingOutput", "ScoreOutput", "EngineStats",
)  # fmt: skip


def _outputs() -> str:
    blocks = list[str]()
    for name in OUTPUTS:
        cls = getattr(nanoengine, name)
        doc = sections(inspect.getdoc(cls) or "")[""]
        flat = [
            Fact(each.name, source(each.type), default(each), meanings(cls)[each.name])
            for each in dataclasses.fields(cls)
        ]
        blocks.append(f"### `{name}`\n\n{doc}\n\n{table(flat)}")
        for key, value in vars(cls).items():
            if isinstance(value, property) and not key.startswith("_"):
                blocks.append(f"`{name}.{key}`: {' '.join((inspect.getdoc(value.fget) or '').split())}")
    return "\n\n".join(blocks)


def _errors() -> str:
    names = [name for name in nanoengine.__all__ if _is_error(getattr(nanoengine, name))]
    blocks = [f"### `{name}`\n\n{_markdown(inspect.getdoc(getattr(nanoengine, name)) or '')}" for name in names]
    return "\n\n".join(blocks)


def _is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, NanoEngineError)
