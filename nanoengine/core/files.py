"""What files of the operating system ask for."""

from __future__ import annotations

from io import FileIO


def write_all(file: FileIO, data: bytes) -> None:
    """One write may take a part only. Raises `OSError`; how much of `data` is in the file is not known then."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
