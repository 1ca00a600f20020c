"""The sequences of `check_model` and their steps, and what the reference says about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanoengine.testing.conformance.failure import during

Reference = Callable[[Tensor], Any]

FULL_STEP = 128  # tokens of the largest step
_PACE = {"slow": 1, "one": 1, "short": 5, "long": 11}  # tokens of a step


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids by name.

    Attributes:
        ids: every sequence. full: tokens of each sequence that is in the step of `FULL_STEP` tokens; each has one more.
    """

    ids: Mapping[str, list[int]]
    full: Mapping[str, int]

    @classmethod
    def of(cls, vocab_size: int, longest: int) -> Prompts:
        random = torch.Generator().manual_seed(5)

        def some(count: int) -> list[int]:
            return torch.randint(vocab_size, (count,), generator=random).tolist()

        ids = {name: some(n) for name, n in {"slow": 9, "one": 1, "short": 7, "long": min(longest, 45)}.items()}
        ids["shared"] = ids["long"][:19] + ids["slow"]
        cap, full = min(longest - 1, 56), dict[str, int]()
        while left := FULL_STEP - sum(full.values()):
            full[f"full {len(full) + 1}"] = min(cap, left)
        ids |= {name: some(count + 1) for name, count in full.items()}
        # One token over and over: where experts are chosen by token, all of these go to the same.
        ids["same"] = some(1) * min(longest, FULL_STEP)
        ids["far"], ids["far 2"] = some(longest), some(longest)
        return cls(ids, full)

    def ragged(self) -> Iterator[dict[str, int]]:
        """Tokens of each sequence in each step, until all are at their ends."""
        left = {name: len(self.ids[name]) for name in _PACE}
        while chunks := {name: min(_PACE[name], n) for name, n in left.items() if n}:
            yield chunks
            left = {name: n - chunks.get(name, 0) for name, n in left.items()}

    def far(self, most: int) -> Iterator[int]:
        """Tokens of each step of a longest sequence, in chunks of at most `most`."""
        for start in range(0, len(self.ids["far"]), most):
            yield min(most, len(self.ids["far"]) - start)


class Expected:
    """The reference's log-probs of sequences, computed once for each."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._known: dict[tuple[int, ...], Tensor] = {}
        if isinstance(reference, nn.Module):
            reference.eval()

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """float32 [n, V]."""
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = self.fresh(ids)
        return self._known[key]

    @torch.inference_mode()
    def fresh(self, ids: Sequence[int]) -> Tensor:
        """Computed anew: the weights of the reference may have changed."""
        with during("the reference"):
            found = self.reference(torch.tensor([list(ids)]))
            logits = found if isinstance(found, Tensor) else found.logits
            log_probs: Tensor = logits.reshape(len(ids), -1).float().log_softmax(-1)
            return log_probs
