"""bad_words: removes a token if it would complete a bad word in the output."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoengine.api import LogitsProcessor, Need, Phase, ProcessorRows
from nanoengine.kernels.sampling import filled, forbid_


class BadWords(LogitsProcessor):
    phase = Phase.MASK
    needs = frozenset({Need.TOKEN_IDS})

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        """A row has W entries: the tokens of all its sequences, one sequence after the other."""
        assert rows.token_ids is not None
        tokens, counts = rows.ragged("tokens").values, rows.ragged("tokens").counts
        following = rows.ragged("following").values.to(torch.int64)
        sequence = rows.ragged("sequence").values.to(torch.int64)
        present = filled(counts, tokens.shape[1])
        final = present & (following == 0)

        # A token of a sequence with f tokens after it must be f positions before the drawn token, in the output.
        place = rows.positions[:, None] - following
        history = rows.token_ids[rows.slots[:, None], place.clamp(min=0)]
        differs = present & ~final & ((place < rows.prompt_lens[:, None]) | (history != tokens))
        differences = torch.zeros_like(tokens).scatter_add_(1, sequence, differs.to(tokens.dtype))  # [R, sequences]
        completes = final & (differences.gather(1, sequence) == 0)
        return forbid_(logits, tokens.to(torch.int64), completes)
