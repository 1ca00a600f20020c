"""Python programs that are forked where tests, or what is tested, would start them.

An engine's process imports for four seconds (torch), an HTTP process for three. So one process imports all of it, once:
the source. Each program is a fork of it that becomes what was asked for: its descriptors, environment, folder,
`sys.path`, `sys.argv`, process group and command line are those that it would have, and it is a child of who asked.
Each has a source of its own before it begins, for the programs that it starts.

A source has one thread and has used no device, so that nothing is lost in a fork. What happens while modules are
imported is not seen in such a program, and all of them hash text alike: tests of that start theirs.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

IMPORTED = ("nanoengine.llm", "nanoengine.server.served", "nanoengine.cli.app", "nanoengine.cli.run", "transformers")
READ_BY_IMPORTS = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "TRITON_", "CUDA_", "HF_", "TRANSFORMERS_", "LD_")
FREE = 512  # the descriptors that a program has from the start are below
COMMAND_LINE = 4096  # bytes
MESSAGE = 1 << 17  # bytes
PR_SET_CHILD_SUBREAPER = 36
FORK_EXEC = subprocess._fork_exec  # type: ignore[attr-defined]


def given_path(environment: Mapping[str, str]) -> list[str]:
    return [os.path.abspath(entry) for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]


OWN_PATH = sys.path[len(given_path(os.environ)) :]  # of a source, which has no folder of a script in front


@dataclass(frozen=True)
class Program:
    """`command`: from the interpreter on. `descriptors`: the numbers under which it has those of the message."""

    command: Sequence[str]
    descriptors: Sequence[int]
    environment: Mapping[str, str]
    folder: str
    group: int  # 0: a new one
    session: bool  # a new one

    def run(self) -> None:
        """To its end, in this process."""
        os.setsid() if self.session else os.setpgid(0, self.group)
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        words = list(self.command[1:])
        safe = words[0] == "-P"
        match words[safe:]:
            case ["-m", module, *arguments]:
                self._look_in(os.getcwd(), safe)
                sys.argv[:] = ["-m", *arguments]
                sys.modules.pop(module, None)
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case ["-c", code, *arguments]:
                self._look_in("", safe)
                sys.argv[:] = ["-c", *arguments]
                sys.modules["__main__"] = ModuleType("__main__")
                exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
            case [script, *arguments]:
                self._look_in(str(Path(script).resolve().parent), safe)
                sys.argv[:] = [script, *arguments]
                runpy.run_path(script, run_name="__main__")

    def _look_in(self, first: str, safe: bool) -> None:
        before = given_path(self.environment)
        sys.path[:] = [*([] if safe else [first]), *before, *OWN_PATH]
        importlib.invalidate_caches()


class Starter:
    """In the place of `subprocess._fork_exec`, which starts what cannot be a fork of the source."""

    def __init__(self, source: socket.socket, fork_exec: Any, executable: str, environment: Mapping[str, str]) -> None:
        """`executable`, `environment`: the source's Python, and with what it has imported."""
        self._source, self._executable, self._fork_exec, self._lock = source, executable, fork_exec, threading.Lock()
        self._prctl = ctypes.CDLL(None).prctl
        self._imported_with = read_by_imports(environment)

    def __call__(self, *given: Any) -> int:
        """The arguments are those of `_posixsubprocess.fork_exec`."""
        command, _, close, passed, folder, environment, stdin, _, _, stdout, _, stderr, _, errors, *more = given
        restore, session, group, gid, groups, uid, mask, before = more[:8]
        own = dict(os.environ) if environment is None else dict(os.fsdecode(each).split("=", 1) for each in environment)
        words = [os.fsdecode(word) for word in command]
        if (
            (words[0], close, restore, before) != (self._executable, True, True, None)
            or (gid, groups, uid, mask) != (None, None, None, -1)
            or (words[1].startswith("-") and words[1] not in ("-P", "-m", "-c"))
            or read_by_imports(own) != self._imported_with
        ):
            return int(self._fork_exec(*given))
        standard = [number if fd < 0 else fd for number, fd in enumerate((stdin, stdout, stderr))]
        passed = [fd for fd in passed if fd != errors]
        path = os.path.join(os.getcwd(), os.fsdecode(folder or ""))
        group = os.getpgrp() if group < 0 else group
        return self._forked(Program(words, [0, 1, 2, *passed], own, path, group, session), [*standard, *passed])

    def _forked(self, program: Program, descriptors: Sequence[int]) -> int:
        """The process is an orphan for a moment; this process adopts it."""
        with self._lock:
            self._prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._source, [json.dumps(asdict(program)).encode()], descriptors)
                return int(self._source.recv(64))
            finally:
                self._prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@contextmanager
def forked_programs(python: str = sys.executable) -> Iterator[Starter]:
    """A source of programs of this Python; see `Starter`. What it has started may outlive it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # NumPy would start threads as it is imported
    command = [python, "-P", __file__, str(theirs.fileno()), "." * COMMAND_LINE]
    with subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], process_group=0), closing(ours):
        theirs.close()
        if ours.recv(64) != b"ready":
            raise RuntimeError("the source of forked programs did not start")
        yield Starter(ours, FORK_EXEC, python, os.environ)


def read_by_imports(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: text for name, text in environment.items() if name.startswith(READ_BY_IMPORTS) and name != "PYTHONPATH"
    }


def next_program(asked: socket.socket) -> tuple[bytes, list[int], socket.socket]:
    """A source's life, in which it ends when nobody can ask. Returns in each fork that is a program.

    Returns: the message, the descriptors that came with it, and the program's own source."""
    while True:
        message, fds, _, _ = socket.recv_fds(asked, MESSAGE, FREE)
        if not message:
            os._exit(0)
        assert len(os.listdir("/proc/self/task")) == 1
        reading, writing = os.pipe()
        between = os.fork()
        if between:  # the source
            os.close(writing)
            pid = os.read(reading, 64)
            os.waitpid(between, 0)  # now the program is a child of who asked
            asked.send(pid)
            close(reading, *fds)
            continue
        between, pid = os.getpid(), os.fork()
        if pid:
            os.write(writing, str(pid).encode())
            os._exit(0)
        close(reading, writing)
        while os.getppid() == between:
            time.sleep(0.001)
        source, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        asked.close()
        if os.fork():
            its_end.close()
            return message, fds, source
        close(*fds)
        source.close()
        asked = its_end


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def place(fds: Sequence[int], numbers: Sequence[int], source: socket.socket) -> socket.socket:
    """Gives each descriptor its number, and closes the others. Returns `source` with another number, out of the way."""
    free = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FREE) for fd in (source.detach(), *fds)]
    os.closerange(3, FREE)
    for fd, number in zip(free[1:], numbers, strict=True):
        os.dup2(fd, number)
    close(*free[1:])
    return socket.socket(fileno=free[0])


def show_command(words: Sequence[str]) -> None:
    """In /proc and `ps`."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = "\0".join(words).encode()[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no collection of a program writes to the pages that it shares
    asked = socket.socket(fileno=int(sys.argv[1]))
    asked.send(b"ready")
    message, fds, source = next_program(asked)
    program = Program(**json.loads(message))
    source = place(fds, program.descriptors, source)
    show_command(program.command)
    subprocess._fork_exec = Starter(source, FORK_EXEC, sys.executable, program.environment)  # type: ignore[attr-defined]
    end(status_of(program))


def status_of(program: Program) -> int:
    """Runs it. Other errors are shown by the interpreter, which ends as it always does."""
    try:
        program.run()
    except SystemExit as left:
        if not isinstance(left.code, int | None):
            raise
        return left.code or 0
    return 0


def end(status: int) -> None:
    """As the interpreter ends, but that no object is destroyed: each would have to be copied, for half a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
