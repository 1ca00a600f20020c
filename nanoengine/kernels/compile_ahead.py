"""Compiles a start's Triton kernels beside each other instead of one by one, as each would first be launched.

What a start will launch is known by running it: inside `compiling_ahead()` a launch of this thread only hands its
specialisation to a pool of threads, and runs nothing. Most of a compilation is MLIR, LLVM and ptxas, without the
interpreter's lock. What else Triton does at a first launch is done there, too: up to Triton 3.6 a C compiler makes a
function that launches kernels with these arguments, half a second of a core, and the GPU gets the kernel's code. A
kernel whose binary is in Triton's cache is loaded the same way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanoengine.kernels.cache_keys import make_key
from nanoengine.kernels.compile_processes import CompileProcesses

_THREADS = 16
_one = threading.Lock()  # one thread at a time puts its own in the place of Triton's functions
_seen: ContextVar[set[Hashable] | None] = ContextVar("nanoengine_compile_ahead", default=None)


def is_compiling_ahead() -> bool:
    """Whether this thread's launches are only compiled."""
    return _seen.get() is not None


@contextmanager
def compiling_ahead(processes: CompileProcesses | None = None) -> Iterator[None]:
    """No Triton kernel of this thread runs inside; what was met is compiled when it ends. Other threads wait to enter.
    processes: which compile what they can.

    So results inside are those of kernels that did not run: run there only what reads no index from them. A kernel that
    cannot be compiled says so when it is launched.
    """
    import triton
    from triton.runtime import Autotuner, JITFunction
    from triton.runtime._async_compile import active_mode

    with _one:
        token = _seen.set(set())
        launch, tune = JITFunction.run, Autotuner.run
        JITFunction.run, Autotuner.run = _compiled(launch), _untuned(tune)
        try:
            with _Pool(processes) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
                yield
        finally:
            JITFunction.run, Autotuner.run = launch, tune
            _seen.reset(token)
            active_mode.set(None)  # it stays on where its end raises (triton 3.7), as Ctrl-C does there


@contextmanager
def making_keys() -> Iterator[None]:
    """Launches inside find kernels by the keys that `compiling_ahead` compiled them with."""
    from triton.runtime import JITFunction

    with _one:
        launch = JITFunction.run

        def run(kernel: Any, *args: Any, **options: Any) -> Any:
            make_key(kernel)
            return launch(kernel, *args, **options)

        JITFunction.run = run
        try:
            yield
        finally:
            JITFunction.run = launch


class _Pool(ThreadPoolExecutor):
    """Threads that compile kernels and make them ready to be launched on the GPU of the thread that made the pool."""

    def __init__(self, processes: CompileProcesses | None) -> None:
        threads = min(_THREADS, os.cpu_count() or 1)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            super().__init__(threads, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))
        else:
            super().__init__(threads)
        self._of_arguments: dict[Hashable, threading.Lock] = {}
        self._processes = processes

    def submit(self, compile: Callable[..., Any], /, *args: Any, **given: Any) -> Future[Any]:
        return super().submit(lambda: self._made_ready(self._compiled(partial(compile, *args, **given))))

    def _compiled(self, compile: partial[Any]) -> Any:
        if self._processes is not None:
            self._processes.compile(compile.func)  # then Triton's cache has it
        return compile()

    def _made_ready(self, kernel: Any) -> Any:
        """The kernel with what its first launch would make; if that fails, the launch tries it again and says why."""
        try:
            arguments = tuple(kernel.src.signature.values())
            with self._of_arguments.setdefault(arguments, threading.Lock()):  # the next one finds the function made
                kernel._init_handles()
        except Exception:  # noqa: BLE001 - of a C compiler, a driver, or a version of Triton without this method
            if getattr(kernel, "module", None) is None:
                kernel._run = None  # or Triton takes what is half made for ready
        return kernel


def _compiled(launch: Callable[..., Any]) -> Callable[..., Any]:
    """`JITFunction.run` that compiles each specialisation once where `compiling_ahead`, and else launches as ever."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        seen = _seen.get()
        if seen is None:
            return launch(kernel, *args, grid=grid, warmup=warmup, **options)
        key = (id(kernel), *map(_specialises, args), *((name, _specialises(value)) for name, value in options.items()))
        if key not in seen:
            seen.add(key)
            make_key(kernel)
            launch(kernel, *args, grid=grid, warmup=True, **options)
        return None

    return run


def _untuned(tune: Callable[..., Any]) -> Callable[..., Any]:
    """Timing what does not run would choose a configuration at random: a plugin's tuned kernels wait for their turn."""

    def run(tuner: Any, *args: Any, **options: Any) -> Any:
        return None if is_compiling_ahead() else tune(tuner, *args, **options)

    return run


def _specialises(argument: Any) -> Hashable:
    """At least what Triton tells kernels apart by: of a tensor its dtype and alignment, of anything else its value."""
    if isinstance(argument, Tensor):
        return (argument.dtype, argument.data_ptr() % 16 == 0)
    block = getattr(argument, "block_shape", None)
    if block is not None:  # a tensor descriptor, with how its tiles lie in shared memory if that is given
        return (type(argument), argument.base.dtype, *block, getattr(argument, "layout", None))
    return (type(argument), argument)
