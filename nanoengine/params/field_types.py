"""Checks values against type annotations; parameters come from Python, YAML and JSON. Imports no torch.

The checks are stricter than Python where a mistake would not be noticed (a bool is not an integer, a string is not a
list of strings), and less strict where nothing can go wrong (an integer is a number, a numpy scalar is its value, a
tuple is a list).
"""

from __future__ import annotations

import dataclasses
import json
import operator
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from nanoengine.api.errors import NanoEngineError, ParamsError, described, is_failure, nearest, shown

if TYPE_CHECKING:
    Bytes = int
else:

    class Bytes(int):
        """The annotation of a number of bytes, which may also be a size: "1GB" (10**9), "512MiB" (512 * 2**20)."""


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    Bytes: "an integer (bytes), or a size such as 1GB or 512MiB",
    str: "a string",
    type(None): "None",
    Any: "a value",
    Callable: "a function",
}
_YAML_WORDS: dict[Any, str] = {**_WORDS, bool: "true or false", type(None): "null"}
# Converts a value of a subclass to the plain type, so that methods which the subclass overrides are not called.
_PLAIN: dict[Any, Callable[[Any], Any]] = {int: operator.index, float: float.__float__, str: str.__str__}
_LISTS = (list, tuple, Sequence, Collection, set, frozenset, Set)


class _Misfit(Exception):
    """The value is wrong. `part`: the wrong part of it. `wrong`: what is wrong with it, if not the type."""

    def __init__(self, part: Any, wrong: str = "") -> None:
        self.part, self.wrong = part, wrong


class _WrongField(_Misfit):
    """A field of a dataclass, or a key that is none of its fields (`misfit` is then the end of the message)."""

    def __init__(self, key: Any, value: Any, annotation: Any, misfit: _Misfit | str) -> None:
        super().__init__(value, "a field")
        self.key, self.annotation, self.misfit = key, annotation, misfit


def conform(name: str, value: Any, annotation: Any, words: Mapping[Any, str] = _WORDS) -> Any:
    """`value` converted to the type of `annotation`: integers become floats where needed, containers are copied.

    Numbers and strings of subclasses, such as `IntEnum`, become plain ones. Raises `ParamsError` that names the field,
    what it must be, and the part that is wrong. A dataclass is made of a mapping of its fields; what it raises itself
    is raised unchanged. `words`: names of types in the messages.
    """
    try:
        return _fit(value, annotation)
    except NanoEngineError:
        raise
    except _Misfit as misfit:
        raise ParamsError(_explained(name, value, annotation, misfit, words)) from None
    except BaseException as error:  # the value's class may be any code
        if not is_failure(error):
            raise
        raise ParamsError(
            f"{name} must be {describe(annotation, words)}; reading it raised {described(error)}"
        ) from error


def conform_text(name: str, value: Any, annotation: Any) -> Any:
    """`conform` for what YAML and the command line give, with YAML's words in the messages.

    "None" means null where null is a value of the field, and "none" where it is no text of the field.
    """
    nullable = type(None) in (annotation, *get_args(annotation))
    if value == "None" and nullable:
        return None
    try:
        return conform(name, value, annotation, _YAML_WORDS)
    except ParamsError:
        if nullable and isinstance(value, str) and value.lower() == "none":
            return None
        raise


def _explained(name: str, value: Any, annotation: Any, misfit: _Misfit, words: Mapping[Any, str]) -> str:
    if isinstance(misfit, _WrongField):
        if isinstance(misfit.misfit, str):
            return f"{name} has no key {shown(misfit.key)}; {misfit.misfit}"
        return _explained(f"{name}.{misfit.key}", misfit.part, misfit.annotation, misfit.misfit, words)
    as_text = _yaml if words is _YAML_WORDS else shown
    within = "" if misfit.part is value else f" (because of {as_text(misfit.part)})"
    within += misfit.wrong and f": {misfit.wrong}"
    return f"{name} must be {describe(annotation, words)}, not {as_text(value)}{within}"


def _yaml(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else shown(value)


def describe(annotation: Any, words: Mapping[Any, str] = _WORDS) -> str:
    """The annotation as text: "a number, or None". `words`: names of types."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return ", or ".join(describe(a, words) for a in args)
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin in (dict, Mapping):
        return f"a mapping from {_plural(args[0], words)} to {_plural(args[1], words)}"
    if origin in _LISTS:
        return f"a list of {_plural(args[0], words)}"
    if dataclasses.is_dataclass(annotation):
        return f"a mapping of {', '.join(field.name for field in dataclasses.fields(annotation))}"
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _plural(annotation: Any, words: Mapping[Any, str]) -> str:
    text = describe(annotation, words)
    return text.removeprefix("an ").removeprefix("a ") + "s" if text.startswith(("a ", "an ")) else text


@cache
def _as_they_are(annotation: Any) -> frozenset[type]:
    """Plain types whose values fit and stay what they are."""
    union = get_origin(annotation) in (Union, types.UnionType)
    return frozenset(get_args(annotation) if union else (annotation,)) & {bool, int, float, type(None)}


def _fit(value: Any, annotation: Any) -> Any:
    kind = type(value)
    if kind in _as_they_are(annotation) and (kind is not int or value.bit_length() <= 64):
        return value  # nearly all values, soonest
    if isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, np.ndarray):
        value = value.tolist()
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _fit_any(value, args)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
        raise _Misfit(value)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _Misfit(value)
        return {_fit(k, args[0]): _fit(v, args[1]) for k, v in value.items()}
    if origin in _LISTS:
        return _fit_list(value, origin, args)
    return _fit_plain(value, annotation)


def _fit_any(value: Any, choices: Sequence[Any]) -> Any:
    """The value in the first of the types that fits; its exact type is tried first, so 1 stays an integer."""
    misfit = _Misfit(value)
    for choice in sorted(choices, key=lambda c: c is not type(value)):
        try:
            return _fit(value, choice)
        except _Misfit as found:
            if found.part is not value or found.wrong:
                misfit = found
    raise misfit


def _fit_list(value: Any, origin: Any, args: Sequence[Any]) -> Any:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        raise _Misfit(value)
    try:
        items = list(value)
    except TypeError:  # a tensor without dimensions
        raise _Misfit(value) from None
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        if len(items) != len(args):
            raise _Misfit(value)
        return tuple(_fit(item, a) for item, a in zip(items, args, strict=True))
    make = origin if origin in (tuple, set, frozenset) else list
    return make(_fit(item, args[0]) for item in items)


def _fit_plain(value: Any, annotation: Any) -> Any:
    if annotation is Any:
        return value
    if annotation is None:
        annotation = type(None)
    if annotation is Bytes:
        value, annotation = _bytes(value), int
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type) and isinstance(value, Mapping):
        return _fit_fields(value, annotation)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(operator.index(value))
        except OverflowError:
            raise _Misfit(value) from None
    exact = annotation in (int, float)  # a bool is not a number here
    if not isinstance(annotation, type) or not isinstance(value, annotation) or (exact and isinstance(value, bool)):
        raise _Misfit(value)
    if annotation in _PLAIN:
        value = _PLAIN[annotation](value)
    if annotation is int and value.bit_length() > 64:
        raise _Misfit(value, "it does not fit in 64 bits")
    if isinstance(value, str) and not is_unicode(value):
        raise _Misfit(value, "half of a surrogate pair is not valid Unicode")
    return value


def _bytes(value: Any) -> Any:
    """The bytes of a size as text, or of a whole number such as 1e9; anything else unchanged."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str) or not (found := _SIZE.fullmatch(value.strip())):
        return value
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))


def _fit_fields(value: Mapping[Any, Any], cls: type[Any]) -> Any:
    types_of = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = [name for name in value if name not in names]
    if unknown:
        raise _WrongField(unknown[0], value, cls, nearest(str(unknown[0]), names))
    return cls(**{name: _fit_field(name, each, types_of[name]) for name, each in value.items()})


def _fit_field(name: str, value: Any, annotation: Any) -> Any:
    try:
        return _fit(value, annotation)
    except _Misfit as misfit:
        raise _WrongField(name, value, annotation, misfit) from None


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded. JSON and Python allow half of a surrogate pair, which is not a character."""
    try:
        str.encode(text)
    except UnicodeEncodeError:
        return False
    return True
