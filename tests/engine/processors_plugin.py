"""A one-file plugin with two processors: one that raises, and one whose columns a Python function makes per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nanoengine.api import (
    API_VERSION,
    ColumnSpec,
    HostState,
    LogitsProcessor,
    Phase,
    ProcessorParams,
    SamplerSpec,
    hookimpl,
)


@dataclass(frozen=True)
class ExplodeParams(ProcessorParams):
    columns: ClassVar[Mapping[str, ColumnSpec]] = {"explode": ColumnSpec(dtype="bool", default=False)}

    explode: bool = False


class Explode(LogitsProcessor):
    phase = Phase.MASK

    def apply(self, logits: Any, rows: Any) -> Any:
        if rows.column("explode").any():
            raise RuntimeError("the explode processor exploded")
        return logits


@dataclass(frozen=True)
class ForbidLastParams(ProcessorParams):
    """Forbids the last `forbid_last` tokens of the history, by a Python function that must see them."""

    columns: ClassVar[Mapping[str, ColumnSpec]] = {"forbidden": ColumnSpec(dtype="int32", ragged=True, default=0)}

    forbid_last: int = 0
    explode_at: int = 0  # raise when the history has this many tokens

    def pack(self, ctx: Any) -> Mapping[str, Any]:
        return {"forbidden": []}

    def start(self, prompt_token_ids: Sequence[int], ctx: Any) -> HostState:
        return LastTokens(self, list(prompt_token_ids))


@dataclass
class LastTokens(HostState):
    params: ForbidLastParams
    tokens: list[int]

    def feed(self, token_ids: Sequence[int]) -> None:
        self.tokens += token_ids

    def columns(self, drafts: Sequence[int]) -> Mapping[str, Any]:
        if self.params.forbid_last < 0:
            raise ValueError(f"cannot forbid {self.params.forbid_last} tokens")
        if self.params.explode_at and len(self.tokens) == self.params.explode_at:
            raise ValueError("exploded on the host")
        known = [self.tokens + list(drafts[:count]) for count in range(1 + len(drafts))]
        return {"forbidden": [tokens[-self.params.forbid_last :] for tokens in known]}


class ForbidLast(LogitsProcessor):
    phase = Phase.MASK

    def apply(self, logits: Any, rows: Any) -> Any:
        column = rows.ragged("forbidden")
        ids = column.values.long()
        past = ids.new_tensor(range(ids.shape[1])) >= column.counts[:, None]
        kept = logits.gather(1, ids)
        first = logits[:, :1].clone()
        logits.scatter_(1, ids, kept.masked_fill(~past, float("-inf")))
        # padding stands for id 0: give it back unless it is really forbidden
        zero = ((ids == 0) & ~past).any(1, keepdim=True)
        logits[:, :1] = first.masked_fill(zero, float("-inf"))
        return logits


@hookimpl
def register_samplers() -> list[SamplerSpec]:
    here = __name__
    return [
        SamplerSpec(name="explode", params=ExplodeParams, target=f"{here}:Explode", api=API_VERSION),
        SamplerSpec(name="forbid_last", params=ForbidLastParams, target=f"{here}:ForbidLast", api=API_VERSION),
    ]
