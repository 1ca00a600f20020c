import torch

from nanoengine.api import LogitsProcessor, Phase


class EvenOnly(LogitsProcessor):
    phase = Phase.MASK
    sharded = True

    def apply(self, logits, rows):
        ids = torch.arange(rows.vocab_start, rows.vocab_start + logits.shape[1], device=logits.device)
        drop = rows.column("even_only")[:, None] & (ids % 2 == 1)
        return logits.masked_fill_(drop, float("-inf"))
