"""git-lfs pointers: a `git clone` without git-lfs leaves a few lines of text instead of each large file."""

from __future__ import annotations

from pathlib import Path

from nanoengine.api.errors import ModelError

_FIRST_LINE = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a git-lfs pointer. False if it cannot be read; the code that reads it reports that."""
    try:
        with path.open("rb") as file:
            return file.read(len(_FIRST_LINE)) == _FIRST_LINE
    except OSError:
        return False


def refuse_lfs_pointer(path: Path, error: type[ModelError] = ModelError) -> None:
    """Raises `error`, naming the command that fetches the file, if `path` is a git-lfs pointer."""
    if is_lfs_pointer(path):
        raise error(
            f"{path} is a git-lfs pointer, not the file: the repository was cloned without git-lfs; type "
            f"`git lfs install && git lfs pull` in {path.parent}, or download the file again"
        )
