"""The draw of a token for each row of logits, by what the row's columns say, in plain torch. `draw_triton` is the
same by Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoengine.kernels import sampling
from nanoengine.kernels.philox import draw_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawColumns:
    """What a draw reads of R rows, on the device: fresh tensors in an eager tail, the slots' tables in a captured one.

    Attributes:
        greedy: bool or int32 [R]; the row takes the highest logit.
        seeds, positions, sample_index: int64 [R] (positions perhaps int32), the draw's key.
        temperature, top_p, min_p: float32 [R]. top_k: int32 [R]. None: no row wants it.
        at: int32 [R]; where a row's values are, if all but `positions` are tables of slots. None: by row.
        early: all this was complete before the model's first layer.
    """

    greedy: Tensor
    seeds: Tensor
    positions: Tensor
    sample_index: Tensor
    temperature: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    at: Tensor | None = None
    early: bool = False

    def of_rows(self, rows: Tensor) -> DrawColumns:
        """The columns of these rows, int64 [N], alone."""
        names = ("greedy", "seeds", "positions", "sample_index", "temperature", "top_k", "top_p", "min_p")
        given = {name: column for name in names if (column := getattr(self, name)) is not None}
        return DrawColumns(**{name: column[rows] for name, column in given.items()})

    def with_all(self) -> DrawColumns:
        """A column for each operation, of the value without effect where no row wants it: so the same compiled kernels
        serve as in a graph."""
        rows, device = len(self.seeds), self.seeds.device

        def of(given: Tensor | None, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device) if given is None else given

        return replace(
            self,
            temperature=of(self.temperature, 1),
            top_k=of(self.top_k, 0, torch.int32),
            top_p=of(self.top_p, 1),
            min_p=of(self.min_p, 0),
        )


def draw_tokens(logits: Tensor, c: DrawColumns, *, random: bool, start: int = 0) -> tuple[Tensor, Tensor]:
    """Columns int64 [R] and their scores [R], finite where a token was possible. The logits are overwritten.

    random: some row is not greedy. start: the id of column 0.
    """
    if not random:
        return _argmax(logits)
    if not sampling.on_host(logits):
        greedy_ids, greedy_scores = _argmax(logits)
        ids, scores = _draw_random(logits, c, start)
        return torch.where(c.greedy, greedy_ids, ids), torch.where(c.greedy, greedy_scores, scores)
    chosen = (~c.greedy).nonzero().flatten()
    if len(chosen) == len(logits):
        return _draw_random(logits, c, start)
    ids, scores = _argmax(logits)
    ids[chosen], scores[chosen] = _draw_random(logits[chosen], c.of_rows(chosen), start)
    return ids, scores


def _argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the highest, int64 [R], and its logit."""
    ids = logits.argmax(-1)
    return ids, logits.gather(1, ids[:, None]).squeeze(1)


def _draw_random(logits: Tensor, c: DrawColumns, start: int) -> tuple[Tensor, Tensor]:
    """Temperature, truncation and draw."""
    keys = draw_keys(c.seeds, c.positions, c.sample_index)
    if c.temperature is not None:
        sampling.scale_by_temperature_(logits, c.temperature)
    if c.top_k is None and c.top_p is None and c.min_p is None:
        return sampling.draw(logits, keys, start)
    return sampling.draw_truncated(logits, keys, c.top_k, c.top_p, c.min_p, start)
