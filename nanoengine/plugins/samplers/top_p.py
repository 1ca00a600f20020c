"""top_p: keeps the likeliest tokens until their probabilities reach top_p, and all as likely as the last one."""

from __future__ import annotations

from torch import Tensor

from nanoengine.api import LogitsProcessor, Phase, ProcessorRows
from nanoengine.kernels.sampling import truncate_, truncation_threshold


class TopP(LogitsProcessor):
    phase = Phase.TRUNCATE
    argmax_invariant = True

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return truncate_(logits, truncation_threshold(logits, top_p=rows.column("top_p")))
