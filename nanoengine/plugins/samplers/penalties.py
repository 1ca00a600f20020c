"""Applies repetition, presence and frequency penalties, in this order."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoengine.api import LogitsProcessor, Need, Phase, ProcessorRows


class Penalties(LogitsProcessor):
    phase = Phase.PENALTY
    needs = frozenset({Need.OUTPUT_COUNTS, Need.PROMPT_MASK})
    sharded = True

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        counts, in_prompt = rows.output_counts, rows.prompt_mask
        assert counts is not None
        assert in_prompt is not None
        in_output = counts > 0
        repetition = rows.column("repetition_penalty")[:, None]
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(in_prompt | in_output, repeated, logits)
        frequency, presence = rows.column("frequency_penalty")[:, None], rows.column("presence_penalty")[:, None]
        return logits.sub_(frequency * counts + presence * in_output)
