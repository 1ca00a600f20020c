"""A logits processor that forces the output: forced decoding through the real decode path.

The free outputs of two engines (or two dtypes) differ after the first near-tie, and the rest cannot be compared. With
`SamplingParams(forced=[...], temperature=0, logprobs=k)` every drawn token is the next forced one. The reported
log-probs are those of the raw logits, so they are the model's own, and errors can be measured at each position.

    from nanoengine.testing import forced
    llm = LLM(folder, plugins=[forced])
    llm.generate(prompt, SamplingParams(forced=answer, max_tokens=len(answer), temperature=0, logprobs=5))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nanoengine.api import (
    API_VERSION,
    ColumnSpec,
    LogitsProcessor,
    ParamsContext,
    ParamsError,
    Phase,
    ProcessorParams,
    ProcessorRows,
    SamplerSpec,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ForcedParams(ProcessorParams):
    """forced: the tokens of the output. After them, sampling is free."""

    forced: tuple[int, ...] | None = None

    columns: ClassVar[Mapping[str, ColumnSpec]] = {"ids": ColumnSpec(dtype="int32", ragged=True)}

    def active(self) -> bool:
        return bool(self.forced)

    def pack(self, ctx: ParamsContext) -> Mapping[str, Any]:
        ids = list(self.forced or ())
        for token_id in ids:
            if not 0 <= token_id < ctx.vocab_size:
                raise ParamsError(
                    f"forced: no such token id: {token_id}; this model's ids are 0 to {ctx.vocab_size - 1}"
                )
        return {"ids": ids}


class Forced(LogitsProcessor):
    """Removes all tokens except the next forced one. Runs as a mask, before biases and penalties."""

    phase = Phase.MASK

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        column = rows.ragged("ids")
        nth = rows.positions - rows.prompt_lens  # [R], index of the output token to be drawn
        at = nth.clamp(max=column.values.shape[1] - 1)[:, None]
        token = column.values.gather(1, at).long()  # [R, 1]
        dictated = (nth < column.counts)[:, None]
        only = logits.new_full(logits.shape, float("-inf")).scatter_(1, token, 0.0)
        return only.where(dictated, logits)


@hookimpl
def register_samplers() -> list[SamplerSpec]:
    return [SamplerSpec(name="forced", params=ForcedParams, target=f"{__name__}:Forced", api=API_VERSION)]
