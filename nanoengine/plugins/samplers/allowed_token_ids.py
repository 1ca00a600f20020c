"""allowed_token_ids: removes all tokens that are not in the row's list. A row without a list keeps all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoengine.api import LogitsProcessor, Phase, ProcessorRows
from nanoengine.kernels.sampling import NEG_INF, filled


class AllowedTokenIds(LogitsProcessor):
    phase = Phase.MASK

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        ids = rows.ragged("ids")
        # A list is padded with its first id: allowing an id twice changes nothing.
        repeated = torch.where(filled(ids.counts, ids.values.shape[1]), ids.values, ids.values[:, :1])
        removed = (ids.counts > 0)[:, None].repeat(1, logits.shape[1])
        removed.scatter_(1, repeated.to(torch.int64), False)
        return logits.masked_fill_(removed, NEG_INF)
