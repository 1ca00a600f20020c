"""Checks Python, versions of packages, torch, Triton and the GPUs. Imports are in functions, because they may fail."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from nanoengine.api.errors import described, is_failure
from nanoengine.api.sources import cache_root
from nanoengine.api.specs import PROJECT
from nanoengine.lab.doctor.findings import Finding, Level

_VARIABLES = ("NANOENGINE_CACHE", "NANOENGINE_MODEL_FILES", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
              "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "CUDA_VISIBLE_DEVICES",
              "TRITON_INTERPRET", "TRITON_CACHE_DIR", "PYTORCH_CUDA_ALLOC_CONF", "LD_LIBRARY_PATH")  # fmt: skip
_env = partial(Finding, section="environment")
_gpu = partial(Finding, section="gpu")


def environment() -> Iterator[Finding]:
    """Findings about Python, the machine, packages, environment variables and the cache folder."""
    yield _env(
        name="python", text=f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs"
    )
    yield from _packages()
    broken = list(_imported("torch", "error", "reinstall torch: pip install --force-reinstall torch"))
    yield from broken
    if not broken:
        yield _cpu_kernels()
    if _is_installed("triton"):
        yield from _imported("triton", "warning", "reinstall triton, in the version that torch requires")
    found = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    yield _env(name="variables", text=" ".join(found) or "no relevant ones are set")
    yield _cache_folder()


def _packages() -> Iterator[Finding]:
    """Findings about the versions of required packages, and of optional ones that are installed."""
    from packaging.requirements import Requirement

    try:
        version, requires = metadata.version(PROJECT), metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        yield _env(
            name=PROJECT,
            level="error",
            text="is not installed: without its entry points no built-in part is found",
            fix="pip install -e . in its checkout, or pip install nanoengine",
        )
        return
    yield _env(name=PROJECT, text=version)
    seen: dict[str, Finding] = {}
    for each in map(Requirement, requires):
        extra = each.marker is not None and not each.marker.evaluate({"extra": ""})
        optional = each.marker is not None and each.marker.evaluate({"extra": "triton"})
        if not extra or optional:
            seen.setdefault(each.name, _requirement(each, required=not extra))
    yield from seen.values()


def _requirement(wanted: Any, required: bool) -> Finding:
    """`wanted`: a `packaging` Requirement."""
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        if not required and not _gpu_is_here():
            return _env(name=wanted.name, level="note", text="is not installed; it is for GPUs, and there is none here")
        level: Level = "error" if required else "warning"
        what = "is not installed" if required else "is not installed, so our kernels cannot run on the GPU"
        return _env(name=wanted.name, level=level, text=what, fix=f"pip install '{wanted.name}{wanted.specifier}'")
    if wanted.specifier.contains(found, prereleases=True):
        return _env(name=wanted.name, text=f"{found} (wanted: {wanted.specifier})")
    return _env(
        name=wanted.name,
        level="warning",
        text=f"{found} is not in {wanted.specifier}, the versions with which nanoengine is tested",
        fix=f"pip install '{wanted.name}{wanted.specifier}'",
    )


def _imported(module: str, level: Level, fix: str) -> Iterator[Finding]:
    """A finding if the module cannot be imported; else nothing."""
    cause = import_error(module)
    if cause is not None:
        yield _env(name=f"import {module}", level=level, text=cause, fix=fix)


def import_error(module: str) -> str | None:
    """The error of importing the module, as text; None if it can be imported."""
    try:
        import_module(module)
    except BaseException as error:  # a broken installation may raise anything
        if not is_failure(error):
            raise
        return described(error)
    return None


def _gpu_is_here() -> bool:
    """Whether there is a GPU, according to the driver or torch."""
    if _driver() is not None:
        return True
    if import_error("torch") is not None:
        return False
    import torch

    return torch.cuda.is_available()


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _cache_folder() -> Finding:
    root = cache_root()
    above = next(each for each in (root, *root.parents) if each.exists())
    if above.is_dir() and os.access(above, os.W_OK):
        free = shutil.disk_usage(above).free
        return _env(name="cache", text=f"{root}, {free / 2**30:.1f} GiB free")
    return _env(
        name="cache",
        level="warning",
        text=f"{root} cannot be written: models cannot be downloaded or converted",
        fix="set NANOENGINE_CACHE to a folder that you may write to",
    )


def _cpu_kernels() -> Finding:
    """Which instructions the kernels in C use, or why there are none. Builds them, if no start has done so."""
    from nanoengine.kernels.cpu import NotBuilt, load

    found = load(cache_root())
    if isinstance(found, NotBuilt):
        return _env(
            name="CPU kernels",
            level="note",
            text=f"not used, a CPU runs on plain torch, which is slower: {found.why}",
            fix=found.fix,
        )
    threads = "torch's threads" if found.threaded else "one thread: no OpenMP runtime is loaded"
    return _env(name="CPU kernels", text=f"{found.path}, {threads}")


def gpu() -> Iterator[Finding]:
    """Findings about the driver, torch's GPUs, and whether Triton compiles. Call it only if torch can be imported."""
    import torch

    driver = _driver()
    built = f"torch {torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build")
    if not torch.cuda.is_available():
        if driver is None:
            yield _gpu(name="cuda", text=f"no GPU here ({built})")
        else:
            yield _gpu(name="cuda", level="warning", text=f"{driver}, which torch cannot use: {built}", fix=_no_cuda())
        return
    yield _gpu(name="cuda", text=f"{built}" + (f"; {driver}" if driver else ""))
    for index in range(torch.cuda.device_count()):
        yield _device(index)
    if _is_installed("triton"):
        yield _compiles()


def _driver() -> str | None:
    """The version of the driver and its GPUs, from nvidia-smi; None if there is no driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        done = subprocess.run(
            [command, "--query-gpu=driver_version,name", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {error}"
    rows = [line.split(", ", 1) for line in done.stdout.strip().splitlines()]
    return f"driver {rows[0][0]} with {', '.join(row[-1] for row in rows)}" if rows else None


def _no_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "install the CUDA build of torch (pytorch.org has the command for your driver)"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty and hides every GPU; unset it"
    return f"update the NVIDIA driver, or install a torch built for an older CUDA than {torch.version.cuda}"


def _device(index: int) -> Finding:
    import torch

    try:
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return _gpu(
            name=f"cuda:{index}", level="error", text=f"cannot be used: {error}", fix="see nvidia-smi; free the GPU"
        )
    return _gpu(
        name=f"cuda:{index}",
        text=f"{found.name}, compute capability {found.major}.{found.minor}, "
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {found.multi_processor_count} SMs",
    )


def _compiles() -> Finding:
    """Compiles one of our kernels with an empty cache, runs it and compares it with its reference."""
    code = (
        "import torch\n"
        "from nanoengine.kernels import activation, activation_triton as fused\n"
        "x = torch.randn(4, 64, device='cuda')\n"
        "assert torch.allclose(fused.act_and_mul(x), activation.act_and_mul(x), atol=1e-5), 'a wrong result'\n"
    )
    with tempfile.TemporaryDirectory() as cache:
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
                env={**os.environ, "TRITON_CACHE_DIR": cache}, cwd=Path.cwd(),
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            return _gpu(name="triton", level="error", text=f"a kernel could not be tried: {error}")
    if done.returncode == 0:
        return _gpu(name="triton", text="compiles and runs a kernel")
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return _gpu(
        name="triton",
        level="error",
        text=f"cannot compile or run a kernel: {last}",
        fix="Triton needs a C compiler (gcc) and Python's headers (python3-dev) to build its launcher; "
        "engine.fuse_kernels=false with attention=torch does not need Triton",
        detail=done.stderr[-3000:],
    )
