"""The nucleus: the likeliest tokens up to the one whose probability crosses top_p, with its ties."""

from __future__ import annotations

from torch import Tensor

from nanoengine.api import LogitsProcessor, Phase, ProcessorRows
from nanoengine.kernels.sampling import truncate_, truncation_threshold


class TopP(LogitsProcessor):
    phase = Phase.TRUNCATE
    argmax_invariant = True

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return truncate_(logits, truncation_threshold(logits, top_p=rows.column("top_p")))
