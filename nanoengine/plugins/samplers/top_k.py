"""The k likeliest tokens, with ties for the last place."""

from __future__ import annotations

from torch import Tensor

from nanoengine.api import LogitsProcessor, Phase, ProcessorRows
from nanoengine.kernels.sampling import truncate_, truncation_threshold


class TopK(LogitsProcessor):
    phase = Phase.TRUNCATE
    argmax_invariant = True

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return truncate_(logits, truncation_threshold(logits, top_k=rows.column("top_k")))
