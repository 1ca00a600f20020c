"""The GPU's context is made before torch is imported, where an engine of this process will use it."""

from __future__ import annotations

import contextvars
import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.start import wake


class Driver:
    """The functions of the driver that are called, in their order."""

    def __init__(self, found: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._found = found  # what cuInit returns

    def cuInit(self, flags: int) -> int:  # noqa: N802
        self.calls.append(("cuInit", flags))
        return self._found

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        self.calls.append(("cuDeviceGet", index))
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        self.calls.append(("cuDevicePrimaryCtxRetain", device.value))
        return 0


class Processes:
    """What would compile kernels."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self._calls, self.closed = calls, False

    def start(self) -> None:
        self._calls.append(("start",))

    def close(self) -> None:
        self.closed = True


def woken(monkeypatch: pytest.MonkeyPatch, driver: Driver, *, cold: bool = False, **options: Any) -> list[Any]:
    triton = SimpleNamespace(triton_key=lambda: driver.calls.append(("triton_key",)))
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", triton)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(wake, "CompileProcesses", lambda: Processes(driver.calls))
    if not cold:
        monkeypatch.setattr(wake, "_is_cold", lambda: False)
    thread = wake.wake_gpu(EngineOptions(**options))
    if thread is not None:
        thread.join()
    return driver.calls


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_the_context_of_the_engine_s_gpu_is_made(monkeypatch: pytest.MonkeyPatch, device: str, index: int) -> None:
    calls = woken(monkeypatch, Driver(), device=device)
    assert calls == [("cuInit", 0), ("cuDeviceGet", index), ("cuDevicePrimaryCtxRetain", index), ("triton_key",)]


@pytest.mark.parametrize("broken", [None, SimpleNamespace()], ids=["not installed", "another version"])
def test_a_triton_that_cannot_name_itself_is_left_alone(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", broken)
    assert wake._key_function() is None


def test_the_thread_imports_nothing() -> None:
    """Two threads that import Triton at once get halves of it. torch is not imported for that."""
    program = """
import ctypes, sys, threading
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.start import wake

class Driver:
    cuInit = cuDeviceGet = cuDevicePrimaryCtxRetain = lambda self, *given: 0

ctypes.CDLL, start, before = lambda name: Driver(), threading.Thread.start, set()

def noted(thread):
    before.update(sys.modules)
    start(thread)

threading.Thread.start = noted
wake.wake_gpu(EngineOptions(enforce_eager=True)).join()
assert "triton" in before and "torch" not in before
print(sorted(set(sys.modules) - before))
"""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device": "cuda", "tensor_parallel_size": 2}])
def test_no_context_where_this_process_uses_no_gpu(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    assert woken(monkeypatch, Driver(), **options) == []


def test_a_driver_without_a_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert woken(monkeypatch, Driver(found=100)) == [("cuInit", 0)]


def test_a_machine_without_a_driver_is_no_error_and_torch_is_not_imported() -> None:
    program = (
        "import sys; from nanoengine.setup.start import wake; "
        "from nanoengine.params.engine_options import EngineOptions; "
        "wake._DRIVER = 'libnone.so'; assert wake.wake_gpu(EngineOptions()) is None; "
        "assert not {'torch', 'triton'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.parametrize("notes", [True, False])
@pytest.mark.parametrize("eager", [True, False])
def test_kernels_are_compiled_by_processes_where_no_engine_has_started_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, notes: bool, eager: bool
) -> None:
    """They begin before the driver does; elsewhere once there is much to do. An engine ends them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if notes:
        (tmp_path / "nanoengine-1.json").touch()
    first = Driver()

    def start() -> list[Any]:
        calls = woken(monkeypatch, first, cold=True, enforce_eager=eager)
        found = wake.compile_processes()
        assert (found is None) is eager
        woken(monkeypatch, Driver(), cold=True, enforce_eager=eager)
        assert wake.compile_processes() is found
        if found is not None:
            found.close()
            woken(monkeypatch, Driver(), cold=True)
            assert wake.compile_processes() is not found
        return calls

    calls = contextvars.Context().run(start)
    assert calls[: 1 + (not (notes or eager))] == [("start",)] * (not (notes or eager)) + [("cuInit", 0)]


@pytest.mark.parametrize("notes", [True, False])
def test_ranks_have_processes_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, notes: bool) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if notes:
        (tmp_path / "nanoengine-1.json").touch()
    made = list[Any]()
    monkeypatch.setattr(wake, "CompileProcesses", lambda **given: Processes(made.append(given) or made))

    def asked(device: str, **options: Any) -> bool:
        return wake.rank_processes(EngineOptions(device=device, tensor_parallel_size=2, **options)) is not None

    assert [asked("cpu"), asked("cuda", enforce_eager=True), *made] == [False, False]
    assert asked("cuda")
    assert made == [{"engines": 2}, *[("start",)] * (not notes)]


def test_processes_are_not_kept_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def start() -> bool:
        woken(monkeypatch, Driver(found=100), cold=True)
        found = wake.compile_processes()
        return found is not None and found.closed

    assert contextvars.Context().run(start)


def test_the_folder_of_triton_is_where_notes_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    knobs = pytest.importorskip("triton.knobs")
    for name, folder in (("TRITON_CACHE_DIR", tmp_path), ("TRITON_HOME", tmp_path / "home")):
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        monkeypatch.setenv(name, str(folder))
        assert wake._is_cold()
        notes = Path(knobs.cache.dir) / "nanoengine-2.json"
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.touch()
        assert not wake._is_cold()
