"""Top-nσ sampling (Tang et al., 2024, arXiv:2411.07641): truncates by the standard deviation of the logits."""

import torch

from nanoengine.api import LogitsProcessor, Phase


class TopNSigma(LogitsProcessor):
    phase = Phase.TRUNCATE
    argmax_invariant = True  # so greedy requests skip it

    def apply(self, logits, rows):
        """[R, V] -> [R, V]. Tokens that are removed already (-inf) do not count in the standard deviation."""
        n = rows.column("top_n_sigma")[:, None]  # [R, 1]
        there = logits > float("-inf")
        count = there.sum(1, keepdim=True)
        mean = torch.where(there, logits, 0.0).sum(1, keepdim=True) / count
        sigma = (torch.where(there, logits - mean, 0.0).square().sum(1, keepdim=True) / count).sqrt()
        lowest = torch.where(n > 0, logits.amax(1, keepdim=True) - n * sigma, float("-inf"))
        return logits.masked_fill(logits < lowest, float("-inf"))
