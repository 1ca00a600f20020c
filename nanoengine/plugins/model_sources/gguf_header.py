"""Reads the header of a GGUF file. Each count, length and offset is checked against the size of the file.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The
offsets of tensors are checked, and what llama.cpp rejects in addition to the specification is rejected here too.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanoengine.api import ModelSourceError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

# More than any model has, and few enough to be read in about a second.
MAX_KEYS = MAX_TENSORS = 1 << 16
MAX_ITEMS = 1 << 21  # in all arrays together
MAX_TEXT = 1 << 26  # bytes of all strings together
_MAX_DIMS = 4
_ALIGNMENT = 32

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_UNSIGNED_32 = 4
_LFS = b"version https://git-lfs.github.com/spec/"
_FLOATS = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}  # passed to the gguf package unchanged, other types as bytes


class BadHeader(Exception):
    """The header is wrong; the message says what."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
        name: its name in the file. tensor_type: how its values are stored. shape: outer dimension first.
        stored: its bytes, mapped from the file, not read yet.
    """

    name: str
    tensor_type: GGMLQuantizationType
    shape: tuple[int, ...]
    stored: memoryview

    @cached_property
    def data(self) -> np.ndarray:
        """The data for `gguf.dequantize`: floats in the tensor's shape, or uint8 [..., bytes of a row]."""
        kind = _FLOATS.get(self.tensor_type.name)
        words = np.frombuffer(self.stored, kind or np.uint8)
        return words.reshape(self.shape if kind else (*self.shape[:-1], -1))


@dataclass(frozen=True, slots=True)
class Header:
    """The header: key-value pairs as Python values, and the tensors by name."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_header(source: Path) -> Header:
    """Reads the header of `source`. Raises `ModelSourceError` if the file is damaged, inconsistent or not GGUF."""
    try:
        with source.open("rb") as file:
            start = file.read(len(_LFS))
            if start == _LFS:
                raise ModelSourceError(
                    f"{source} is a git-lfs pointer, not the file: the repository was cloned without git-lfs; "
                    f"type `git lfs install && git lfs pull` in {source.parent}, or download the file again"
                )
            if start[:4] != b"GGUF":
                raise BadHeader(f"it begins with {start[:4]!r}, not with b'GGUF'")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _Reader(memoryview(mapped)).header()
    except BadHeader as error:
        raise ModelSourceError(f"{source} is damaged or not a GGUF file: {error!s:.500}") from error


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 4
        self._items, self._text = MAX_ITEMS, MAX_TEXT

    def header(self) -> Header:
        version = self._scalar("I")
        if version & 0xFFFF == 0:
            raise BadHeader("it is big-endian; convert it with gguf-convert-endian of the gguf package")
        if version not in (2, 3):
            raise BadHeader(f"version {version} is not supported; valid: 2, 3")
        tensors = self._count("tensors", self._scalar("Q"), MAX_TENSORS, 8 + 4 + 8 + 4 + 8)
        keys = self._count("keys", self._scalar("Q"), MAX_KEYS, 8 + 4 + 1)
        values: dict[str, Any] = {}
        for _ in range(keys):
            key, kind = self._string(), self._scalar("I")
            if key in values:
                raise BadHeader(f"it has the key {key!r} twice")
            values[key] = self._value(key, kind)
            if key == "general.alignment" and kind != _UNSIGNED_32:
                raise BadHeader("general.alignment must be a uint32")
        return Header(values, self._tensors(tensors, values.get("general.alignment", _ALIGNMENT)))

    def _tensors(self, count: int, alignment: int) -> dict[str, Tensor]:
        if alignment < 1 or alignment & (alignment - 1):
            raise BadHeader(f"general.alignment {alignment} is not a power of two")
        infos = [self._tensor_info() for _ in range(count)]
        base = _padded(self._at, alignment)
        tensors: dict[str, Tensor] = {}
        expected = 0
        for name, kind, shape, offset in infos:
            size = _stored_bytes(name, kind, shape)
            if name in tensors:
                raise BadHeader(f"it has the tensor {name!r} twice")
            if offset != expected:
                raise BadHeader(f"tensor {name!r} is at offset {offset}, where {expected} is expected")
            if base + offset + size > len(self._data):
                raise BadHeader(f"tensor {name!r} ends at byte {base + offset + size} of {len(self._data)}")
            tensors[name] = Tensor(name, kind, shape, self._data[base + offset : base + offset + size])
            expected = _padded(offset + size, alignment)
        return tensors

    def _tensor_info(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        from gguf import GGMLQuantizationType

        name, dims = self._string(), self._scalar("I")
        if not 1 <= dims <= _MAX_DIMS:
            raise BadHeader(f"tensor {name!r} has {dims} dimensions; valid: 1 to {_MAX_DIMS}")
        shape = tuple(self._scalar("Q") for _ in range(dims))[::-1]
        number, offset = self._scalar("I"), self._scalar("Q")
        try:
            return name, GGMLQuantizationType(number), shape, offset
        except ValueError as error:
            raise BadHeader(f"tensor {name!r} is of type {number}, which is unknown") from error

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise BadHeader(f"key {key!r} is of type {kind}, which is unknown")
        inner, count = self._scalar("I"), self._scalar("Q")
        code = _SCALARS.get(inner)
        if code is None and inner != _STRING:
            raise BadHeader(f"key {key!r} is an array of type {inner}, which is not supported")
        count = self._count(f"items in key {key!r}", count, self._items, struct.calcsize(code) if code else 8)
        self._items -= count
        if code is None:
            return [self._string() for _ in range(count)]
        return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(code))))

    def _count(self, what: str, count: int, most: int, least_bytes: int) -> int:
        if count > most or count * least_bytes > len(self._data) - self._at:
            raise BadHeader(f"it claims {count} {what}, more than fit in the {len(self._data)} bytes of the file")
        return count

    def _string(self) -> str:
        length = self._scalar("Q")
        if length > self._text:
            raise BadHeader(f"it claims a text of {length} bytes; all texts together may have {MAX_TEXT}")
        self._text -= length
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise BadHeader(f"a text at byte {self._at - length} is not UTF-8") from error

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, length: int) -> memoryview:
        if length > len(self._data) - self._at:
            raise BadHeader(f"it ends at byte {len(self._data)}, inside its header")
        self._at += length
        return self._data[self._at - length : self._at]


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _stored_bytes(name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    from gguf import GGML_QUANT_SIZES

    block, block_bytes = map(int, GGML_QUANT_SIZES[kind])
    if not math.prod(shape) or shape[-1] % block:
        raise BadHeader(f"tensor {name!r} of type {kind.name} has shape {shape}: rows must be whole blocks of {block}")
    return math.prod(shape) // block * block_bytes
