"""structured_outputs: removes the tokens that the row's grammar does not allow."""

from __future__ import annotations

from torch import Tensor

from nanoengine.api import LogitsProcessor, Phase, ProcessorRows
from nanoengine.kernels.bitmask import mask_bits_


class StructuredOutputs(LogitsProcessor):
    phase = Phase.MASK
    sharded = True

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return mask_bits_(logits, rows.column("allowed"), rows.vocab_start)
