"""top_k: keeps the k likeliest tokens, and all that are as likely as the last of them."""

from __future__ import annotations

from torch import Tensor

from nanoengine.api import LogitsProcessor, Phase, ProcessorRows
from nanoengine.kernels.sampling import truncate_, truncation_threshold


class TopK(LogitsProcessor):
    phase = Phase.TRUNCATE
    argmax_invariant = True

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return truncate_(logits, truncation_threshold(logits, top_k=rows.column("top_k")))
