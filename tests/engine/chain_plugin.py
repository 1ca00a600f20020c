"""A one-file plugin whose processor allows only ids that all tokens so far decide: a token that a state missed, got
twice or got late changes every one behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from nanoengine.api import (
    API_VERSION,
    ColumnSpec,
    HostState,
    LogitsProcessor,
    Phase,
    ProcessorParams,
    SamplerSpec,
    StandardOp,
    hookimpl,
)


def hashed(tokens: Sequence[int], start: int = 7) -> int:
    for token in tokens:
        start = (start * 31 + token + 1) % 1_000_003
    return start


def allowed(history: int, count: int, vocab_size: int) -> list[int]:
    """So many ids (fewer where some are equal) after a history with this hash."""
    return sorted({(history * (2 * i + 3) + i) % vocab_size for i in range(count)})


def chain_at(history: int, chain: int) -> int:
    """How many ids are possible; with a negative number one of them in five of six places."""
    return chain if chain >= 0 else 1 if history % 6 else -chain


def bits(ids: Sequence[int], vocab_size: int) -> np.ndarray[Any, Any]:
    flags = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    flags[list(ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


@dataclass(frozen=True)
class ChainParams(ProcessorParams):
    """chain: how many ids are possible. ahead: how many tokens the state looks ahead for forced ones. wrong: what goes
    wrong once `wrong_at` tokens were generated."""

    columns: ClassVar[Mapping[str, ColumnSpec]] = {"mask": ColumnSpec(dtype="int32", default=-1, op=StandardOp.BITMASK)}

    chain: int = 0
    ahead: int = 0
    wrong: str = ""
    wrong_at: int = 0

    def start(self, prompt_token_ids: Sequence[int], ctx: Any) -> Any:
        if self.wrong == "start":
            raise ValueError("wrong in start")
        if self.wrong == "state":
            return "no state"
        return Chain(self, prompt_token_ids, ctx.vocab_size)


class Chain(HostState):
    def __init__(self, params: ChainParams, prompt: Sequence[int], vocab_size: int) -> None:
        self.params, self.vocab_size = params, vocab_size
        self.history, self.length = hashed(prompt), 0

    def feed(self, token_ids: Sequence[int]) -> None:
        assert token_ids, "fed nothing"
        self.history = hashed(token_ids, self.history)
        self.length += len(token_ids)
        if self.params.wrong == "feed" and self.length >= self.params.wrong_at:
            raise ValueError("wrong in feed")

    def columns(self, drafts: Sequence[int]) -> Any:
        histories = [hashed(drafts[:count], self.history) for count in range(1 + len(drafts))]
        counts = [chain_at(h, self.params.chain) for h in histories]
        masks = np.stack(
            [bits(allowed(*each, self.vocab_size), self.vocab_size) for each in zip(histories, counts, strict=True)]
        )
        if self.params.wrong not in ("", "feed", "forced", "lies", "outside") and self.length >= self.params.wrong_at:
            return self.wrong(masks)
        return {"mask": masks}

    def forced(self) -> Sequence[int]:
        wrong = self.params.wrong if self.length >= self.params.wrong_at else ""
        if wrong == "forced":
            raise ValueError("wrong in forced")
        found, history = list[int](), self.history
        while len(found) < self.params.ahead:
            ids = allowed(history, chain_at(history, self.params.chain), self.vocab_size)
            if len(ids) > 1:
                break
            found += [(ids[0] + (wrong == "lies")) % self.vocab_size]
            history = hashed(ids, history)
        return [self.vocab_size] * len(found) if wrong == "outside" else found

    def wrong(self, masks: np.ndarray[Any, Any]) -> Any:
        wrong: Mapping[str, Any] = {
            "shape": {"mask": masks[:, :-1]},
            "more": {"mask": np.concatenate([masks, masks])},
            "flat": {"mask": masks[0]},
            "dtype": {"mask": [[0.5] * masks.shape[1]] * len(masks)},
            "large": {"mask": masks.astype(np.int64) + (1 << 40)},
            "column": {"msak": masks},
            "mapping": masks,
            "nothing": {"mask": np.zeros_like(masks)},
        }
        if self.params.wrong not in wrong:
            raise ValueError(f"wrong in {self.params.wrong}")
        return wrong[self.params.wrong]


def one_by_one(states: Sequence[Chain], token_ids: Sequence[Sequence[int]], out: Mapping[str, Any]) -> Any:
    """As `HostState.columns_together` must."""
    failed = dict[int, BaseException]()
    for i, (state, new) in enumerate(zip(states, token_ids, strict=True)):
        try:
            if new:
                state.feed(new)
            out["mask"][i] = state.columns([])["mask"][0]
        except ValueError as error:
            failed[i] = error
    return failed


class MaskProcessor(LogitsProcessor):
    phase = Phase.MASK
    sharded = True

    def apply(self, logits: Any, rows: Any) -> Any:
        from nanoengine.kernels.bitmask import mask_bits_

        return mask_bits_(logits, rows.column("mask"), rows.vocab_start)


@dataclass(frozen=True)
class PairParams(ProcessorParams):
    """Forbids two ids: `pair`, or with `pair_walks` those behind the newest token."""

    columns: ClassVar[Mapping[str, ColumnSpec]] = {"ids": ColumnSpec(dtype="int32", default=-1, width=2)}

    pair: tuple[int, int] = (-1, -1)
    pair_walks: bool = False

    def pack(self, ctx: Any) -> Mapping[str, Any]:
        return {"ids": self.pair}

    def start(self, prompt_token_ids: Sequence[int], ctx: Any) -> HostState | None:
        return PairState(prompt_token_ids[-1], ctx.vocab_size) if self.pair_walks else None


class PairState(HostState):
    def __init__(self, newest: int, vocab_size: int) -> None:
        self.newest, self.vocab_size = newest, vocab_size

    def feed(self, token_ids: Sequence[int]) -> None:
        self.newest = token_ids[-1]

    def columns(self, drafts: Sequence[int]) -> Mapping[str, Any]:
        return {"ids": [pair_behind(token, self.vocab_size) for token in (self.newest, *drafts)]}


def pair_behind(token: int, vocab_size: int) -> tuple[int, int]:
    return (token + 1) % vocab_size, (token * 3) % vocab_size


class Pair(LogitsProcessor):
    phase = Phase.MASK

    def apply(self, logits: Any, rows: Any) -> Any:
        ids = rows.column("ids")
        kept = logits.gather(1, ids.clamp(min=0).long())
        return logits.scatter(1, ids.clamp(min=0).long(), kept.masked_fill(ids >= 0, float("-inf")))


@hookimpl
def register_samplers() -> list[SamplerSpec]:
    return [
        SamplerSpec(name="chain", params=ChainParams, target=f"{__name__}:MaskProcessor", api=API_VERSION),
        SamplerSpec(name="pair", params=PairParams, target=f"{__name__}:Pair", api=API_VERSION),
    ]
