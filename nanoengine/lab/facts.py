"""What the code says of its options: names, types, defaults, meanings, ranges.

Names, types and defaults are those of the dataclasses; meanings are their docstrings. Ranges are what the checks say:
each field is set to values at the ends of its type, and the errors name the rule.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from nanoengine.api.errors import NanoEngineError, ParamsError
from nanoengine.params.field_types import conform

_ENDS: tuple[Any, ...] = (-(2**63), 2**63 - 1, -1e300, 1e300, "", "?", (), ("",), {0: 1e300}, {"a": -1.0})
"""Values at the ends of types: what is out of a range, where there is one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """A field: its name, annotation, default as code, meaning, and the rules of its checks."""

    name: str
    kind: str
    default: str
    meaning: str
    rules: str = ""


def facts(
    cls: type[Any], prefix: str = "", given: Mapping[str, Any] | None = None, *, complete: bool = True
) -> list[Fact]:
    """The fields of a dataclass, those of dataclasses in it with the name of the field and a dot before theirs.

    given: values of the fields that have no default. Raises `LookupError` for a field that no docstring describes; not
    `complete`: its meaning is "".
    """
    found, hints, said = list[Fact](), get_type_hints(cls), meanings(cls, complete=complete)
    for each in dataclasses.fields(cls):
        if isinstance(hints[each.name], type) and dataclasses.is_dataclass(hints[each.name]):
            found += facts(hints[each.name], f"{prefix}{each.name}.", complete=complete)
            continue
        rules = "; ".join(_rules(cls, each.name, hints[each.name], given or {}))
        if {*re.findall(r"\w+", rules)} <= {*re.findall(r"\w+", said[each.name])}:
            rules = ""  # the docstring says the same
        found.append(Fact(prefix + each.name, source(each.type), default(each), said[each.name], rules))
    return found


def meanings(cls: type[Any], *, complete: bool = True) -> dict[str, str]:
    """Field -> what the docstring says of it. For one that it leaves out: `LookupError`, or "" if not `complete`."""
    doc = inspect.getdoc(cls) or ""
    names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else list(get_type_hints(cls))
    text = doc.partition("Attributes:\n")[2] or doc
    text = re.split(r"\n(?=\S)", text)[0] if "Attributes:\n" in doc else text
    text = re.sub(r"\n(?: {8,}|(?=\S))", " ", text) if "Attributes:\n" in doc else " ".join(text.split())
    name = "`?(?:" + "|".join(sorted(map(re.escape, names), key=len, reverse=True)) + ")`?"
    entry = re.compile(rf"(?:^ *|(?<=[.:] ))({name}(?:, {name})*)(?: \([^)]*\))?: ", re.MULTILINE)
    starts, found = [*entry.finditer(text)], dict[str, str]()
    for match, end in zip(starts, [*(m.start() for m in starts), len(text)][1:], strict=True):
        for each in re.findall(r"\w+", match[1]):
            found[each] = " ".join(text[match.end() : end].split()).rstrip(".")
    missing = [each for each in names if not found.get(each)]
    if missing and complete:
        raise LookupError(f"{cls.__qualname__}: the docstring does not describe {', '.join(missing)}")
    return {**dict.fromkeys(missing, ""), **found}


def _rules(cls: type[Any], name: str, hint: Any, given: Mapping[str, Any]) -> Iterator[str]:
    """What the checks of the class say of values at the ends of the field's type."""
    rules = (_rule(cls, name, {**given, name: end}) for end in _ENDS if _fits(name, end, hint))
    yield from dict.fromkeys(rule for rule in rules if rule)


def _fits(name: str, value: Any, hint: Any) -> bool:
    try:
        conform(name, value, hint)
    except ParamsError:
        return False
    return True


def _rule(cls: type[Any], name: str, values: Mapping[str, Any]) -> str:
    try:
        cls(**values)
    except NanoEngineError as error:
        field, _, rule = str(error).partition(" must ")
        return rule.removeprefix("be ").rpartition(", not ")[0] if re.search(rf"\b{name}\b", field) else ""
    return ""


def source(kind: Any) -> str:
    """The annotation as it stands in the code; a number of bytes may also be a size such as "1GB"."""
    text = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    return text.replace("Bytes", "int | str")


def default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return shown(field.default)
    return "" if field.default_factory is dataclasses.MISSING else shown(field.default_factory())


def shown(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace('"', '\\"') + '"'
    return f"{value:_}" if type(value) is int else repr(value)
