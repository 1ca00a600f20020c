"""Encodes messages as bytes, without pickle: dataclasses of flat arrays, ints, bools and other such dataclasses.

Layout (native byte order, because both ends are on one host): the int64 numbers (int and bool fields, then the length
of each tuple field), one uint32 word per array (its length times 8, plus a code of its dtype), then the raw bytes of
the arrays, each padded to 8. The dataclass is the schema: decode with the class that was encoded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Array = npt.NDArray[Any]

_DTYPES = tuple(np.dtype(t) for t in (np.bool_, np.int32, np.int64, np.float32, np.float64, np.uint8))
_CODES: Mapping[np.dtype[Any], int] = {dtype: code for code, dtype in enumerate(_DTYPES)}
_EMPTY = tuple(np.zeros(0, dtype) for dtype in _DTYPES)
_PADDING = tuple(bytes(n) for n in range(8))


def encode(message: Any) -> bytes:
    """The message as bytes. Raises `TypeError` for an array that is not flat, or whose dtype has no code."""
    codec = _codec(type(message))
    numbers, arrays = codec.leaves(message)
    words, parts = [], [b""]
    for array in arrays:
        size = array.size
        try:
            words.append(size << 3 | _CODES[array.dtype])
        except KeyError:
            raise TypeError(f"a message cannot have arrays of dtype {array.dtype}") from None
        if array.ndim != 1:
            raise TypeError(f"arrays of a message must be flat, not of shape {array.shape}")
        if size:
            data = array.tobytes()
            parts += (data, _PADDING[-len(data) & 7])
    parts[0] = struct.pack(f"{len(numbers)}q{len(words)}I{'4x' * (len(words) & 1)}", *numbers, *words)
    return b"".join(parts)


def decode(cls: type[T], data: bytes | bytearray | memoryview) -> T:
    """The message of class `cls` in `data`. Arrays are writable views of a bytearray; bytes are copied."""
    return cast(T, _codec(cls).build(bytearray(data) if isinstance(data, bytes) else data))


class _Codec:
    """Encodes and decodes one class."""

    def __init__(self, cls: Any) -> None:
        self.cls, self.fields = cls, _fields(cls)
        found = list(_leaves(self.fields))
        self.ints = [f.path for f in found if f.kind in (int, bool)]
        self.bools = [f.path for f in found if f.kind is bool]
        self.arrays = [f.path for f in found if f.kind in (np.ndarray, str)]
        self.text = {f.path for f in found if f.kind is str}
        self.tuples = [(f.path, f.kind) for f in found if f.kind not in (int, bool, str, np.ndarray)]
        self._get_ints, self._get_arrays = _getter(self.ints), _getter(self.arrays)
        self._get_tuples = _getter([name for name, _ in self.tuples])

    def leaves(self, message: Any) -> tuple[list[int], list[Array]]:
        numbers, arrays = list(self._get_ints(message)), list(self._get_arrays(message))
        if self.text:
            arrays = [_of_text(a) if isinstance(a, str) else a for a in arrays]
        tuples = self._get_tuples(message)
        numbers += map(len, tuples)
        for (_, kind), items in zip(self.tuples, tuples, strict=True):
            for item in items:
                inner, more = _codec(kind).leaves(item)
                assert not inner, "items of a tuple must not have numbers"
                arrays += more
        return numbers, arrays

    def build(self, data: bytes | bytearray | memoryview) -> Any:
        count = len(self.ints) + len(self.tuples)
        numbers = struct.unpack_from(f"{count}q", data)
        lengths = numbers[len(self.ints) :]
        total = len(self.arrays) + sum(
            n * len(_codec(kind).arrays) for n, (_, kind) in zip(lengths, self.tuples, strict=True)
        )
        words = struct.unpack_from(f"{total}I", data, count * 8)
        arrays = _arrays(data, words, count * 8 + (total + (total & 1)) * 4)
        values: dict[str, Any] = dict(zip(self.ints, numbers, strict=False))
        values.update({name: bool(values[name]) for name in self.bools})
        self.take(values, arrays)
        for n, (name, kind) in zip(lengths, self.tuples, strict=True):
            values[name] = tuple(_codec(kind).item(arrays) for _ in range(n))
        return _make(self.cls, self.fields, values)

    def item(self, arrays: Iterator[Array]) -> Any:
        values: dict[str, Any] = {}
        self.take(values, arrays)
        return _make(self.cls, self.fields, values)

    def take(self, values: dict[str, Any], arrays: Iterator[Array]) -> None:
        for name in self.arrays:
            array = next(arrays)
            values[name] = array.tobytes().decode() if name in self.text else array


def _codec(cls: Any) -> _Codec:
    return _codec_of(cls)


@cache
def _codec_of(cls: Any) -> _Codec:
    return _Codec(cls)


@dataclass(frozen=True, slots=True)
class _Field:
    """A field. `kind`: int, bool, str, np.ndarray, or the class of a tuple's items. `nested`: of an inner message."""

    name: str
    path: str
    kind: Any
    nested: tuple[_Field, ...] | None = None


def _fields(cls: Any, prefix: str = "") -> tuple[_Field, ...]:
    hints, out = get_type_hints(cls), []
    for f in fields(cls):
        hint, path = hints[f.name], prefix + f.name
        kind = _plain(hint)
        if kind is tuple:
            kind = get_args(hint)[0]
            out.append(_Field(f.name, path, kind))
        else:
            out.append(_Field(f.name, path, kind, _fields(kind, path + ".") if is_dataclass(kind) else None))
    return tuple(out)


def _plain(hint: Any) -> Any:
    """The class of a type hint. From numpy 2.5 on, `NDArray` is a special kind of alias."""
    kind = get_origin(hint) or hint
    return _plain(kind.__value__) if hasattr(kind, "__value__") else kind


def _leaves(found: tuple[_Field, ...]) -> Iterator[_Field]:
    for f in found:
        if f.nested is None:
            yield f
        else:
            yield from _leaves(f.nested)


def _make(cls: Any, found: tuple[_Field, ...], values: Mapping[str, Any]) -> Any:
    return cls(**{f.name: _make(f.kind, f.nested, values) if f.nested else values[f.path] for f in found})


def _getter(names: list[str]) -> Any:
    """A function: message -> tuple of the values at the dotted paths."""
    if len(names) > 1:
        return attrgetter(*names)
    return (lambda message, get=attrgetter(*names): (get(message),)) if names else lambda message: ()


def _arrays(data: bytes | bytearray | memoryview, words: tuple[int, ...], at: int) -> Iterator[Array]:
    for word in words:
        size, dtype = word >> 3, _DTYPES[word & 7]
        if not size:
            yield _EMPTY[word & 7]
            continue
        yield np.frombuffer(data, dtype, size, at)
        at += -(-size * dtype.itemsize // 8) * 8


def _of_text(text: str | Array) -> Array:
    return np.frombuffer(text.encode(), np.uint8) if isinstance(text, str) else text
