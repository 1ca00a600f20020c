"""The safetensors files of a folder: which of them are the checkpoint, and which file each tensor is read from.

As in transformers, model.safetensors is used instead of an index if both exist, and what the files contain counts, not
what the index says. Files with tensors of the same name must have the same values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nanoengine.api.errors import WeightsError
from nanoengine.text.git_lfs import is_lfs_pointer, refuse_lfs_pointer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHOWN = 5  # most names in a message, for each kind of problem


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder.

    Attributes:
        path: the folder. tensors: name -> file in the folder.
        stale: tensors that are in the index but in none of its files.
    """

    path: Path
    tensors: Mapping[str, str]
    stale: tuple[str, ...] = ()

    def slices(self, *names: str) -> Iterator[tuple[str, Any]]:
        """(name, safetensors slice) of the named tensors, or of all, in the order of the files."""
        wanted = names or tuple(self.tensors)
        for file in sorted({self.tensors[name] for name in wanted}):
            with opened(self.path / file) as held:
                for name in wanted:
                    if self.tensors[name] == file:
                        yield name, held.get_slice(name)


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of the folder. Reads only the headers of the files.

    Raises `WeightsError` that names a file which is missing, damaged, a git-lfs pointer or outside the folder, or a
    tensor that has different values in two files.
    """
    single, index = path / SINGLE_FILE, _read_index(path)
    whole = single.is_file() and not (index and is_lfs_pointer(single))
    if whole and SINGLE_FILE not in index.values():
        names = _names(path, SINGLE_FILE)
        files_there = all((path / file).is_file() for file in index.values())
        if not (index and files_there) or index.keys() <= names:
            return Checkpoint(path, dict.fromkeys(sorted(names), SINGLE_FILE))
    if not index:
        raise WeightsError(f"no {SINGLE_FILE} or {INDEX_FILE} in {path}{_instead(path)}")
    return _indexed(path, index)


def some(names: Sequence[str]) -> str:
    """The first names in order, and the number of the others."""
    rest = len(names) - _SHOWN
    return ", ".join(sorted(names)[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A context with the opened safetensors file. Raises `WeightsError` if it cannot be read, also in the context."""
    refuse_lfs_pointer(file, WeightsError)
    try:
        with safe_open(file, framework="pt", device="cpu") as held:
            yield held
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} cannot be read, it may be incomplete: {error}") from error


def _names(path: Path, file: str) -> set[str]:
    with opened(path / file) as held:
        return set(held.keys())


def _indexed(path: Path, index: Mapping[str, str]) -> Checkpoint:
    files = sorted(set(index.values()))
    absent = [file for file in files if not (path / file).is_file()]
    if absent:
        there = sorted(found.name for found in path.glob("*.safetensors"))
        others = f"the folder has {some(there)}" if there else "the folder has no safetensors"
        raise WeightsError(
            f"{path / INDEX_FILE} names {some(absent)}, which {'is' if len(absent) == 1 else 'are'} missing "
            f"({len(absent)} of {len(files)} files); {others}: download the missing files, or the index of these"
        )
    tensors: dict[str, str] = {}
    for file in files:
        for name in sorted(_names(path, file)):
            first = tensors.setdefault(name, file)
            if first != file and not _same(path / first, path / file, name):
                raise WeightsError(
                    f"{first} and {file} in {path} both have {name}, with different values: they belong to different "
                    "checkpoints"
                )
    return Checkpoint(path, tensors, tuple(name for name in index if name not in tensors))


def _same(one: Path, other: Path, name: str) -> bool:
    """Whether the tensor is equal in two files, bit for bit."""
    with opened(one) as a, opened(other) as b:
        x, y = a.get_tensor(name), b.get_tensor(name)
        alike = x.shape == y.shape and x.dtype == y.dtype
        return alike and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file; {} without an index. Raises `WeightsError` if it names a file outside the folder."""
    index = path / INDEX_FILE
    if not index.is_file():
        return {}
    refuse_lfs_pointer(index, WeightsError)
    try:
        found: Any = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        if not found or not all(isinstance(file, str) for file in found.values()):
            raise ValueError("weight_map must name a file for each tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} is not a safetensors index: {error!r}") from error
    for file in sorted(set(found.values())):
        if not _inside(path, file):
            raise WeightsError(f"{index} names {file!r}, which is outside the folder; only files in it are allowed")
    return dict(found)


def _inside(path: Path, file: str) -> bool:
    """Whether the path is in the folder. The file may be a link, as in the hub's cache; its folders may not."""
    parts = PureWindowsPath(file)  # it handles the separators and roots of Windows and POSIX
    if parts.drive or parts.root or ".." in parts.parts or "\0" in file:
        return False
    return (path / file).parent.resolve().is_relative_to(path.resolve())


def _instead(path: Path) -> str:
    others = sorted(found.name for kind in ("*.safetensors", "*.bin", "*.gguf", "*.pth") for found in path.glob(kind))
    if not others:
        return "; other weight formats are not read"
    if any(re.search(r"-of-\d+\.safetensors$", name) for name in others):
        return f", only {some(others)}: the index that says which tensors they hold is missing"
    return f", only {some(others)}; other weight formats are not read"
