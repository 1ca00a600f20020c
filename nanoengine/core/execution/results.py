"""A launched step's results on their way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoengine.core.step import ROW_BAD_LOGITS, ROW_FINE, LogprobRows, StepPlan, StepResult, offsets_of


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log-probs of N positions, on the device.

    rows: int64 [N]; limits: int32 [N], how many best ones each asked for (both on the host). positions, token_ids:
    int64 [N]. values: float32 [N]. ranks: int32 [N]. top_ids: int32 [N, K]. top_values: float32 [N, K].
    """

    rows: npt.NDArray[np.int64]
    limits: npt.NDArray[np.int32]
    positions: Tensor
    token_ids: Tensor
    values: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.positions, self.token_ids, self.values, self.ranks, self.top_ids, self.top_values)


class LaunchedStep:
    """Starts the copies to the host when made; `wait` is the step's only wait for the device."""

    def __init__(
        self,
        plan: StepPlan,
        rows: npt.NDArray[np.int32],
        token_ids: Tensor,
        failed: Tensor,
        sampled: Sequence[PendingLogprobs],
        prompt: Sequence[PendingLogprobs],
        graphs: int = 0,
    ) -> None:
        """`graphs`: as in `StepResult`."""
        self._plan, self._rows, self._sampled, self._prompt, self._graphs = plan, rows, sampled, prompt, graphs
        sent = [token_ids, failed, *(t for part in (*sampled, *prompt) for t in part.tensors)]
        self._arrived: torch.cuda.Event | None = None
        self._arrays = [_send(tensor) for tensor in sent]
        if token_ids.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> StepResult:
        """The result, once it has arrived. Raises what the device raised."""
        if self._arrived is not None:
            self._arrived.synchronize()
        arrays = iter([tensor.numpy() for tensor in self._arrays])
        token_ids, row_failed = next(arrays), next(arrays)
        sampled = join_logprobs([_logprob_rows(part, [next(arrays) for _ in part.tensors]) for part in self._sampled])
        prompt = join_logprobs([_logprob_rows(part, [next(arrays) for _ in part.tensors]) for part in self._prompt])
        return _result(self._plan, self._rows, token_ids, row_failed, sampled, prompt, self._graphs)

    def has_arrived(self) -> bool:
        arrived: bool = self._arrived is None or self._arrived.query()  # type: ignore[no-untyped-call]
        return arrived


class TailStep(LaunchedStep):
    """Of a step that ended in a graph: one copy, and no log-probs."""

    def __init__(self, plan: StepPlan, drawn: Tensor, which: npt.NDArray[np.int64], graphs: int) -> None:
        """drawn: int32 [3 R], R tokens of two words and R failures; which: int64 [L] of the R are the plan's logits."""
        self._plan, self._which, self._graphs = plan, which, graphs
        self._drawn, self._arrived = _send(drawn), torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record()

    def wait(self) -> StepResult:
        assert self._arrived is not None
        self._arrived.synchronize()
        drawn, count = self._drawn.numpy(), len(self._drawn) // 3
        token_ids, failed = drawn[: 2 * count].view(np.int64)[self._which], drawn[2 * count :][self._which]
        rows, none = self._plan.logits_rows, LogprobRows()
        return _result(self._plan, rows, token_ids, failed, none, none, self._graphs)


def _result(
    plan: StepPlan,
    rows: npt.NDArray[np.int32],
    token_ids: npt.NDArray[np.int64],
    row_failed: npt.NDArray[np.int32],
    sampled: LogprobRows,
    prompt: LogprobRows,
    graphs: int,
) -> StepResult:
    """A failed row gives no token; a prompt log-prob that is not a number fails its row."""
    failed = np.full(plan.num_rows, ROW_FINE, dtype=np.int32)
    failed[rows] = row_failed
    failed[prompt.rows[np.isnan(prompt.logprobs)]] = ROW_BAD_LOGITS
    fine = failed[rows] == ROW_FINE
    counts = np.zeros(plan.num_rows, dtype=np.int32)
    counts[rows[fine]] = 1
    return StepResult(
        step=plan.step,
        token_ids=token_ids.astype(np.int32)[fine],
        counts=counts,
        failed=failed,
        sampled_logprobs=sampled,
        prompt_logprobs=prompt,
        graphs=graphs,
    )


def _send(tensor: Tensor) -> Tensor:
    """Towards the host, without waiting."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _logprob_rows(part: PendingLogprobs, arrays: Sequence[npt.NDArray[np.generic]]) -> LogprobRows:
    positions, token_ids, values, ranks, top_ids, top_values = arrays
    wanted = np.arange(top_ids.shape[1]) < part.limits[:, None]
    return LogprobRows(
        rows=part.rows.astype(np.int32),
        positions=positions.astype(np.int32),
        token_ids=token_ids.astype(np.int32),
        logprobs=values.astype(np.float32, copy=False),
        ranks=ranks.astype(np.int32),
        top_ids=top_ids.astype(np.int32)[wanted],
        top_logprobs=top_values.astype(np.float32, copy=False)[wanted],
        top_offsets=offsets_of(wanted.sum(axis=1)),
    )


def join_logprobs(parts: Sequence[LogprobRows]) -> LogprobRows:
    """All parts' entries, one part's after the other's."""
    if len(parts) <= 1:
        return parts[0] if parts else LogprobRows()
    joined = {
        name: np.concatenate([getattr(p, name) for p in parts])
        for name in ("rows", "positions", "token_ids", "logprobs", "ranks", "top_ids", "top_logprobs")
    }
    counts = np.concatenate([np.diff(p.top_offsets) for p in parts])
    return LogprobRows(**joined, top_offsets=offsets_of(counts))
