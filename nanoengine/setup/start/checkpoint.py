"""A folder's safetensors files: which of them are the checkpoint, and which file each tensor is read from.

As in transformers, a whole model.safetensors goes before an index, and what the files hold goes before what an index
says of them. Files that hold a tensor of the same name must hold the same one.
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
_SHOWN = 5  # names listed of each kind of problem


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is read of a folder.

    Attributes:
        path: the folder. tensors: name -> file in the folder.
        stale: tensors that the index names and none of its files holds.
    """

    path: Path
    tensors: Mapping[str, str]
    stale: tuple[str, ...] = ()

    def slices(self, *names: str) -> Iterator[tuple[str, Any]]:
        """(name, safetensors slice) of the named tensors, or of all, file by file."""
        wanted = names or tuple(self.tensors)
        for file in sorted({self.tensors[name] for name in wanted}):
            with opened(self.path / file) as held:
                for name in wanted:
                    if self.tensors[name] == file:
                        yield name, held.get_slice(name)


def find_checkpoint(path: Path) -> Checkpoint:
    """The weights of the folder; reads the headers of its files only.

    Raises `WeightsError` naming the file that is absent, damaged, a git-lfs pointer or outside the folder, or the
    tensor of which two files hold different values.
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
    """The first names in order, and how many there are besides."""
    rest = len(names) - _SHOWN
    return ", ".join(sorted(names)[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The opened safetensors file; raises `WeightsError` where it cannot be read, here or by what is done with it."""
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
        beside = f"the folder holds {some(there)}" if there else "the folder holds no safetensors"
        raise WeightsError(
            f"{path / INDEX_FILE} names {some(absent)}, which {'is' if len(absent) == 1 else 'are'} not there "
            f"({len(absent)} of {len(files)} files); {beside}: fetch the missing files, or the index of these"
        )
    tensors: dict[str, str] = {}
    for file in files:
        for name in sorted(_names(path, file)):
            first = tensors.setdefault(name, file)
            if first != file and not _same(path / first, path / file, name):
                raise WeightsError(
                    f"{first} and {file} in {path} both hold {name}, with different values: they are of two checkpoints"
                )
    return Checkpoint(path, tensors, tuple(name for name in index if name not in tensors))


def _same(one: Path, other: Path, name: str) -> bool:
    """Whether two files hold the same tensor, bit for bit."""
    with opened(one) as a, opened(other) as b:
        x, y = a.get_tensor(name), b.get_tensor(name)
        alike = x.shape == y.shape and x.dtype == y.dtype
        return alike and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file; {} without an index. Raises `WeightsError` for one that names a file outside the folder."""
    index = path / INDEX_FILE
    if not index.is_file():
        return {}
    refuse_lfs_pointer(index, WeightsError)
    try:
        found: Any = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        if not found or not all(isinstance(file, str) for file in found.values()):
            raise ValueError("weight_map must name a file for each tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} is no safetensors index: {error!r}") from error
    for file in sorted(set(found.values())):
        if not _inside(path, file):
            raise WeightsError(f"{index} names {file!r}, which is outside the folder; it may name files in it only")
    return dict(found)


def _inside(path: Path, file: str) -> bool:
    """Whether it is in the folder by its name. The file itself may be a link, as in the hub's cache; no folder may."""
    parts = PureWindowsPath(file)  # knows the separators and roots of both systems
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
