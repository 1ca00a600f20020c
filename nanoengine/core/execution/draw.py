"""The draw of one token a row in plain torch, whatever the stages left of the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.api.processors import RaggedColumn
from nanoengine.api.specs import StandardOp
from nanoengine.kernels import sampling
from nanoengine.kernels.philox import draw_keys
from nanoengine.layers.sharding import padded_length


@dataclass(frozen=True, slots=True)
class DrawRows:
    """What a draw knows of its R rows. Tensors are on the device; flags and names are on the host.

    Attributes:
        slots: int64 [R]. positions: int64 [R]; absolute position of the token to be drawn (= tokens so far).
        prompt_lens: int64 [R].
        seeds: int64 [R]. sample_index: int64 [R]. greedy: bool [R]; the row takes the arg-max.
        min_lens: int64 [R]; while a position is below it, `stop_ids` (int64 [R, W]; padding: any valid ids) cannot
            be drawn.
        active: stages that some row wants. columns: their columns, gathered by row.
        any_min_tokens: some row may be below its `min_lens`. any_random: some row is not greedy.
        output_counts: int32 [R, V]. prompt_mask: bool [R, V]. token_ids: int32 [slots, max_model_len + 1], the whole
            table. Each where an active stage needs it.
    """

    slots: Tensor
    positions: Tensor
    prompt_lens: Tensor
    seeds: Tensor
    sample_index: Tensor
    greedy: Tensor
    min_lens: Tensor
    stop_ids: RaggedColumn
    active: tuple[str, ...] = ()
    columns: Mapping[str, Mapping[str, Tensor | RaggedColumn]] = field(default_factory=dict)
    any_min_tokens: bool = False
    any_random: bool = False
    output_counts: Tensor | None = None
    prompt_mask: Tensor | None = None
    token_ids: Tensor | None = None


def draw_tokens(
    logits: Tensor, rows: DrawRows, ops: Mapping[StandardOp, Tensor], start: int = 0
) -> tuple[Tensor, Tensor]:
    """Columns int64 [R] and their scores [R], finite where a token was possible. Column 0 is id `start`."""
    if not rows.any_random:
        return _argmax(logits)
    keys = draw_keys(rows.seeds, rows.positions, rows.sample_index)
    if not sampling.on_host(logits):
        greedy_ids, greedy_scores = _argmax(logits)
        ids, scores = _draw_random(logits, keys, ops, start)
        return torch.where(rows.greedy, greedy_ids, ids), torch.where(rows.greedy, greedy_scores, scores)
    random = (~rows.greedy).nonzero().flatten()
    if len(random) == len(logits):
        return _draw_random(logits, keys, ops, start)
    ids, scores = _argmax(logits)
    chosen = {op: column[random] for op, column in ops.items()}
    ids[random], scores[random] = _draw_random(logits[random], keys[random], chosen, start)
    return ids, scores


def _argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the highest, int64 [R], and its logit."""
    ids = logits.argmax(-1)
    return ids, logits.gather(1, ids[:, None]).squeeze(1)


def _draw_random(logits: Tensor, keys: Tensor, ops: Mapping[StandardOp, Tensor], start: int) -> tuple[Tensor, Tensor]:
    """Temperature, truncation and draw; overwrites the logits."""
    if StandardOp.TEMPERATURE in ops:
        sampling.scale_by_temperature_(logits, ops[StandardOp.TEMPERATURE])
    top_k, top_p, min_p = (ops.get(op) for op in (StandardOp.TOP_K, StandardOp.TOP_P, StandardOp.MIN_P))
    if top_k is not None or top_p is not None or min_p is not None:
        return sampling.draw_truncated(logits, keys, top_k, top_p, min_p, start)
    return sampling.draw(logits, keys, start)


def vocab_slice(vocab_size: int, tp: TensorParallelGroup) -> tuple[int, int]:
    """First id of this rank's slice of the vocabulary, and the id behind its last."""
    width = padded_length(vocab_size, tp.size)
    return min(tp.rank * width, vocab_size), min((tp.rank + 1) * width, vocab_size)
