"""No count, length or offset of a GGUF header is believed before it is checked against the file."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_zoo import TinyGGUF

from nanoengine.api import ModelSourceError, SourceContext
from nanoengine.plugins.model_sources import gguf_header
from nanoengine.plugins.model_sources.gguf_file import GGUFFileSource
from nanoengine.plugins.model_sources.gguf_header import read_header

HUGE = (1 << 64) - 1
F32, Q4_0 = 0, 2


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(
    name: bytes = b"a", shape: tuple[int, ...] = (4,), kind: int = F32, offset: int = 0, dims: int = -1
) -> bytes:
    dims = len(shape) if dims < 0 else dims
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", dims, *shape, kind, offset)


def file(
    *parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF", data: bytes = b""
) -> bytes:
    head = magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    return head + bytes(-len(head) % 32) + data


WHOLE = file(key(b"n", 4, struct.pack("<I", 7)), tensor(), keys=1, tensors=1, data=bytes(16))
LIES: dict[str, tuple[bytes, str]] = {
    "magic": (file(magic=b"GGML"), "begins with b'GGML'"),
    "empty": (b"", "begins with b''"),
    "only the magic": (b"GGUF", "inside its header"),
    "version 1": (file(version=1), "version 1 is not supported"),
    "version 9": (file(version=9), "version 9 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensors": (file(tensors=HUGE), f"claims {HUGE} tensors"),
    "tensors that fit no file": (file(bytes(1000), tensors=60_000), "claims 60000 tensors"),
    "keys": (file(keys=HUGE), f"claims {HUGE} keys"),
    "keys that fit no file": (file(bytes(1000), keys=60_000), "claims 60000 keys"),
    "a key's length": (file(text(b"n", HUGE), keys=1), "claims a text of 18446744073709551615 bytes"),
    "a key beyond the file": (file(text(b"n", 1000), keys=1), "inside its header"),
    "a text's length": (file(key(b"n", 8, text(b"x", 1 << 60)), keys=1), "claims a text of 1152921504606846976"),
    "a text that is no UTF-8": (file(key(b"n", 8, text(b"\xff\xfe")), keys=1), "not UTF-8"),
    "a lone surrogate": (file(key(b"n", 8, text(b"\xed\xa0\x80")), keys=1), "not UTF-8"),
    "a type": (file(key(b"n", 77, bytes(8)), keys=1), "'n' is of type 77"),
    "an array's length": (file(key(b"n", 9, array(0, HUGE)), keys=1), f"claims {HUGE} items in key 'n'"),
    "an array beyond the file": (file(key(b"n", 9, array(10, 1000)), keys=1), "claims 1000 items"),
    "an array of texts": (file(key(b"n", 9, array(8, 1 << 40)), keys=1), "claims 1099511627776 items"),
    "an array of arrays": (file(key(b"n", 9, array(9, 1, array(0, 0))), keys=1), "array of type 9"),
    "an array of nothing known": (file(key(b"n", 9, array(55, 0)), keys=1), "array of type 55"),
    "a key twice": (file(*[key(b"n", 0, b"1")] * 2, keys=2), "the key 'n' twice"),
    "an alignment of zero": (file(key(b"general.alignment", 4, bytes(4)), keys=1), "not a power of two"),
    "an odd alignment": (file(key(b"general.alignment", 4, struct.pack("<I", 33)), keys=1), "not a power of two"),
    "an alignment of another type": (file(key(b"general.alignment", 10, struct.pack("<Q", 32)), keys=1), "uint32"),
    "an alignment beyond the file": (
        file(key(b"general.alignment", 4, struct.pack("<I", 1 << 31)), tensor(), keys=1, tensors=1), "ends at byte"),
    "no dimensions": (file(tensor(shape=()), tensors=1), "has 0 dimensions"),
    "dimensions": (file(tensor(dims=1 << 31), tensors=1), "has 2147483648 dimensions"),
    "a dimension": (file(tensor(shape=(HUGE - 3,)), tensors=1), "ends at byte"),
    "a product that wraps to nothing": (file(tensor(shape=(1 << 32, 1 << 32)), tensors=1), "ends at byte"),
    "a dimension of zero": (file(tensor(shape=(0,)), tensors=1), r"shape \(0,\)"),
    "rows of no whole blocks": (file(tensor(shape=(33,), kind=Q4_0), tensors=1, data=bytes(64)), "blocks of 32"),
    "a tensor's type": (file(tensor(kind=4444), tensors=1), "type 4444"),
    "an offset": (file(tensor(offset=HUGE), tensors=1), "where 0 is expected"),
    "an offset into another": (
        file(tensor(), tensor(b"b"), tensors=2, data=bytes(64)), "'b' is at offset 0, where 32 is expected"),
    "a tensor twice": (file(tensor(), tensor(offset=32), tensors=2, data=bytes(64)), "the tensor 'a' twice"),
    "a tensor beyond the file": (file(tensor(), tensors=1, data=bytes(15)), "ends at byte"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "why"), LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused_without_memory_for_the_lie(data: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ModelSourceError, match=rf"x\.gguf is damaged or not a GGUF file: .*{why}"):
            read_header(tmp_path / "x.gguf")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    for length in range(len(WHOLE)):
        (tmp_path / "x.gguf").write_bytes(WHOLE[:length])
        with pytest.raises(ModelSourceError, match="damaged"):
            read_header(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(WHOLE)
    assert read_header(tmp_path / "x.gguf").values == {"n": 7}


@pytest.mark.parametrize(
    ("bound", "parts", "why"),
    [
        ("MAX_KEYS", {"keys": 4}, "claims 4 keys"),
        ("MAX_TENSORS", {"tensors": 4}, "claims 4 tensors"),
        ("MAX_ITEMS", {"keys": 2}, "claims 2 items"),
        ("MAX_TEXT", {"keys": 2}, "claims a text of 1 bytes"),
    ],
)
def test_what_no_model_has_is_refused_though_the_file_is_large_enough(
    bound: str, parts: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds hold for all arrays and all texts together, not for each."""
    monkeypatch.setattr(gguf_header, bound, 3)
    body = [key(b"a", 9, array(0, 2, b"12")), key(b"b", 9, array(0, 2, b"12"))]
    if bound == "MAX_TEXT":
        body = [key(b"aa", 8, text(b"x")), key(b"b", 8, text(b"x"))]
    (tmp_path / "x.gguf").write_bytes(file(*body, **parts, data=bytes(1000)))
    with pytest.raises(ModelSourceError, match=why):
        read_header(tmp_path / "x.gguf")


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_whole_file_reads_as_the_gguf_package_reads_it(arch: str, tmp_path: Path) -> None:
    path = TinyGGUF(arch).write(tmp_path / "tiny.gguf")
    header, reader = read_header(path), gguf.GGUFReader(path)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.values == theirs
    assert list(header.tensors) == [found.name for found in reader.tensors]
    for found in reader.tensors:
        ours = header.tensors[found.name]
        assert ours.tensor_type == found.tensor_type
        assert ours.shape == tuple(reversed(found.shape.tolist()))
        assert np.array_equal(ours.data, found.data)


@pytest.mark.parametrize("change", [lambda data: data, lambda data: data.replace(b"\x03", b"\x02", 1)], ids=["3", "2"])
def test_versions_2_and_3_are_read(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(change(WHOLE))
    assert read_header(tmp_path / "x.gguf").tensors["a"].data.tolist() == [0.0] * 4


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9144\n")
    with pytest.raises(ModelSourceError, match=r"x\.gguf is a git-lfs pointer.*git lfs pull"):
        GGUFFileSource().resolve(str(path), SourceContext(tmp_path / "cache"))
