"""The interface of drafters: they guess the next tokens of a sample. Torch only in annotations.

The model draws a token at each position of the guess, and a guess counts only if it is the token that was drawn. So a
drafter changes the speed of a sample, never its tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterContext:
    """What a drafter may need to know about its engine.

    Attributes:
        tokens: the most drafts of a row, as in the configuration.
        vocab_size: ids of drafts must be below it.
        max_model_len: most tokens of prompt and output together.
        max_slots: rows of the device tables.
        device: of the model, as torch names it: "cpu", "cuda:0".
    """

    tokens: int
    vocab_size: int
    max_model_len: int
    max_slots: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSample:
    """The sample that a host drafter is to continue.

    Attributes:
        request: id of its request. index: number of the sample in it (0 to n - 1). seed: of its draws.
        cache_key: samples with different keys (`cache_salt`) must not learn from each other: how quickly a sample
            comes would show what another one contains.
    """

    request: str
    index: int
    seed: int
    cache_key: bytes = b""


class DraftState(ABC):
    """What a host drafter keeps of one sample. It is made once, and used until the sample ends.

    An exception that a method raises ends this request alone.
    """

    @abstractmethod
    def feed(self, token_ids: Sequence[int]) -> None:
        """The next generated tokens of the sample, in order, each exactly once. Rejected drafts are not among them."""

    @abstractmethod
    def draft(self, most: int) -> Sequence[int]:
        """At most `most` ids that may follow the tokens fed so far; empty: no guess. Looks, does not advance.

        It may be called several times between two feeds, or not at all.
        """

    def end(self) -> None:  # noqa: B027 - most states need nothing
        """The sample has ended; no method is called after this one. All its tokens were fed."""


class HostDrafter(ABC):
    """Base class of drafters on the host. One instance per engine, in the process that schedules.

    Its drafts need the newest token on the host, so a row with drafts does not run ahead.
    """

    def __init__(self, ctx: DrafterContext, params: Any) -> None:
        """`params`: an instance of `DrafterSpec.params`, with the values of the configuration."""
        self.ctx = ctx
        self.params = params

    @abstractmethod
    def start(self, prompt_token_ids: Sequence[int], sample: DraftSample) -> DraftState:
        """A state for a new sample, made before its first draft. `feed` brings all its generated tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftStep:
    """The R rows of a step for which a device drafter is asked, after the step's tokens were accepted.

    Attributes:
        slots: int64 [R]; each row's place in the device tables.
        num_tokens: int64 [R]; known tokens of each row, which is the position of the next one.
        token_ids: int32 [max_slots, width]: the whole table; row r's tokens are token_ids[slots[r], :num_tokens[r]].
        seeds: int64 [R]. sample_index: int64 [R]. They and the position are the key of a draw.
    """

    slots: Tensor
    num_tokens: Tensor
    token_ids: Tensor
    seeds: Tensor
    sample_index: Tensor


class DeviceDrafter(ABC):
    """Base class of drafters on the device. One instance per rank; all ranks must make the same drafts.

    Its drafts never come to the host, so rows with drafts run ahead as others do.
    """

    def __init__(self, ctx: DrafterContext, params: Any) -> None:
        """`params`: an instance of `DrafterSpec.params`, with the values of the configuration."""
        self.ctx = ctx
        self.params = params

    @abstractmethod
    def draft(self, step: DraftStep) -> Tensor:
        """int32 [R, ctx.tokens]: the ids that may follow, and -1 from the first position without a guess.

        No host synchronisation: no `.item()`, no `.cpu()`, no boolean indexing.
        """
