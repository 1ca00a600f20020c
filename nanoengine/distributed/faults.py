"""What became of a rank, in words: its own report, its exit status, or where it stands when all wait for it."""

from __future__ import annotations

import pickle
import signal
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nanoengine.api.errors import NanoEngineError, WorkerError, described, is_out_of_memory
from nanoengine.distributed.group import CollectiveFailed
from nanoengine.distributed.shared import READY, Shared, Word
from nanoengine.setup.start.clock import PHASES

_SPAWN = "spawn"  # what `startup.PHASES` calls "process": nothing of ours runs yet


@dataclass(frozen=True, slots=True)
class Report:
    """Why a rank gave up, as it says itself.

    Attributes:
        cause: the exception's type and text. trace: its traceback. when: by the host's monotonic clock.
        follows: it broke in a collective, as all ranks do when another one ends.
        error: the exception pickled, if it is one of ours.
    """

    phase: str
    cause: str
    trace: str
    when: float
    follows: bool
    error: bytes | None = None


def report_of(error: BaseException, phase: str) -> Report:
    cause = described(error)
    if is_out_of_memory(error) and torch.cuda.is_available():
        cause += f" [{memory_figures()}]"
    ours = pickle.dumps(error) if isinstance(error, NanoEngineError) else None
    trace = "".join(traceback.format_exception(error))
    return Report(phase, cause, trace, time.monotonic(), _follows(error), ours)


def memory_figures() -> str:
    """Of this process's current GPU."""
    free, total = torch.cuda.mem_get_info()
    figures = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), free, total)
    used, held, left, everything = (f"{figure / 2**30:.2f} GiB" for figure in figures)
    return f"GPU {torch.cuda.current_device()}: {used} in use by torch, {held} held by it, {left} of {everything} free"


def _follows(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, CollectiveFailed):
            return True
        error = error.__cause__ or error.__context__
    return False


def phase_of(shared: Shared, rank: int) -> str:
    """Where the rank is, by what it noted last."""
    phase = shared.word(rank, Word.PHASE)
    if phase != READY:
        return PHASES[phase] if phase else _SPAWN
    read, launched, finished = (shared.word(rank, word) for word in (Word.READ, Word.LAUNCHED, Word.FINISHED))
    if read > launched:
        return f"step {read}"
    return f"step {finished + 1}" if launched > finished else "idle"


def blame(
    size: int, reports: Mapping[int, Report], ended: Mapping[int, tuple[int | None, str]], shared: Shared
) -> WorkerError:
    """The rank that failed first: one that reported a fault of its own, else one that ended without a word, else the
    first whose collective broke.

    `ended`: by rank, exit status as `subprocess` gives it (None: it has closed its socket, and still runs), and the
    stack that it left.
    """
    own = {rank: report for rank, report in reports.items() if not report.follows}
    silent = [rank for rank in ended if rank not in reports]
    if silent and not own:
        rank = silent[0]
        status, stack = ended[rank]
        return WorkerError(rank, size, phase_of(shared, rank), f"the process ended: {exit_words(status)}", stack)
    rank, report = min((own or reports).items(), key=lambda item: item[1].when)
    if report.error is None:
        return WorkerError(rank, size, report.phase, report.cause, report.trace)
    error = WorkerError(rank, size, report.phase, report.cause)  # in our own words already
    error.traceback, error.__cause__ = report.trace, pickle.loads(report.error)
    return error


def exit_words(status: int | None) -> str:
    if status is None:
        return "it hung up"
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name
    hint = ", as the kernel does when the host's memory runs out" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


def blame_late(size: int, shared: Shared, stacks: Sequence[str], seconds: float, option: str) -> WorkerError:
    """The rank that is furthest behind, with all ranks' stacks. `option`: the engine option that set the deadline."""
    order = (Word.FINISHED, Word.LAUNCHED, Word.READ, Word.COLLECTIVES)

    def done(rank: int) -> tuple[int, ...]:
        phase = shared.word(rank, Word.PHASE)
        return (len(PHASES) if phase == READY else phase, *(shared.word(rank, word) for word in order))

    late = min(range(size), key=done)
    cause = f"no sign of life for {seconds:g} s: it hangs, or engine.{option} is too short"
    told = "\n".join(f"rank {rank}, {phase_of(shared, rank)}:\n{stack}" for rank, stack in enumerate(stacks))
    return WorkerError(late, size, phase_of(shared, late), cause, told)
