"""Builds the C sources beside this file into the cache folder, for the processor that it runs on.

The library's name is a digest of the sources, the compiler, its options and the processor's features: a cache folder
that machines share has one for each. A finished file takes its place at once, so processes may build it side by side.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_COMPILERS = ("cc", "gcc", "clang")
_INSTALL = "install a C compiler that works (gcc or clang)"
# No contraction: a rounding is where the torch twin has it. The others let loops be vectorised.
_OPTIONS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
PROCESSORS: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ("-DNE_PLAIN",))
_SECONDS = 300  # after which a compiler that does not end is given up


@dataclass(frozen=True, slots=True)
class Built:
    """The library, and which compiler built it."""

    path: Path
    compiler: str


@dataclass(frozen=True, slots=True)
class NotBuilt:
    """There is no library. why, fix: as text."""

    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.why}; {self.fix}"


@functools.cache
def built(cache: Path, processors: tuple[tuple[str, ...], ...] = PROCESSORS) -> Built | NotBuilt:
    """The library in this cache folder, built where it is not there. Tried once in a process.

    processors: options for the processor, of which the first that the compiler takes are used.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return NotBuilt(f"there is no C compiler ({', '.join(_COMPILERS)})", _INSTALL)
    sources = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".c", ".h"))
    try:
        path = cache / "cpu-kernels" / f"{_digest(sources, compiler, processors)}.so"
        if path.exists():
            return Built(path, compiler)
        path.parent.mkdir(parents=True, exist_ok=True)
        why = _build([str(source) for source in sources if source.suffix == ".c"], compiler, processors, path)
    except OSError as error:
        return NotBuilt(str(error), "set NANOENGINE_CACHE to a folder that you may write to")
    return Built(path, compiler) if why is None else NotBuilt(why, _INSTALL)


def _digest(sources: list[Path], compiler: str, processors: tuple[tuple[str, ...], ...]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    tool = os.stat(os.path.realpath(compiler))
    for fact in (compiler, tool.st_size, tool.st_mtime_ns, _OPTIONS, processors, platform.machine(), _features()):
        digest.update(repr(fact).encode())
    return digest.hexdigest()[:24]


def _features() -> str:
    """The line of the processor's features; "" where the system has no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(sources: list[str], compiler: str, processors: tuple[tuple[str, ...], ...], to: Path) -> str | None:
    """Compile into `to`. None: done; else what the compiler said."""
    said = ""
    for processor in processors:
        handle, temporary = tempfile.mkstemp(dir=to.parent, suffix=".tmp")
        os.close(handle)
        command = [compiler, *_OPTIONS, *processor, "-o", temporary, *sources, "-lm", "-ldl"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
            if done.returncode == 0:
                os.replace(temporary, to)
                return None
            said = said or done.stderr.strip()
        except subprocess.TimeoutExpired:
            return f"{compiler} took more than {_SECONDS} s"
        finally:
            Path(temporary).unlink(missing_ok=True)
    return f"{compiler} failed: {said.splitlines()[0] if said else 'it says nothing'}"
