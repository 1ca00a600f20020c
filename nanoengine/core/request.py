"""A request as the scheduler has it: one `Request` for each of its samples. What a client gets is in `outputs.py`."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanoengine.api.deltas import Float32
    from nanoengine.api.policies import Key, QueuedRequest
    from nanoengine.core.scheduling.block_manager import Run
    from nanoengine.params.host_states import BoundState
    from nanoengine.params.resolver import ResolvedParams


def int32_bytes(token_ids: Sequence[int]) -> bytes:
    return array("i", token_ids).tobytes()


class Status(Enum):
    WAITING = "waiting"  # never ran, or preempted: it has no slot and no blocks
    RUNNING = "running"  # owns a slot and blocks
    FINISHED = "finished"


@dataclass(eq=False, slots=True, kw_only=True)
class Request:
    """One sample of a request (with n samples there are n of these). Mutable; not for plugins.

    The words: *known* tokens are on the host; a sampled token whose step was launched but not committed is *in flight*;
    `length` counts both. `num_computed` counts tokens whose KV is written by launched steps: a request decodes once
    that is all but the last one. While a row with drafts is in flight both are upper bounds, as if each draft were
    right; commit takes back what was too much. Only the scheduler and the block manager change a request. What their
    loops read for each row of each step are plain fields.
    """

    id: str
    parent: str  # id of the request that it is a sample of
    prompt_token_ids: Sequence[int]
    params: ResolvedParams
    seed: int
    sample_index: int
    arrival: int  # running number of its request: lower came earlier
    priority: int = 0
    client: str = ""
    max_len: int = 0  # tokens at which it ends by length
    cache_key: bytes = b""  # extra key of the prefix index, of cache_salt

    status: Status = Status.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    slot: int = -1
    generation: int = 0  # raised at each admission and release: a row of an earlier one is not its own any more
    num_computed: int = 0
    num_cached: int | None = None  # prefix-cache hit of the first admission, in tokens

    # Derived once.
    prompt_len: int = field(init=False)
    min_len: int = field(init=False)  # tokens before which no stop token counts; 0 without min_tokens
    stop_set: frozenset[int] = field(init=False)
    drafted: bool = False  # its rows may have drafts, which a drafter makes from all its tokens
    prompt_bytes: bytes = b""  # int32, native order: what the prefix index hashes and compares; made where not given

    # Of its logits processors.
    host_states: list[BoundState] = field(default_factory=list)
    forced: Sequence[int] = ()  # what must follow the newest row that draws: the drafts of the next one
    jumps: bool = False  # the drafts of its newest row are forced ones

    # The scheduler's.
    length: int = field(init=False)  # tokens, those in flight included
    pick_check_at: int = 0  # below this `length` its next row is one more token, and nothing else is to be done
    commit_check_at: int = 0  # below so many output tokens a new one is appended, if it does not stop: likewise
    report_at: int = 0  # below so many output tokens a new one is not reported to the client yet
    prompt_done: int = 0  # prompt tokens whose KV committed steps have written
    order: int = 0  # running number of its add(): breaks ties of `arrival`
    admission: int = 0  # running number of its last admission
    queued: QueuedRequest = field(init=False)  # what the policy sees of it
    place: Key = ()  # in the queue, for as long as it lives
    rank: Key = ()  # among the running requests, of this admission
    billed: bool = False  # the policy knows that its prompt was computed
    last_prefill: int = -1  # the last launched step that holds a prefill row of it
    length_reason: str | None = None  # stop_reason when it ends by length
    borrowed: int = 0  # tokens of its KV that other requests computed, of this admission
    void_generation: int = -1  # whose results do not count: it read KV of others, and its logits were not finite
    prompt_logprobs_done: int = 1  # prompt positions before it have their log-probs delivered
    pooled: Float32 | None = None  # of its committed chunks, the sum of the hidden states, if it pools

    # The block manager's.
    block_ids: list[list[int]] = field(default_factory=list)  # [group][block]; empty while it owns none
    capacity: int = 0  # tokens its blocks hold
    block_hashes: list[bytes] = field(default_factory=list)  # hash chain of full blocks, grown as tokens come
    publish_at: int = sys.maxsize  # computed tokens at which its next block is full and may be published
    chain: list[int | bytes] = field(default_factory=list)  # [group] identity of the last published block
    found: list[Run] = field(default_factory=list)  # [group] the prefix hits that were found while it waits

    def __post_init__(self) -> None:
        self.prompt_len = len(self.prompt_token_ids)
        self.length = self.num_tokens
        self.min_len = self.prompt_len + self.params.min_tokens if self.params.min_tokens else 0
        self.stop_set = self.params.stop_set
        self.prompt_bytes = self.prompt_bytes or int32_bytes(self.prompt_token_ids)

    @property
    def token_ids(self) -> list[int]:
        return [*self.prompt_token_ids, *self.output_token_ids]

    @property
    def num_tokens(self) -> int:
        """Known tokens."""
        return self.prompt_len + len(self.output_token_ids)

    @property
    def num_in_flight(self) -> int:
        """Sampled tokens not yet committed."""
        return self.length - self.num_tokens

    @property
    def may_read_cache(self) -> bool:
        """Prompt log-probs need every prompt position computed, until all are delivered, and so does a mean of hidden
        states; and no request is broken twice by what another one computed."""
        all_delivered = self.params.prompt_logprobs is None or self.prompt_logprobs_done >= self.prompt_len
        return all_delivered and self.params.pooling != "mean" and self.void_generation < 0

    def unbook(self, num_tokens: int, drawn: int) -> None:
        """Takes its newest row back: so many tokens are not computed, and so many that it might have drawn are not."""
        self.num_computed -= num_tokens
        self.length -= drawn
        self.pick_check_at = 0
