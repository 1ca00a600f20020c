"""min_p: keeps tokens with at least min_p times the highest probability."""

from __future__ import annotations

from torch import Tensor

from nanoengine.api import LogitsProcessor, Phase, ProcessorRows
from nanoengine.kernels.sampling import truncate_, truncation_threshold


class MinP(LogitsProcessor):
    phase = Phase.TRUNCATE
    argmax_invariant = True

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return truncate_(logits, truncation_threshold(logits, min_p=rows.column("min_p")))
