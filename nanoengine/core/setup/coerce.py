"""Plain values (of YAML) against annotations of dataclasses: strict, but for what YAML cannot say otherwise."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, Union


def coerce(value: Any, annotation: Any) -> Any:
    """`value` as `annotation` asks for it; raises `TypeError` saying what it must be ("must be an integer, not 'x'").

    An integer is taken for a float, a list for a tuple or a set, and text of digits for an integer *key*; nothing else
    is converted. Types it does not know are taken as they come.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _union(value, args)
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        raise TypeError(f"must be one of {', '.join(map(str, args))}, not {value!r}")
    if annotation in _SCALARS:
        return _scalar(value, annotation)
    container = origin or annotation
    if isinstance(container, type) and container is not Any:
        if issubclass(container, Mapping):
            return _mapping(value, args)
        if issubclass(container, list | tuple | Sequence | AbstractSet):
            return _sequence(value, container, args)
    return value


_SCALARS: Mapping[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    type(None): "null",
}


def _scalar(value: Any, kind: type[Any]) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    quote = " (put it in quotes)" if kind is str and isinstance(value, int | float) else ""
    raise TypeError(f"must be {_SCALARS[kind]}, not {_shown(value)}{quote}")


def _union(value: Any, kinds: Sequence[Any]) -> Any:
    if any(type(value) is kind for kind in kinds):  # 1 stays an integer in `float | int`
        return value
    failures = []
    for kind in kinds:
        try:
            return coerce(value, kind)
        except TypeError as error:
            failures.append(str(error))
    wanted = [failure.removeprefix("must be ").rpartition(", not ")[0] for failure in failures]
    raise TypeError(f"must be {' or '.join(wanted)}, not {_shown(value)}")


def _sequence(value: Any, container: type[Any], args: Sequence[Any]) -> Any:
    if isinstance(value, str) or not isinstance(value, list | tuple | AbstractSet):
        raise TypeError(f"must be a list, not {_shown(value)}")
    kind = args[0] if args else Any
    items = [_at(f"[{index}]", item, kind) for index, item in enumerate(value)]
    if issubclass(container, tuple):
        return tuple(items)
    return frozenset(items) if issubclass(container, AbstractSet) else items


def _mapping(value: Any, args: Sequence[Any]) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"must be a mapping, not {_shown(value)}")
    key_kind, kind = args or (Any, Any)
    out: dict[Any, Any] = {}
    for key, item in value.items():
        number = key_kind is int and isinstance(key, str) and key.removeprefix("-").isdigit()
        good = int(key) if number else _at(f"[{key}]", key, key_kind, " as a key")
        if good in out:
            raise TypeError(f"holds the key {good!r} twice")
        out[good] = _at(f"[{key}]", item, kind)
    return out


def _at(place: str, value: Any, kind: Any, note: str = "") -> Any:
    try:
        return coerce(value, kind)
    except TypeError as error:
        raise TypeError(f"{place}{note} {error}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
