"""What a start measured and compiled, kept for the next one of the same plan on the same kind of GPU.

The notes are files in Triton's cache, because they say that it has the kernels: who clears it clears them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nanoengine import __version__
from nanoengine.params.engine_plan import EnginePlan
from nanoengine.setup.start.wake import NOTES

_PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class ProfileNotes:
    """Of a start that ended well: its kernels are compiled.

    Attributes:
        prefill, sampling: bytes that the two largest steps take; 0: they were not measured.
        kept: bytes that are not free any more once these have run: of libraries, and of kernels.
    """

    prefill: int
    sampling: int
    kept: int

    @classmethod
    def read(cls, path: Path | None) -> ProfileNotes | None:
        """None: there are no notes that can be read."""
        try:
            found = json.loads(path.read_text()) if path is not None else None
            return None if found is None else cls(*(int(found[name]) for name in cls.__slots__))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path | None) -> None:
        """Without an effect where the folder cannot be written: then the next start measures again."""
        if path is None:
            return
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(asdict(self)))
            draft.replace(path)
        except OSError:
            with suppress(OSError):
                draft.unlink()


def notes_path(plan: EnginePlan, device: torch.device) -> Path | None:
    """Where the notes of such a start are. None: it keeps none, as it is on a CPU, or may not.

    The name depends on all that decides which kernels run in which sizes: the plan, which has digests of plugin files,
    the GPU, versions, and the sources of this package.
    """
    if device.type != "cuda" or not plan.options.reuse_profile or importlib.util.find_spec("triton") is None:
        return None
    from triton import __version__ as triton_version
    from triton import knobs

    gpu = torch.cuda.get_device_properties(device)
    if plan.options.load_format == "dummy":  # else the files decide how weights are stored
        plan = replace(plan, model_path="")
    parts: list[object] = [__version__, torch.__version__, triton_version, gpu.name, gpu.total_memory, plan]
    parts += [(str(path), *_changed(path)) for path in sorted(_PACKAGE.rglob("*.py"))]
    return Path(knobs.cache.dir) / NOTES.replace("*", hashlib.sha256(repr(parts).encode()).hexdigest()[:32])


def _changed(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
