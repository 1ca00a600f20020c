"""The interface of logits processors. Torch only in annotations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from nanoengine.api.errors import PluginError, nearest
from nanoengine.api.processor_params import Phase

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Need(StrEnum):
    """History that the core keeps on the device for a processor.

    OUTPUT_COUNTS: how often each id was generated. PROMPT_MASK: which ids are in the prompt. TOKEN_IDS: the tokens.
    """

    OUTPUT_COUNTS = "output_counts"
    PROMPT_MASK = "prompt_mask"
    TOKEN_IDS = "token_ids"


@dataclass(frozen=True, slots=True)
class RaggedColumn:
    """Several values per row. `values`: [R, width], padded with the default; `counts`: int32 [R], values per row."""

    values: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class ProcessorRows:
    """The data that belongs to R rows of logits, on the device.

    Attributes:
        slots: int64 [R]; each request's row in the device tables.
        positions: int64 [R]; absolute position of the token to be drawn, which is the number of tokens so far.
        prompt_lens: int64 [R].
        vocab_start: global id of logits column 0 (the start of a shard; 0 for gathered logits).
        vocab_size: size of the whole vocabulary.
        columns: this processor's columns: [R] each, or a `RaggedColumn`. Rows that do not use it have defaults.
        output_counts: int32 [R, columns of logits], with `Need.OUTPUT_COUNTS`.
        prompt_mask: bool [R, columns of logits], with `Need.PROMPT_MASK`.
        token_ids: int32 [slots, max_model_len + 1], with `Need.TOKEN_IDS`: the whole table; index it by `slots`.
    """

    slots: Tensor
    positions: Tensor
    prompt_lens: Tensor
    vocab_start: int
    vocab_size: int
    columns: Mapping[str, Tensor | RaggedColumn]
    output_counts: Tensor | None = None
    prompt_mask: Tensor | None = None
    token_ids: Tensor | None = None

    def column(self, name: str) -> Tensor:
        """The scalar column `name`, [R]. Raises `PluginError` if the processor has no such column."""
        found = self.columns.get(name)
        if found is None or isinstance(found, RaggedColumn):
            raise self._refusal(name)
        return found

    def ragged(self, name: str) -> RaggedColumn:
        """The ragged column `name`. Raises `PluginError` if the processor has no such column."""
        found = self.columns.get(name)
        if not isinstance(found, RaggedColumn):
            raise self._refusal(name)
        return found

    def _refusal(self, name: str) -> PluginError:
        if name not in self.columns:
            return PluginError(f"the processor's parameters declare no column {name!r}; {nearest(name, self.columns)}")
        reader = "ragged" if isinstance(self.columns[name], RaggedColumn) else "column"
        return PluginError(f"column {name!r} must be read by rows.{reader}({name!r})")


@dataclass(frozen=True, slots=True)
class ProcessorContext:
    """Sizes for the buffers of a processor."""

    max_slots: int
    vocab_size: int
    max_model_len: int
    device: torch.device


class LogitsProcessor(ABC):
    """Base class of logits processors. One instance per rank.

    Class attributes:
        phase: when it runs.
        needs: the history that it reads.
        argmax_invariant: True if it never changes which token is the likeliest. Greedy rows then skip it, unless a
            processor behind it may change that.
        sharded: True if it works on a shard of the vocabulary; otherwise the core gathers the logits first.
    """

    phase: ClassVar[Phase]
    needs: ClassVar[frozenset[Need]] = frozenset()
    argmax_invariant: ClassVar[bool] = False
    sharded: ClassVar[bool] = False

    def __init__(self, ctx: ProcessorContext) -> None:  # noqa: B027 - most processors need no buffers
        """Make buffers here, once, if the processor needs any."""

    @abstractmethod
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        """float32 [R, V] -> float32 [R, V]; may write in place. Rows with defaults must not change.

        No host synchronisation: no `.item()`, no `.cpu()`, no boolean indexing. -inf removes a token.
        """
