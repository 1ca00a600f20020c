"""Processes that fill Triton's cache: they compile what a first start launches while its own process does other things.

In one process kernels wait for each other: the part of a compilation that is Python holds the interpreter's lock. So
one process imports torch and Triton, beside the engine's own import of them, and is forked for each core. It has one
thread, and no GPU. A kernel is sent by the name of its function, and found in the cache by the process that asked; what
cannot be sent, or not be compiled there, that process compiles itself. Imports neither torch nor Triton by itself.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import io
import os
import pickle
import queue
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanoengine.kernels.cache_keys import make_key

_MOST = 16
_FEWEST_CORES = 4  # with fewer, their imports would take the time that they save
_FEW = 12  # kernels that are not worth a start
_MOMENT = 0.1  # seconds
_LENGTH = struct.Struct("<Q")
_DONE, _FAILED = b"+", b"-"
_OFTEN = ("sampling_triton", "sampling_truncation_triton", "matmul_gluon", "matvec_triton")  # imported before the fork


class CompileProcesses:
    """The processes, and a connection to each. They start by themselves once there is much to do, and do nothing once
    they are closed."""

    def __init__(self, count: int | None = None, *, engines: int = 1) -> None:
        """engines: how many share the cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores //= engines
        self._count = min(_MOST, cores if cores >= _FEWEST_CORES else 0) if count is None else count
        self._free: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self.closed, self._missed = False, 0
        self._lock = threading.Lock()

    @property
    def are_started(self) -> bool:
        """Whether there is, or was, much to compile."""
        return self._process is not None

    def start(self) -> None:
        """Start them, and return at once. Where that fails every kernel is compiled by who launches it."""
        with self._lock:
            if self._process is None and not self.closed and self._count:
                self._start()

    def _start(self) -> None:
        pairs = [socket.socketpair() for _ in range(self._count)]
        theirs = [end.fileno() for _, end in pairs]
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # a fork copies none
        environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, *map(str, theirs)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=theirs,
                env=environment,
                process_group=0,  # so that Ctrl-C in a terminal reaches only the engine
            )
            for ours, _ in pairs:
                self._free.put(ours)
        except OSError:
            for ours, _ in pairs:
                ours.close()
        finally:
            for _, end in pairs:
                end.close()

    def compile(self, compile: Callable[[], Any]) -> bool:
        """Whether Triton's cache has what this function of Triton's would compile."""
        try:
            job = _Job.of(compile)
            if job.is_cached():
                return True
            message = job.message()
        except Exception:  # noqa: BLE001 - of pickle, or of another version of Triton
            return False
        self._missed += 1
        if self._missed > _FEW:
            self.start()
        try:
            return self._sent(message)
        except queue.Empty:
            return False

    def _sent(self, message: bytes) -> bool:
        """Whether a process has compiled it. One that has ended is not asked again."""
        end = self._free.get_nowait()
        try:
            end.sendall(_LENGTH.pack(len(message)) + message)
            answer = end.recv(1)
        except OSError:
            answer = b""
        if answer:
            self._free.put(end)
        else:
            end.close()
        return answer == _DONE

    def close(self) -> None:
        """End them, which takes no time. Nothing is lost: files appear whole in Triton's cache. Idempotent."""
        with self._lock:
            self.closed = True
            with suppress(queue.Empty):
                while True:
                    self._free.get_nowait().close()
            if self._process is not None:
                try:
                    self._process.wait(_MOMENT)  # each other one ends at the end of its connection, and it behind them
                except subprocess.TimeoutExpired:  # it imports, or one compiles
                    self._process.kill()
                    self._process.wait()


@dataclass(frozen=True, slots=True)
class _Job:
    """What `JITFunction._do_compile` hands to an executor."""

    source: Any
    target: Any
    options: Any
    variables: Any

    @classmethod
    def of(cls, compile: Callable[[], Any]) -> _Job:
        given = dict(zip(compile.__code__.co_freevars, compile.__closure__ or (), strict=True))
        return cls(*(given[name].cell_contents for name in ("src", "target", "options", "env_vars")))

    def is_cached(self) -> bool:
        from triton.compiler.compiler import make_backend
        from triton.runtime.cache import get_cache_key, get_cache_manager

        key = get_cache_key(self.source, make_backend(self.target), self.options, self.variables)
        folder = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        return bool(folder.get_group(f"{self.source.name[:150]}.json"))

    def message(self) -> bytes:
        """Names of functions, and plain values."""
        source, written = self.source, io.BytesIO()
        parts = (type(source), source.fn, source.signature, source.constants, source.attrs)
        options = dict(self.options.__dict__)
        _Pickler(written, protocol=pickle.HIGHEST_PROTOCOL).dump((parts, self.target, options, self.variables))
        return written.getvalue()


class _Pickler(pickle.Pickler):
    """Writes Triton's functions as their names."""

    def reducer_override(self, value: Any) -> Any:
        from triton.runtime import JITFunction

        if isinstance(value, JITFunction):
            return _named, (value.fn.__module__, value.fn.__qualname__)
        return NotImplemented


def _named(module: str, name: str) -> Any:
    """The function of Triton's of that name, from under what tunes it or sets its arguments."""
    from triton.runtime import JITFunction

    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    while not isinstance(found, JITFunction):
        found = found.fn
    return found


class _Target:
    """A driver without a GPU, for what asks which one is compiled for."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target


def _compile(job: bytes) -> None:
    from triton.compiler.compiler import compile
    from triton.runtime import driver

    (kind, *parts), target, options, variables = pickle.loads(job)
    make_key(parts[0])
    driver.set_active(_Target(target))
    compile(kind(*parts), target=target, options=options, _env_vars=variables)


def _work(end: socket.socket) -> None:
    """Compile what comes, until the engine's process closes its end."""
    with end.makefile("rb") as jobs:
        while len(head := jobs.read(_LENGTH.size)) == _LENGTH.size:
            job = jobs.read(_LENGTH.unpack(head)[0])
            try:
                _compile(job)
                answer = _DONE
            except Exception:  # noqa: BLE001 - it fails again where it is launched, which reports it
                answer = _FAILED
            end.sendall(answer)


def _make_utilities() -> None:
    """The functions by which Triton's driver loads kernels: the engine's process finds them made."""
    with suppress(Exception):  # of another version of Triton, or without a C compiler
        importlib.import_module("triton.backends.nvidia.driver").CudaUtils()


def _apart(run: Callable[[], None]) -> None:
    """Runs it in a process of its own, which has all that this one has."""
    if os.fork() == 0:
        try:
            run()
        finally:
            os._exit(0)


def _serve(descriptors: Sequence[int]) -> None:
    """One process for each connection."""
    ends = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    _apart(_make_utilities)
    for name in ("torch", "triton", "triton.experimental.gluon", *(f"nanoengine.kernels.{name}" for name in _OFTEN)):
        with suppress(ImportError):
            importlib.import_module(name)
    with suppress(Exception):
        importlib.import_module("triton.runtime.cache").triton_key()
    gc.disable()
    gc.freeze()

    def work(end: socket.socket) -> None:
        for other in ends:
            if other is not end:
                other.close()
        _work(end)

    for end in ends:
        _apart(partial(work, end))
    for end in ends:
        end.close()
    with suppress(ChildProcessError):
        while True:
            os.wait()
    os._exit(0)  # at once: there is nothing to write


if __name__ == "__main__":
    _serve([int(each) for each in sys.argv[1:]])
