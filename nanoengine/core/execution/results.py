"""A launched step: its handle, and its results, from tensors on the device to a `StepResult` on the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoengine.api.deltas import LogprobRows, join_rows
from nanoengine.api.errors import forget_locals, is_failure
from nanoengine.core.step import (
    NO_LOGPROBS,
    ROW_BAD_LOGITS,
    ROW_FINE,
    Bool,
    Float32,
    Int32,
    Int64,
    StepPlan,
    StepResult,
    SuppliedColumn,
    f32,
    offsets_of,
)

NO_SUMS = f32()  # of a step that pools nothing


class StepHandle(ABC):
    """A launched step.

    Attributes:
        late: its tail is not launched yet, as it waits for columns (`StepPlan.late`).
        room: of a late step, memory [L, words] where masks of its draws may be written, to be sent without a copy.
    """

    late: bool = False
    room: Int32 | None = None

    def supply(self, columns: Sequence[SuppliedColumn]) -> StepHandle:
        """Launch the tail of a late step, with these columns: before the next launch. Returns the step, which is not
        late any more. Any other step is returned as it is."""
        return self

    @abstractmethod
    def wait(self) -> StepResult:
        """Its result, once it has arrived. Raises what the step raised."""

    def has_arrived(self) -> bool:
        """Whether `wait` returns at once. On a CPU it is False, so that batches do not depend on how fast steps are."""
        return False


@dataclass(frozen=True)
class NotLaunched(StepHandle):
    """Takes the place of the handle of a step whose launch raised `error`."""

    error: BaseException

    def wait(self) -> StepResult:
        raise self.error


class LateStep(StepHandle):
    """A step whose forward pass is launched, and whose tail waits for columns."""

    late = True

    def __init__(self, finish: Callable[[Sequence[SuppliedColumn]], StepHandle], room: Int32 | None = None) -> None:
        """finish: launches the tail, and returns its handle."""
        self._finish, self.room = finish, room

    def supply(self, columns: Sequence[SuppliedColumn]) -> StepHandle:
        return self._finish(columns)

    def wait(self) -> StepResult:
        raise AssertionError("waited for a step without its columns")


def wait_out(handles: Iterable[StepHandle]) -> None:
    """Wait for the steps behind one that raised. What they raise is a consequence of that, and ignored."""
    for handle in handles:
        try:
            handle.supply(()).wait()
        except BaseException as error:
            if not is_failure(error):
                raise
            forget_locals(error)


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log-probs of N positions, on the device.

    rows, limits: int32 [N], how many best ones each row wants (both on the host). positions, token_ids: int64 [N].
    values: float32 [N]. ranks: int32 [N]. top_ids: int32 [N, K]. top_values: float32 [N, K].
    """

    rows: Int32
    limits: Int32
    positions: Tensor
    token_ids: Tensor
    values: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.positions, self.token_ids, self.values, self.ranks, self.top_ids, self.top_values)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What S draws gave, on the device: token_ids int64 [S]; failed int32 [S]; logprobs that rows want; counts int32
    [B], how many tokens each row keeps, where rows have drafts."""

    token_ids: Tensor
    failed: Tensor
    logprobs: tuple[PendingLogprobs, ...] = ()
    counts: Tensor | None = None


class LaunchedStep(StepHandle):
    """A step whose work is enqueued. Its copies to the host start when it is made; `wait` is its only wait."""

    def __init__(
        self,
        plan: StepPlan,
        drawn: Drawn,
        prompt: Sequence[PendingLogprobs] = (),
        graphs: int = 0,
        pooled: Tensor | None = None,
    ) -> None:
        """prompt: log-probs of prompt tokens. graphs: as in `StepResult`. pooled: as in `Forwarded`."""
        self._plan, self._graphs = plan, graphs
        self._sampled, self._prompt = drawn.logprobs, tuple(prompt)
        sent = [drawn.token_ids, drawn.failed, *(t for part in self._sampled + self._prompt for t in part.tensors)]
        sent += [t for t in (drawn.counts, pooled) if t is not None]
        self._arrays = [_send(tensor) for tensor in sent]
        self._arrived: torch.cuda.Event | None = None
        if drawn.token_ids.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> StepResult:
        if self._arrived is not None:
            self._arrived.synchronize()
        arrays = iter([tensor.numpy() for tensor in self._arrays])
        token_ids, failed = next(arrays), next(arrays)
        sampled, prompt = _rows_of(self._sampled, arrays), _rows_of(self._prompt, arrays)
        counts = next(arrays) if len(self._plan.drafts) else None
        pooled = next(arrays, NO_SUMS)
        return _result(self._plan, token_ids, failed, counts, self._graphs, sampled, prompt, pooled)

    def has_arrived(self) -> bool:
        try:
            return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]
        except BaseException as error:
            if not is_failure(error):
                raise
            return True  # the device is lost: `wait` raises that


class TailStep(LaunchedStep):
    """A step that ended in a graph, which wrote what it drew to the host; no log-probs."""

    def __init__(
        self, plan: StepPlan, drawn: npt.NDArray[np.int32], arrived: torch.cuda.Event, own: Int64, graphs: int
    ) -> None:
        """drawn, arrived: `CapturedTail.answer`. own: int64 [L], which of the draws are the plan's."""
        self._plan, self._drawn, self._arrived, self._own, self._graphs = plan, drawn, arrived, own, graphs

    def wait(self) -> StepResult:
        assert self._arrived is not None
        self._arrived.synchronize()
        token_ids, failed = self._drawn[:2, self._own]
        return _result(self._plan, token_ids, failed, self._drawn[2] if len(self._plan.drafts) else None, self._graphs)


def _result(
    plan: StepPlan,
    token_ids: Int32 | Int64,
    row_failed: Int32,
    counts: Int32 | None,
    graphs: int,
    sampled: LogprobRows = NO_LOGPROBS,
    prompt: LogprobRows = NO_LOGPROBS,
    pooled: Float32 = NO_SUMS,
) -> StepResult:
    """A failed row gives no token; a prompt log-prob that is not a number, or a sum that is not finite, fails its row.

    token_ids, row_failed: [S], of the plan's draws. counts: int32 [B], of a step with drafts: the first draws of each
    row that count.
    """
    if plan.num_decode_rows == plan.num_rows and counts is None:  # a token a row
        failed, kept = row_failed, row_failed == ROW_FINE
        counts = kept.astype(np.int32)
    else:
        failed, counts, kept = _of_rows(plan, row_failed, counts, prompt, pooled)
    return StepResult(
        step=plan.step,
        token_ids=token_ids[kept].astype(np.int32),
        counts=counts,
        failed=failed.astype(np.int32),
        sampled_logprobs=sampled,
        prompt_logprobs=prompt,
        pooled=pooled.ravel(),
        graphs=graphs,
    )


def _of_rows(
    plan: StepPlan, row_failed: Int32, counts: Int32 | None, prompt: LogprobRows, pooled: Float32
) -> tuple[Int32, Int32, Bool]:
    """failed and counts as in `StepResult`, and which of the draws count, bool [S]."""
    rows = plan.logits_rows[plan.sampled]
    at = np.arange(len(rows)) - np.searchsorted(rows, rows)  # entries of the same row before it
    failed = np.full(plan.num_rows, ROW_FINE, dtype=np.int32)
    failed[rows[at == 0]] = row_failed[at == 0]
    failed[prompt.rows[np.isnan(prompt.logprobs)]] = ROW_BAD_LOGITS
    if len(pooled):
        failed[np.flatnonzero(plan.pooled)[~np.isfinite(pooled).all(1)]] = ROW_BAD_LOGITS
    drawn = np.zeros(plan.num_rows, dtype=np.int32)
    drawn[rows] = 1
    counts = drawn if counts is None else counts[: plan.num_rows]  # behind them are a graph's padding rows
    counts = np.where(failed == ROW_FINE, counts, 0).astype(np.int32)
    return failed, counts, at < counts[rows]


def _send(tensor: Tensor) -> Tensor:
    """A copy on the host, that has arrived when the device has come so far; a CPU's tensor as it is."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _rows_of(parts: Sequence[PendingLogprobs], arrays: Iterator[npt.NDArray[np.generic]]) -> LogprobRows:
    rows = [_logprob_rows(part, [next(arrays) for _ in part.tensors]) for part in parts]
    return (join_rows(rows) if rows else None) or NO_LOGPROBS


def _logprob_rows(part: PendingLogprobs, arrays: Sequence[npt.NDArray[np.generic]]) -> LogprobRows:
    positions, token_ids, values, ranks, top_ids, top_values = arrays
    wanted = np.arange(top_ids.shape[1]) < part.limits[:, None]
    return LogprobRows(
        rows=part.rows,
        positions=positions.astype(np.int32),
        token_ids=token_ids.astype(np.int32),
        logprobs=values.astype(np.float32, copy=False),
        ranks=ranks.astype(np.int32),
        top_ids=top_ids.astype(np.int32)[wanted],
        top_logprobs=top_values.astype(np.float32, copy=False)[wanted],
        top_offsets=offsets_of(wanted.sum(axis=1)),
    )
