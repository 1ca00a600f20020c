"""The sampler-processor seam. Torch only in annotations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from nanoengine.api.errors import PluginError, nearest
from nanoengine.api.specs import Phase

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Need(StrEnum):
    """History a processor asks the core to keep on the device.

    OUTPUT_COUNTS: how often each id was generated. PROMPT_MASK: which ids the prompt holds. TOKEN_IDS: the tokens
    themselves.
    """

    OUTPUT_COUNTS = "output_counts"
    PROMPT_MASK = "prompt_mask"
    TOKEN_IDS = "token_ids"


@dataclass(frozen=True, slots=True)
class RaggedColumn:
    """values: [R, width], the default behind each row's end; counts: int32 [R]."""

    values: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class ProcessorRows:
    """R rows of logits and what belongs to them, on the device.

    Attributes:
        slots: int64 [R]. positions: int64 [R]; absolute position of the token to be drawn (= tokens so far).
        prompt_lens: int64 [R].
        vocab_start: global id of logits column 0 (a shard's start; 0 for gathered logits).
        vocab_size: the whole vocabulary.
        columns: this processor's columns, each [R], or `RaggedColumn`. A row that does not want it holds defaults.
        output_counts: int32 [R, columns of logits], if asked for. prompt_mask: bool [R, columns of logits], if asked.
        token_ids: int32 [slots, max_model_len + 1], the whole table, if asked: index it by `slots`.
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
        """A scalar column, [R]. Raises `PluginError` where the processor has none of that name."""
        found = self.columns.get(name)
        if found is None or isinstance(found, RaggedColumn):
            raise self._refusal(name)
        return found

    def ragged(self, name: str) -> RaggedColumn:
        """A ragged column. Raises as `column` does."""
        found = self.columns.get(name)
        if not isinstance(found, RaggedColumn):
            raise self._refusal(name)
        return found

    def _refusal(self, name: str) -> PluginError:
        if name not in self.columns:
            return PluginError(f"the processor's parameters declare no column {name!r}; {nearest(name, self.columns)}")
        reader = "ragged" if isinstance(self.columns[name], RaggedColumn) else "column"
        return PluginError(f"column {name!r} is read by rows.{reader}({name!r})")


@dataclass(frozen=True, slots=True)
class ProcessorContext:
    """What a processor may size its own buffers by."""

    max_slots: int
    vocab_size: int
    max_model_len: int
    device: torch.device


class LogitsProcessor(ABC):
    """A step of logits processing.

    Class attributes:
        phase: when it runs.
        needs: history it reads.
        argmax_invariant: it never changes which token is the likeliest, so greedy rows skip it.
        sharded: it works on a vocabulary shard; otherwise the core gathers the logits first.
    """

    phase: ClassVar[Phase]
    needs: ClassVar[frozenset[Need]] = frozenset()
    argmax_invariant: ClassVar[bool] = False
    sharded: ClassVar[bool] = False

    def __init__(self, ctx: ProcessorContext) -> None:  # noqa: B027 - most processors keep nothing
        """Make buffers here, once, if the processor needs any."""

    @abstractmethod
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        """[R, V] float32 -> [R, V] float32; may write in place. Rows that hold defaults must come out unchanged.

        No host synchronisation: no `.item()`, no `.cpu()`, no boolean indexing. -inf removes a token.
        """
