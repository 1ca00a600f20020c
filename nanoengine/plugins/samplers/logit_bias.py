"""logit_bias: adds a number to the logits of chosen tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoengine.api import LogitsProcessor, Phase, ProcessorRows
from nanoengine.kernels.sampling import filled


class LogitBias(LogitsProcessor):
    phase = Phase.BIAS

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        ids, bias = rows.ragged("ids"), rows.ragged("bias")
        # Adding -0.0 does not change the bits of any number.
        added = torch.where(filled(bias.counts, bias.values.shape[1]), bias.values, -0.0)
        return logits.scatter_add_(1, ids.values.to(torch.int64), added)
