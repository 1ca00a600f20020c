"""The cache of converted models: one folder for each content. A folder is complete or does not exist.

This also holds if several processes convert at the same time, or if one is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanoengine.api import ModelSourceError, SourceContext
from nanoengine.plugins.model_sources.gguf_convert import CONVERTER_VERSION, convert

MANIFEST = "nanoengine.json"


@dataclass(frozen=True, slots=True)
class ConvertedModel:
    """The cache entry of one GGUF file's content, for one version of the converter.

    Attributes:
        sha256: hex digest of the .gguf file.
        ctx: the root of the cache, and the function that reports progress.
    """

    sha256: str
    ctx: SourceContext

    @property
    def root(self) -> Path:
        return self.ctx.cache / "gguf"

    @property
    def key(self) -> str:
        return f"{self.sha256[:16]}-v{CONVERTER_VERSION}"

    @property
    def folder(self) -> Path:
        return self.root / self.key

    def ready(self) -> bool:
        """Whether the folder exists and is complete. Only sizes are compared, because this runs at every start."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            sizes = {name: (self.folder / name).stat().st_size for name in manifest["files"]}
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return bool(manifest.get("sha256") == self.sha256 and sizes == manifest["files"])

    def obtain(self, fetch: Callable[[Path], Path]) -> Path:
        """The converted folder. It is made if it does not exist.

        Args:
            fetch: a function that receives a scratch folder (removed afterwards) and returns the path of the .gguf
                file. It is called at most once, and by only one process at a time.

        Raises `ModelSourceError` if the file is not supported or the folder cannot be written, and what `fetch` raises.
        """
        if self.ready():
            return self.folder
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self._lock():
                if not self.ready():  # else another process has made it while this one waited
                    self._build(fetch)
        except (OSError, NotImplementedError) as error:  # NotImplementedError: the file system has no locks
            raise ModelSourceError(
                f"cannot make the converted model {self.folder}: {error}; the cache needs a writable folder with "
                "enough space; set NANOENGINE_CACHE to use another one"
            ) from error
        return self.folder

    def _lock(self) -> _Lock:
        return _Lock(self.root / f".{self.key}.lock", self.ctx.say)

    def _build(self, fetch: Callable[[Path], Path]) -> None:
        """Makes the folder under a temporary name, then renames it. Called with the lock."""
        prefix = f".{self.key}.tmp-"
        for stale in self.root.glob(f"{prefix}*"):  # its owner had the lock, so it has ended
            shutil.rmtree(stale)
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=self.root))
        try:
            (work / "fetched").mkdir()
            gguf = fetch(work / "fetched")
            made = work / "model"
            made.mkdir()
            convert(gguf, made, self.ctx.say)
            files = {
                path.relative_to(made).as_posix(): path.stat().st_size for path in made.rglob("*") if path.is_file()
            }
            manifest = {"sha256": self.sha256, "converter": CONVERTER_VERSION, "files": files}
            (made / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            if self.folder.exists():
                self.ctx.say(f"{self.folder} is damaged: replacing it")
                self.folder.rename(work / "damaged")
            made.rename(self.folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


class _Lock:
    """A lock between processes. The system releases it if its owner ends. Waiting for it is reported to the user."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        from filelock import FileLock

        self._file = FileLock(path)
        self._say = say

    def __enter__(self) -> None:
        from filelock import Timeout

        try:
            self._file.acquire(timeout=0)
        except Timeout:
            self._say("another process is converting this model: waiting for it")
            self._file.acquire()

    def __exit__(self, *exc: object) -> None:
        self._file.release()


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path, ctx: SourceContext) -> str:
    """`file_sha256`, kept in the cache as long as size and modification time of the file do not change.

    Reading a file of several gigabytes at every start would take seconds.
    """
    path = path.resolve()
    note = ctx.cache / "gguf" / "digests" / hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    stat = path.stat()
    stamp = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino} "
    try:
        known = note.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        known = ""
    if known.startswith(stamp) and len(known) == len(stamp) + 64:
        return known[len(stamp) :]
    digest = file_sha256(path)
    note.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False, encoding="ascii") as file:
        file.write(stamp + digest)
    Path(file.name).replace(note)
    return digest
