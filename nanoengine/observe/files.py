"""Files that are written during a run: the old content stays until the new file replaces it."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from contextlib import suppress
from io import FileIO
from pathlib import Path
from stat import S_ISREG
from typing import NoReturn

from nanoengine.api.errors import ConfigError, shown


class GrowingFile:
    """A file that is written in pieces, each of them completely or not at all, and by one process at a time.

    If `path` has a content other than `begin`, that stays for now: the new file is written next to it (`.NAME.part`)
    and replaces it at `settle`. A link stays a link. A pipe or device is written to directly.

    Attributes:
        settled: what is written is at `path`. replaces: at first, another content was there.

    Raises `OSError`, whose `strerror` gives the reason: where the file cannot be opened, or another process writes it;
    at a write that fails; at `check` and `close` when the file is no longer there, or has changed. What was written is
    kept then, where possible.
    """

    def __init__(self, path: str | Path, begin: bytes = b"") -> None:
        self.path = place_of(Path(path).expanduser())
        self.size = len(begin)  # of the whole pieces, in bytes
        self._part = part_of(self.path)
        self._new: FileIO | None = None
        self._gone = False  # the file was replaced, changed or removed, and that was raised
        self._file = FileIO(self.path, "a+" if not self.path.exists() or self.path.is_file() else "a")
        try:
            self.regular = S_ISREG(os.fstat(self._file.fileno()).st_mode)
            self.replaces = self.regular and self._open(begin)
        except BaseException:
            self._file.close()
            raise

    @property
    def settled(self) -> bool:
        return self._new is None

    def _open(self, begin: bytes) -> bool:
        """Whether a content other than `begin` is there. If so, opens the file that will replace it."""
        lock(self._file)
        if not _is_at(self.path, self._file):  # it has just been replaced
            raise OSError(errno.EBUSY, "another process is writing it")
        if os.fstat(self._file.fileno()).st_size == len(begin) and _content(self._file) == begin:
            self._part.unlink(missing_ok=True)  # a killed run left one
            return False
        try:
            self._new = FileIO(self._part, "a+")  # for appending, so that its size shows what other programs write
            self._new.truncate(0)
            write_all(self._new, begin)
            lock(self._new)
        except BaseException:
            self.discard()
            with suppress(OSError):
                self._part.unlink(missing_ok=True)  # an interrupt may come between the file and the assignment
            raise
        return True

    def write(self, data: bytes) -> None:
        file = self._new or self._file
        try:
            write_all(file, data)
        except BaseException:
            if self.regular:
                with suppress(OSError):
                    file.truncate(self.size)
            raise
        self.size += len(data)

    def settle(self) -> None:
        """Puts the new file in the old one's place. No effect where that is done."""
        if self._new is None:
            return
        if _is_at(self.path, self._file) is False:  # if it was only deleted, nothing is lost
            self._part.unlink(missing_ok=True)
            self._lose(errno.ESTALE, f"another file has taken its place{self._whereabouts(self._new)}")
        os.fsync(self._new.fileno())
        os.replace(self._part, self.path)
        old, self._file, self._new = self._file, self._new, None
        old.close()

    def check(self) -> None:
        """Raises `OSError`, once, where the file is not at its place any more or another program has written to it."""
        if not self.regular or self._file.closed or self._gone:
            return
        file, place = (self._file, self.path) if self._new is None else (self._new, self._part)
        there, size = _is_at(place, file), os.fstat(file.fileno()).st_size
        if there is None:
            self._lose(errno.ENOENT, f"it is no longer there{self._whereabouts(file)}")
        if not there:
            self._lose(errno.ESTALE, f"another file has taken its place{self._whereabouts(file)}")
        if size != self.size:
            self._lose(errno.EIO, f"another program has changed it: {self.size} bytes were written, it has {size}")

    def _lose(self, number: int, why: str) -> NoReturn:
        self._gone = True
        raise OSError(number, why)

    def _whereabouts(self, file: FileIO) -> str:
        """Where the written data are now, for a message. Of a file that was deleted they are saved to a new one."""
        if not self.size:
            return ""
        if os.fstat(file.fileno()).st_nlink:
            with suppress(OSError):
                return f"; it was moved to {os.readlink(f'/proc/self/fd/{file.fileno()}')}"
            return "; it was moved"
        for folder in (self.path.parent, Path(tempfile.gettempdir())):
            with suppress(OSError):
                number, kept = tempfile.mkstemp(prefix=f"{self.path.name}.kept-", dir=folder)
                with FileIO(number, "w") as copy:
                    write_all(copy, _content(file)[: self.size])
                return f"; what was in it is in {kept}"
        return "; what was in it is lost"

    def discard(self) -> None:
        """Drops a new file that has not settled: the old one stays. Idempotent."""
        if self._new is not None:
            self._new.close()
            self._new = None
            self._part.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; a new one that has not settled is discarded. Idempotent. Raises as `check` does."""
        if self._file.closed:
            return
        try:
            if self._new is None and self.regular:
                os.fsync(self._file.fileno())  # a full disk or a quota may show only now
                self.check()
        finally:
            self.discard()
            self._file.close()


def place_of(path: Path) -> Path:
    """Where the file that `path` leads to is, or will be: links are followed.

    A pipe, a device or a socket is at `path` itself: a link in /proc/self/fd leads to no name.
    """
    return path if path.exists() and not path.is_file() else Path(os.path.realpath(path))


def part_of(path: Path) -> Path:
    """The file next to `path` (`place_of`) that is written until it replaces it."""
    return path.with_name(f".{path.name}.part")


def user_path(path: str | Path, what: str) -> Path:
    """A path as a user wrote it, with `~` expanded. It need not exist.

    Raises `ConfigError` with `what` it is where no file can have that name: too long, a NUL, no such home folder.
    """
    try:
        found = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.stat(found)
        return found
    except (OSError, ValueError, RuntimeError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(f"{what} {shown(str(path))}: {why}") from error


def decoded(data: bytes, name: str) -> str:
    """Decodes UTF-8, without a byte order mark. Raises `ConfigError` with the number of a line that is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        utf16 = "; it is UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ConfigError(
            f"cannot read {name}: line {line} is not UTF-8 ({error.reason}){utf16}; save it as UTF-8"
        ) from error


def write_all(file: FileIO, data: bytes) -> None:
    """Write until all is written. Raises `OSError`; how much of `data` is in the file is then unknown."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def lock(file: FileIO) -> None:
    """Lock the file until it is closed. Raises `OSError` where another process has locked it."""
    if sys.platform == "win32":
        return  # no advisory locks there
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(errno.EBUSY, "another process is writing it") from error
    except OSError:
        return  # the file system has no locks


def _is_at(place: Path, file: FileIO) -> bool | None:
    """Whether the open file is at `place`; None where nothing is there. Raises `OSError`."""
    try:
        return os.path.samestat(os.stat(place), os.fstat(file.fileno()))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _content(file: FileIO) -> bytes:
    file.seek(0)
    return file.readall()
