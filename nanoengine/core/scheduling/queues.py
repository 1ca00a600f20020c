"""Which requests wait, which run, and in which slot: two queues in the policy's order, and the device tables' slots."""

from __future__ import annotations

from bisect import bisect_left, insort

from nanoengine.api.errors import RequestError
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.messages import EngineStats, Preemption, SchedulerConfig
from nanoengine.core.scheduling.policy import Policy
from nanoengine.core.scheduling.speculation import Speculation


class Roster:
    """The live requests. It moves them between two queues, gives them slots, and takes back what they own.

    Attributes:
        waiting, running: sorted by the policy's keys.
        free_slots: a slot freed is the next to be used again. owners: by slot, of those that are not free: a
            request and its generation in the slot.
        retry_alone: requests whose step broke: each runs in a step of its own until it has drawn a token.
        unsent: running requests whose slot on the device must be written anew, whole.
        preempted: since the last step.
    """

    def __init__(
        self,
        num_slots: int,
        policy: Policy,
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
        self._stats, self._speculation = stats, speculation
        self._added = self._admissions = 0

    def add(self, request: Request) -> None:
        request.order = self._added
        self._added += 1
        self._enqueue(request)

    def preempt(self, victim: Request, why: str) -> None:
        """Its blocks and slot go; what it has in flight is appended at commit, and it waits for that."""
        self.preempted.append(Preemption(victim.id, victim.slot, victim.num_computed, why))
        self._release(victim)
        self._enqueue(victim)
        self._stats.preemptions += 1

    def unseat(self, request: Request) -> None:
        """Back to its place in the queue, as if it had not been admitted."""
        self._stats.uncount_admission(request)
        self._release(request)
        request.generation -= 2  # one of `seat`, one of `_release`: no step has rows of either
        self._enqueue(request)

    def remove(self, request: Request) -> None:
        """It is live no more."""
        self._release(request)
        self.retry_alone.discard(request)
        if self._speculation is not None:
            self._speculation.end(request)

    def _enqueue(self, request: Request) -> None:
        request.status = Status.WAITING
        insort(self.waiting, request, key=self.policy.waiting_key)

    def seat(self, request: Request) -> None:
        """Waiting -> running in a slot."""
        self._dequeue(request)
        request.status = Status.RUNNING
        request.slot = self.free_slots.pop()
        request.generation += 1
        request.admission = self._admissions
        self._admissions += 1
        self.owners[request.slot] = (request, request.generation)
        insort(self.running, request, key=self.policy.running_key)

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
        """The running requests in policy order, except that `first`'s tier begins with it and goes round."""
        if first.status is not Status.RUNNING:
            return self.running.copy()
        tier, at = self.policy.tier(first), self.running.index(first)
        turned = self.running[at:] + self.running[:at]
        return sorted(turned, key=lambda r: (self.policy.tier(r) > tier) - (self.policy.tier(r) < tier))

    def _dequeue(self, request: Request) -> None:
        key = self.policy.waiting_key
        at = bisect_left(self.waiting, key(request), key=key)
        assert self.waiting[at] is request, f"request {request.id} is not in the queue"
        del self.waiting[at]


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
