"""Which requests wait, which run, and in which slot: two queues in the policy's order, and the device tables' slots."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import accumulate
from operator import attrgetter
from typing import Any

from nanoengine.api.errors import RequestError
from nanoengine.api.policies import QueuedRequest
from nanoengine.api.policy_checks import CheckedPolicy
from nanoengine.api.stats import EngineStats
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.messages import Preemption, SchedulerConfig
from nanoengine.core.scheduling.speculation import Speculation

MOST_TOGETHER, MOST_HELD = 8, 8  # prompts that enter together (see `places`), and steps that they wait for each other
_PLACE, _RANK = attrgetter("place"), attrgetter("rank")


class Roster:
    """The live requests. It moves them between two queues, gives them slots, and takes back what they own.

    Attributes:
        waiting, running: sorted by the policy's keys, which are asked for once and kept in the requests.
        free_slots: a slot freed is the next to be used again. owners: by slot, of those that are not free: a
            request and its generation in the slot.
        retry_alone: requests whose step broke: each runs in a step of its own until it has drawn a token.
        unsent: running requests whose slot on the device must be written anew, whole.
        preempted: since the last step. failed: what the policy raised about live requests, until the next step.
    """

    def __init__(
        self,
        num_slots: int,
        policy: CheckedPolicy,
        blocks: BlockManager,
        stats: EngineStats,
        speculation: Speculation | None = None,
    ) -> None:
        self.num_slots, self.policy, self.blocks = num_slots, policy, blocks
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.free_slots = list(range(num_slots - 1, -1, -1))
        self.owners: dict[int, tuple[Request, int]] = {}
        self.retry_alone: set[Request] = set()
        self.unsent: set[Request] = set()
        self.preempted: list[Preemption] = []
        self.failed: dict[Request, RequestError] = {}
        self._stats, self._speculation = stats, speculation
        self._added = self._admissions = self._held = 0

    def add(self, request: Request) -> None:
        """Raises `RequestError` where the policy does."""
        request.order = self._added
        self._added += 1
        request.queued = QueuedRequest(
            id=request.id,
            client=request.client,
            priority=request.priority,
            arrival=request.arrival,
            num_prompt_tokens=request.prompt_len,
            max_tokens=request.max_len - request.prompt_len,
        )
        request.place = (*self.policy.waiting_key(request.queued), request.arrival, request.order)
        self._enqueue(request)

    def next(self) -> int:
        """Where in the queue the policy goes on admitting."""
        try:
            key = self.policy.next_key() if self.policy.picks and self.waiting else ()
        except RequestError as error:
            self.failed[self.waiting[0]] = error
            return 0
        at = bisect_left(self.waiting, key, key=_PLACE)
        return at if at < len(self.waiting) else 0

    def places(self, config: SchedulerConfig, ending: int) -> int:
        """How many requests may be admitted now. ending: running ones that get no row any more.

        Where nearly all places are taken and more requests wait than there are free ones, prompts wait for each other
        and enter together: the tokens of larger steps take less time each."""
        free, least = config.max_num_seqs - len(self.running) + ending, config.prompts_together
        most = min(MOST_TOGETHER, config.max_num_seqs // 16)
        if not least or most < 2 or not 0 < free <= config.max_num_seqs // 4 or free >= len(self.waiting):
            return free
        tokens = accumulate(request.num_tokens for request in self.waiting[: min(free, most)])
        enough = next((count for count, total in enumerate(tokens, 1) if total >= least), 0)
        self._held += 1
        if not enough and free < most and self._held <= MOST_HELD:
            return 0
        self._held = 0
        return enough or min(free, most)

    def tell(self, event: Callable[..., None], request: Request, *about: Any) -> None:
        """An event of the policy. What it raises fails the request, at the next step: here nothing may be raised."""
        try:
            if self.policy.hears:
                event(request.queued, *about)
        except RequestError as error:
            if request.status is not Status.FINISHED:
                self.failed[request] = error

    def preempt(self, victim: Request, why: str) -> None:
        """Its blocks and slot go; what it has in flight is appended at commit, and it waits for that."""
        self.preempted.append(Preemption(victim.id, victim.slot, victim.num_computed, why))
        self._release(victim)
        self._enqueue(victim, returned=True)
        self._stats.preemptions += 1

    def unseat(self, request: Request) -> None:
        """Back to its place in the queue, as if it had not been admitted."""
        self._count(request, -1)
        self._release(request)
        request.generation -= 2  # one of `seat`, one of `_release`: no step has rows of either
        self._enqueue(request, returned=True)

    def remove(self, request: Request) -> None:
        """It is live no more."""
        self._release(request)
        self.failed.pop(request, None)
        self.retry_alone.discard(request)
        if self._speculation is not None:
            self._speculation.end(request)

    def _enqueue(self, request: Request, *, returned: bool = False) -> None:
        request.status = Status.WAITING
        insort(self.waiting, request, key=_PLACE)
        self.tell(self.policy.queued, request, returned)

    def seat(self, request: Request) -> None:
        """Waiting -> running in a slot, with the blocks that it was given. Raises `RequestError` where the policy
        does."""
        request.rank = (*self.policy.running_key(request.queued), self._admissions)
        self._dequeue(request)
        request.status = Status.RUNNING
        request.slot = self.free_slots.pop()
        request.generation += 1
        request.admission = self._admissions
        self._admissions += 1
        self.owners[request.slot] = (request, request.generation)
        insort(self.running, request, key=_RANK)
        self._count(request, 1)
        if self.policy.counts and not request.billed:
            request.billed = True
            self.tell(self.policy.served, request, request.num_tokens - request.capacity, 0)

    def _count(self, request: Request, times: int) -> None:
        """An admission; -1 times: it did not take place. Its first blocks are those that the prefix cache held."""
        if request.generation == 1:
            request.num_cached = request.borrowed if times > 0 else None
            self._stats.prompt_tokens += times * request.num_tokens
            self._stats.prefix_hit_tokens += times * request.borrowed
        else:
            self._stats.resumed_hit_tokens += times * request.borrowed

    def _release(self, request: Request) -> None:
        """It owns nothing and is in no queue from here on. Slot and blocks may be reused at once: one stream orders the
        writes."""
        self.blocks.release(request)
        self.unsent.discard(request)
        request.num_computed = request.pick_check_at = request.commit_check_at = 0
        if request.status is Status.RUNNING:
            self.running.remove(request)
            del self.owners[request.slot]
            self.free_slots.append(request.slot)
            request.slot = -1
            request.generation += 1
        else:
            self._dequeue(request)
        request.status = Status.FINISHED

    def service_order(self, first: Request) -> list[Request]:
        """The running requests in policy order, except that `first`'s tier (those with the same first item of the rank)
        begins with it and goes round."""
        if first.status is not Status.RUNNING:
            return self.running.copy()
        at = self.running.index(first)
        return sorted(self.running[at:] + self.running[:at], key=lambda r: r.rank[0])

    def _dequeue(self, request: Request) -> None:
        at = bisect_left(self.waiting, request.place, key=_PLACE)
        assert self.waiting[at] is request, f"request {request.id} is not in the queue"
        del self.waiting[at]
        self.tell(self.policy.left, request)


def refuse_misfit(request: Request, config: SchedulerConfig, blocks: BlockManager) -> None:
    """Raises `RequestError`, with the numbers, where the request could never run."""
    num_prompt, most = request.prompt_len, config.max_num_batched_tokens
    longest = config.max_model_len - (request.params.pooling is None)
    assert 0 < num_prompt <= longest, "the input processor refuses such a prompt"
    if config.whole_prompts and request.params.max_tokens != 1:
        text = f"this model's attention looks ahead: a request needs max_tokens=1, not {request.params.max_tokens}"
        raise RequestError("not_supported", text)
    if config.whole_prompts and num_prompt > most:
        text = f"the prompt's {num_prompt} tokens must run in one step, which has {most}: raise max_num_batched_tokens"
        raise RequestError("does_not_fit", text)
    need, have = blocks.blocks_for(request.num_tokens), blocks.num_blocks
    if need > have:
        more = f" and the {request.num_tokens - num_prompt} generated ones" if request.output_token_ids else ""
        raise RequestError(
            "does_not_fit",
            f"the prompt's {num_prompt} tokens{more} need {need} KV blocks of {blocks.block_size} and the cache has "
            f"{have}: shorten the prompt or give the KV cache more memory",
        )
