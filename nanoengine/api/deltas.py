"""What the engine reports of a request while it runs: its new tokens. Who asked makes text and outputs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from nanoengine.api.errors import RequestError

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
FinishReason = Literal["stop", "length", "abort"]
Pooling = Literal["mean", "last"]
"""Of the hidden states of a prompt's tokens, after the model's last norm: their mean, or the last one."""


def _i32(values: Any = ()) -> Int32:
    return np.asarray(values, dtype=np.int32)


def _f32(values: Any = ()) -> Float32:
    return np.asarray(values, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobRows:
    """Log-probs at N positions, of the raw logits (before any logits processor).

    Attributes:
        rows: int32 [N]; the plan's row each belongs to. positions: int32 [N]; absolute position of the token whose
            log-prob this is.
        token_ids: int32 [N]; that token. logprobs: float32 [N]. ranks: int32 [N]; 1 + tokens strictly likelier.
        top_ids: int32, flat, best first; top_logprobs: float32, flat; top_offsets: int32 [N + 1].
    """

    rows: Int32 = field(default_factory=_i32)
    positions: Int32 = field(default_factory=_i32)
    token_ids: Int32 = field(default_factory=_i32)
    logprobs: Float32 = field(default_factory=_f32)
    ranks: Int32 = field(default_factory=_i32)
    top_ids: Int32 = field(default_factory=_i32)
    top_logprobs: Float32 = field(default_factory=_f32)
    top_offsets: Int32 = field(default_factory=lambda: _i32([0]))

    def part(self, start: int, end: int) -> LogprobRows:
        """The entries [start, end)."""
        if start == 0 and end == len(self.rows):
            return self
        offsets, these = self.top_offsets[start : end + 1], slice(start, end)
        tops = slice(offsets[0], offsets[-1])
        return LogprobRows(
            rows=self.rows[these],
            positions=self.positions[these],
            token_ids=self.token_ids[these],
            logprobs=self.logprobs[these],
            ranks=self.ranks[these],
            top_ids=self.top_ids[tops],
            top_logprobs=self.top_logprobs[tops],
            top_offsets=offsets - offsets[0],
        )


def join_rows(parts: Sequence[LogprobRows]) -> LogprobRows | None:
    """The entries of all parts, one behind the other; None of no parts."""
    if len(parts) < 2:
        return parts[0] if parts else None
    counts = np.concatenate([np.diff(part.top_offsets) for part in parts])
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    names = ("rows", "positions", "token_ids", "logprobs", "ranks", "top_ids", "top_logprobs")
    whole = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return LogprobRows(**whole, top_offsets=offsets)


class SampleDelta(NamedTuple):
    """What is new of one sample.

    Attributes:
        sample_index: which of the request's n samples.
        token_ids: new since its last delta, a stop token included.
        logprobs: of each of them; None where the request asked for none.
        finish_reason, stop_reason: set in its last delta. stop_reason is the id of a `stop_token_ids` hit, None for
            EOS, and "kv_cache_full" with "length" where a lone request outgrew the cache. A stop string ends a sample
            on the caller's side, which aborts it.
    """

    sample_index: int
    token_ids: tuple[int, ...] = ()
    logprobs: LogprobRows | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class RequestDelta(NamedTuple):
    """What is new of one request. One with `finished` or `error` is its last.

    Attributes:
        samples: those that have something new.
        prompt_logprobs: of the next prompt positions; the first token has none.
        num_cached_tokens: prompt tokens whose KV the prefix cache held.
        num_computed_tokens: prompt tokens that are computed so far: the progress of a long prompt.
        seed: of its draws: that of the parameters, or one that the engine made. None if it was refused.
        first_scheduled: seconds on the monotonic clock; None until it happens.
        pooled: float32 [hidden size] of a request that asked for pooling, in its last delta.
        error: why it was refused or failed.
    """

    request_id: str
    samples: tuple[SampleDelta, ...] = ()
    finished: bool = False
    prompt_logprobs: LogprobRows | None = None
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    seed: int | None = None
    first_scheduled: float | None = None
    pooled: Float32 | None = None
    error: RequestError | None = None
