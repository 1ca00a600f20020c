"""Errors of ranks: the rank's own report, its exit status, or what it is doing when the engine has waited too long."""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nanoengine.api.errors import NanoEngineError, WorkerError, described, is_out_of_memory
from nanoengine.distributed.exits import exit_words
from nanoengine.distributed.group import CollectiveFailed
from nanoengine.distributed.shared import READY, Shared, Word
from nanoengine.setup.start.clock import PHASES

_SPAWN = "spawn"  # the phase "process" of `clock.PHASES`: no code of nanoengine runs yet


@dataclass(frozen=True, slots=True)
class Report:
    """The error that a rank reports before it ends.

    Attributes:
        cause: type and text of the exception. trace: its traceback. when: time of the host's monotonic clock.
        follows: the exception was raised in a collective, as on all ranks when another rank ends.
        error: the pickled exception, if it is a `NanoEngineError`.
    """

    phase: str
    cause: str
    trace: str
    when: float
    follows: bool
    error: bytes | None = None


def report_of(error: BaseException, phase: str) -> Report:
    cause = cause_of(error)
    ours = pickle.dumps(error) if isinstance(error, NanoEngineError) else None
    trace = "".join(traceback.format_exception(error))
    return Report(phase, cause, trace, time.monotonic(), _follows(error), ours)


def cause_of(error: BaseException) -> str:
    """Its type and text; out of memory on a GPU: with figures."""
    figures = is_out_of_memory(error) and torch.cuda.is_available()
    return described(error) + (f" [{memory_figures()}]" if figures else "")


def memory_figures() -> str:
    """The memory of this process's current GPU, as text."""
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
    """What the rank is doing, by its last line of progress: a phase of the start, "step N" or "idle"."""
    phase = shared.word(rank, Word.PHASE)
    if phase != READY:
        return PHASES[phase] if phase else _SPAWN
    read, launched, finished = (shared.word(rank, word) for word in (Word.READ, Word.LAUNCHED, Word.FINISHED))
    if read > launched:
        return f"step {read}"
    return f"step {finished + 1}" if launched > finished else "idle"


def first_error(
    size: int, reports: Mapping[int, Report], ended: Mapping[int, tuple[int | None, str]], shared: Shared
) -> WorkerError:
    """The error of the rank that failed first.

    That is a rank that reported its own error, else one that ended without a report, else the first whose collective
    failed. `ended`: rank -> (exit status as in `subprocess`; None: it has closed its socket but still runs, stack that
    it has written).
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
    error = WorkerError(rank, size, report.phase, report.cause)  # the text is ours already
    error.traceback, error.__cause__ = report.trace, pickle.loads(report.error)
    return error


def late_error(size: int, shared: Shared, stacks: Sequence[str], seconds: float, option: str) -> WorkerError:
    """The error of the rank that is furthest behind, with the stacks of all ranks. `option`: sets the deadline."""
    order = (Word.FINISHED, Word.LAUNCHED, Word.READ, Word.COLLECTIVES)

    def done(rank: int) -> tuple[int, ...]:
        phase = shared.word(rank, Word.PHASE)
        return (len(PHASES) if phase == READY else phase, *(shared.word(rank, word) for word in order))

    late = min(range(size), key=done)
    cause = f"no progress for {seconds:g} s: it hangs, or engine.{option} is too short"
    text = "\n".join(f"rank {rank}, {phase_of(shared, rank)}:\n{stack}" for rank, stack in enumerate(stacks))
    return WorkerError(late, size, phase_of(shared, late), cause, text)
