"""A small engine around the scheduler and the mock runner, which checks every invariant after every step."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np

from nanoengine.api import Policy, PolicyParams
from nanoengine.api.errors import RequestError
from nanoengine.api.processor_params import ColumnSpec, HostState, ProcessorParams
from nanoengine.core.host_states import LastAsked, supplied_columns
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling import scheduler as scheduler_module
from nanoengine.core.scheduling.block_manager import BlockManager, Pool
from nanoengine.core.scheduling.commit import publish_prompts
from nanoengine.core.scheduling.draft import Draft
from nanoengine.core.scheduling.messages import ScheduledStep, SchedulerConfig, Update
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.step import ROW_BAD_LOGITS, ROW_FINE, StepPlan
from nanoengine.distributed.wire import decode, encode
from nanoengine.distributed.worker import SuppliedColumns
from nanoengine.params.host_states import start_states
from nanoengine.params.resolver import PackedProcessor, ResolvedParams
from nanoengine.plugins.policies.fair import Fair
from nanoengine.plugins.policies.fcfs import FCFS
from nanoengine.plugins.policies.params import FairParams
from nanoengine.plugins.policies.priority import Priority
from nanoengine.testing.invariants import check_blocks, check_scheduler
from nanoengine.testing.mock_runner import MockRunner, expected_tokens, expected_vector, fake_logprob
from nanoengine.testing.policies import checked_policy

VOCAB = 97
POLICIES: Mapping[str, Callable[[], Policy]] = {
    "fcfs": lambda: FCFS(PolicyParams()),
    "priority": lambda: Priority(PolicyParams()),
    "fair": lambda: Fair(FairParams(weights={"a": 2.0})),
}


@dataclass(frozen=True)
class ShiftParams(ProcessorParams):
    """A plain processor: adds `shift` to the mock's token."""

    columns: ClassVar[Mapping[str, ColumnSpec]] = {"shift": ColumnSpec(dtype="int32")}
    shift: int = 0


@dataclass(frozen=True)
class GrammarParams(ProcessorParams):
    """A processor with host state: its column depends on all tokens so far. Raises at `fail_at` outputs."""

    columns: ClassVar[Mapping[str, ColumnSpec]] = {"allowed": ColumnSpec(dtype="int32", ragged=True)}
    fail_at: int = -1
    forces: bool = True

    def start(self, prompt_token_ids: Sequence[int], ctx: Any) -> HostState:
        return GrammarState(self.fail_at, list(prompt_token_ids), self.forces)


class GrammarState(HostState):
    def __init__(self, fail_at: int, prompt: Sequence[int], forces: bool = True) -> None:
        self.fail_at, self.prompt, self.forces, self.outputs = fail_at, prompt, forces, list[int]()

    def feed(self, token_ids: Sequence[int]) -> None:
        assert token_ids, "fed nothing"
        self.outputs += token_ids

    def columns(self, drafts: Sequence[int]) -> Mapping[str, Any]:
        if len(self.outputs) == self.fail_at:
            raise ValueError("the grammar is stuck")
        known = [self.outputs + list(drafts[:count]) for count in range(1 + len(drafts))]
        return {"allowed": [grammar(self.prompt, outputs) for outputs in known]}

    def forced(self) -> Sequence[int]:
        """Mostly wrong: then its drafts are refused."""
        return [(sum(self.outputs) + i) % VOCAB for i in range(len(self.outputs) % 5 * self.forces)]


def grammar(prompt: Sequence[int], outputs: Sequence[int]) -> list[int]:
    return [sum(outputs) % 11, len(outputs), len(prompt)][: 1 + len(outputs) % 3]


def shift_processor(shift: int) -> PackedProcessor:
    return PackedProcessor("shift", ShiftParams(shift), {"shift": np.asarray(shift, dtype=np.int32)})


def grammar_processor(fail_at: int = -1, forces: bool = True) -> PackedProcessor:
    return PackedProcessor("grammar", GrammarParams(fail_at, forces), {})


class Guesses:
    """Drafts of requests: each token is right with a probability, else any. Now and then a row has none."""

    def __init__(self, tokens: int, accuracy: float, max_model_len: int, on_device: bool = False) -> None:
        self.tokens, self.accuracy, self.max_model_len = tokens, accuracy, max_model_len
        self.on_device = on_device  # the mock device has guesses of its own
        self.drafted = self.accepted = 0
        self.ended: set[Request] = set()

    def _rng(self, request: Request) -> random.Random:
        return random.Random(f"{request.id} {len(request.output_token_ids)}")

    def most(self, request: Request) -> int:
        return self._rng(request).randrange(self.tokens + 1)

    def propose(self, request: Request, most: int) -> Sequence[int]:
        if self.on_device:
            return [-1] * most
        rng, known = self._rng(request), len(request.output_token_ids)
        right = truth(request, self.max_model_len)[known : known + most]
        right += [rng.randrange(VOCAB) for _ in range(most - len(right))]
        return [token if rng.random() < self.accuracy else rng.randrange(VOCAB) for token in right]

    def committed(self, request: Request, drafted: int, accepted: int) -> None:
        assert 0 <= accepted <= drafted
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted

    def end(self, request: Request) -> None:
        assert request not in self.ended
        self.ended.add(request)


class Limits:
    """What parameters may look at."""

    vocab_size, max_model_len = VOCAB, 256

    def encode(self, text: str) -> list[int]:
        raise AssertionError(text)


class Loop:
    """Drives requests to their end. `overlap`: one step is launched ahead."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 64,
        max_model_len: int = 256,
        caching: bool = True,
        policy: str | Policy = "fcfs",
        overlap: bool = True,
        groups: int = 1,
        hash_fn: Callable[[bytes], bytes] | None = None,
        reserve: int = 0,
        drafts: int = 0,
        accuracy: float = 0.7,
        on_device: bool = False,
        request_class: type[Request] = Request,
        scheduler: type[Scheduler] = Scheduler,
        blocks: type[BlockManager] = BlockManager,
    ) -> None:
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            enable_prefix_caching=caching,
            admission_reserve=reserve,
        )
        extra = {} if hash_fn is None else {"hash_fn": hash_fn}
        self.blocks = blocks(groups, num_blocks + 1, block_size, caching, **extra)
        self.strong, self.checks, self.pools = hash_fn is None, True, self.blocks._pools
        self.guesses = Guesses(drafts, accuracy, max_model_len, on_device)
        self.policy = checked_policy(POLICIES[policy]() if isinstance(policy, str) else policy)
        self.scheduler = scheduler(self.config, self.blocks, self.policy, self.guesses if drafts else None)
        self.request_class = request_class
        self.runner = MockRunner(
            groups=groups,
            num_blocks=num_blocks + 1,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            vocab=VOCAB,
            guess=accuracy if on_device else None,
        )
        self.overlap = overlap
        self.in_flight: deque[ScheduledStep] = deque()
        self.steps: list[ScheduledStep] = []
        self.written: dict[int, Any] = {}
        self.requests: list[Request] = []
        self.ended: dict[Request, Update] = {}
        self.failed: list[Request] = []
        self.bad: list[Request] = []
        self.tokens: dict[Request, list[int]] = {}
        self.prompt_positions: dict[Request, list[int]] = {}
        self.idle = 0
        self.unsupplied: ScheduledStep | None = None
        self.asked = LastAsked()

    def request(self, prompt: Sequence[int], *, max_tokens: int = 8, **kwargs: Any) -> Request:
        names = set(ResolvedParams.__slots__)
        params = ResolvedParams(max_tokens=max_tokens, **{k: v for k, v in kwargs.items() if k in names})
        own = {k: v for k, v in kwargs.items() if k not in names or k == "priority"}
        own = {"seed": 7, "sample_index": 0, "arrival": len(self.requests)} | own
        own["seed"] = params.seed if params.seed is not None else own["seed"]
        number = str(len(self.requests))
        request = self.request_class(id=number, parent=number, prompt_token_ids=list(prompt), params=params, **own)
        request.host_states = start_states(request.params, request.prompt_token_ids, Limits())
        return request

    def add(self, prompt: Sequence[int], **kwargs: Any) -> Request:
        request = self.request(prompt, **kwargs)
        self.scheduler.add(request)
        self.requests.append(request)
        self.tokens[request] = []
        self.prompt_positions[request] = []
        return request

    def set_budget(self, tokens: int) -> None:
        """Of the steps from the next one on."""
        self.config = self.scheduler.config = replace(self.config, max_num_batched_tokens=tokens)

    def check(self) -> None:
        if self.checks:
            check_scheduler(self.scheduler)

    def abort(self, request: Request) -> None:
        self.scheduler.abort(request)
        self.check()

    def launch(self) -> ScheduledStep | None:
        step = self.scheduler.schedule()
        self.book(self.scheduler.take_updates())
        if step is not None:
            publish_prompts(step, self.blocks)
        self.check()
        if step is not None:
            assert 0 < step.plan.num_tokens <= self.config.max_num_batched_tokens, "the budget is broken"
            if self.broke_at_launch(step):
                return None
            self.runner.launch(decode(StepPlan, encode(step.plan)) if len(self.steps) % 16 == 0 else step.plan)
            self.in_flight.append(step)
            self.steps.append(step)
            self.written[step.plan.step] = self.runner.written_slots(step.plan)
            self.unsupplied = step if step.plan.late else None
            self.supply_oldest()
        return step

    def supply_oldest(self) -> None:
        """As the engine's: the columns of a late step, once all before it is known."""
        step = self.unsupplied
        if step is None or step is not self.in_flight[0]:
            return
        self.unsupplied = None
        columns, failed = supplied_columns(step, VOCAB, self.scheduler.config.most_forced, last=self.asked)
        message = decode(SuppliedColumns, encode(SuppliedColumns(tuple(columns))))
        self.runner.supply(message.columns)
        for update in failed:
            self.scheduler.abort(update.request)
        self.book(failed)
        self.check()

    def broke_at_launch(self, step: ScheduledStep) -> bool:
        return False

    def commit(self) -> list[Update]:
        step, result = self.in_flight.popleft(), self.runner.wait()
        codes = result.failed.tolist()
        rows = [handle for handle, code in zip(step.rows, codes, strict=True) if code == ROW_BAD_LOGITS]
        bad = [r for r, generation in rows if r.status is not Status.FINISHED and generation != r.void_generation]
        spoiled = [self.spoil_kv(request) for request in bad]
        updates = self.scheduler.commit(step, result)
        self.check()
        self.bad += bad
        for pool, blocks in ((pool, blocks[group]) for blocks in spoiled for group, pool in enumerate(self.pools)):
            assert not self.checks or not any(can_be_found(pool, block) for block in blocks), (
                "the index holds blocks of a failed request"
            )
        self.book(updates)
        self.supply_oldest()
        return updates

    def cached(self, request: Request) -> int:
        """Blocks that another request with these known tokens, and one more, would hit."""
        return len(self.blocks.match(replace_tokens(request, [*request.token_ids, 0]))[0])

    def spoil_kv(self, request: Request) -> list[list[int]]:
        """The KV of what no other request owns of this one's blocks, and of what the index has of it, is garbage.

        Returns all of its blocks by group, those that others own too.
        """
        runs = self.blocks.match(replace_tokens(request, [*request.token_ids, 0]))
        tables = request.block_ids or [[] for _ in runs]
        for group, (pool, run, own) in enumerate(zip(self.pools, runs, tables, strict=True)):
            mine = [b for b in own if pool.refs[b] == 1] + [b for b in run.tolist() if not pool.refs[b]]
            self.runner.kv[group, mine] = 12345
        return [own + run.tolist() for own, run in zip(tables, runs, strict=True)]

    def step(self) -> None:
        """As the engine's: launch up to the depth, then take the oldest result. Must get somewhere."""
        depth = 2 if self.overlap else 1
        launched, ended = False, len(self.ended)
        while len(self.in_flight) < depth and self.launch() is not None:
            launched = True
        if self.in_flight:
            self.commit()
            launched = True
        self.idle = 0 if launched or len(self.ended) > ended else self.idle + 1
        assert self.idle < 3 or not (self.scheduler.running or self.scheduler.waiting), (
            "nothing runs, though requests wait"
        )

    def book(self, updates: Iterable[Update]) -> None:
        for update in updates:
            request = update.request
            assert request not in self.ended, f"an update of {request.id} after its end"
            self.tokens[request] += update.new_token_ids
            self._book_logprobs(update)
            if update.finish_reason or update.error:
                self.ended[request] = update
                assert request.status is Status.FINISHED

    def _book_logprobs(self, update: Update) -> None:
        request = update.request
        if update.sampled_logprobs is not None:
            drawn = update.sampled_logprobs
            assert drawn.token_ids.tolist() == list(update.new_token_ids)
            last, new, top = request.prompt_len + len(self.tokens[request]), len(drawn.rows), request.params.logprobs
            assert drawn.positions.tolist() == list(range(last - new, last))
            assert drawn.top_offsets.tolist() == [top * at for at in range(new + 1)]
            assert len(drawn.top_ids) == top * new
        else:
            assert request.params.logprobs is None or not update.new_token_ids
        if update.prompt_logprobs is not None:
            given = update.prompt_logprobs
            for i, position in enumerate(given.positions.tolist()):
                token = request.prompt_token_ids[position]
                assert given.token_ids[i] == token
                assert given.logprobs[i] == np.float32(fake_logprob(token, position))
                assert given.top_offsets[i + 1] - given.top_offsets[i] == request.params.prompt_logprobs
            self.prompt_positions[request] += given.positions.tolist()

    def run(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not (self.scheduler.running or self.scheduler.waiting) and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"not finished after {limit} steps")

    def finish_and_verify(self) -> None:
        """Runs to the end; every request ended with the tokens it has when it runs alone; nothing is left behind."""
        self.run()
        assert self.blocks.free_blocks == self.blocks.num_blocks, "blocks leaked"
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        for request in self.requests:
            self.verify(request)
        if self.blocks.enable_prefix_caching and self.strong and self.checks:
            for request in self.requests[:4]:
                self.verify_publishing(request)

    def verify_publishing(self, request: Request) -> None:
        """Whatever came and went before, a prompt that is computed now is found afterwards, as far as it is whole."""
        again = replace_tokens(request, request.prompt_token_ids)
        if again.prompt_len > self.blocks.num_blocks * self.blocks.block_size:
            return
        assert self.blocks.claim(again, self.blocks.no_hits(), again.prompt_len)
        assert self.blocks.grow(again, again.prompt_len)
        again.num_computed = again.prompt_len
        self.blocks.publish(again, again.prompt_len)
        check_blocks(self.blocks, [again])
        self.blocks.release(again)
        whole = again.prompt_len // self.blocks.block_size
        assert self.cached(again) == whole, "what was computed is not found"

    def verify(self, request: Request) -> None:
        if request.params.pooling is not None:
            self.verify_vector(request)
            return
        got, want = self.tokens[request], truth(request, self.config.max_model_len)
        assert got == request.output_token_ids
        end = self.ended.get(request)
        if end is None or end.error or end.stop_reason == "kv_cache_full":  # ended early
            assert request.status is Status.FINISHED, f"request {request.id} never ended"
            assert got == want[: len(got)], f"request {request.id}: wrong tokens"
            return
        assert got == want, f"request {request.id}: wrong tokens"
        last, params = got[-1], request.params
        stops = last in params.stop_set and len(got) > params.min_tokens
        assert end.finish_reason == ("stop" if stops else "length")
        assert end.stop_reason == (last if stops and last not in params.eos_ids else None)
        if params.prompt_logprobs is not None:
            assert self.prompt_positions[request] == list(range(1, request.prompt_len))

    def verify_vector(self, request: Request) -> None:
        assert request.status is Status.FINISHED
        assert not self.tokens[request]
        assert not request.output_token_ids
        end = self.ended.get(request)
        if end is None:  # aborted
            return
        assert (end.pooled is None) is (end.error is not None), "an end without a vector"
        if end.pooled is not None:
            want = expected_vector(request.prompt_token_ids, request.params.pooling)
            assert end.pooled.dtype == np.float32
            assert end.pooled.tolist() == want.tolist(), f"request {request.id}: wrong vector"


class BreakingLoop(Loop):
    """A step that holds a poisoned request breaks: at launch, or when its result is waited for."""

    def __init__(self, at_launch: bool, **kwargs):
        super().__init__(**kwargs)
        self.at_launch, self.poisoned, self.broken = at_launch, {}, []
        self.limit = 1 << 30
        self.bad_row: int | None = None  # of the next step: it gets bad logits, if it draws a token
        self.runner.fail_row = self.fail_row

        self.raising: str | None = None  # what raises, once, when the next step is scheduled
        self.raised = 0

    def launch(self) -> ScheduledStep | None:
        where, self.raising = self.raising, None
        if where is None or not (self.scheduler.running or self.scheduler.waiting):
            return super().launch()
        places: dict[str, tuple[Any, str]] = {
            "plan": (scheduler_module, "build_plan"),
            "match": (self.blocks, "match"),
            "grow": (self.blocks, "grow"),
            "claim": (self.blocks, "claim"),
            "admit": (Draft, "admit"),
            "pick": (self.scheduler, "_pick_running"),
        }
        owner, name = places[where]
        original, before = getattr(owner, name), self.raised

        def broken(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.raised == before:
                self.raised += 1
                raise SystemExit("broken by a test")
            return result

        with patch.object(owner, name, broken):
            return super().launch()

    def fail_row(self, plan: StepPlan, row: int) -> int:
        bad = self.bad_row is not None and row == self.bad_row % plan.num_rows
        self.bad_row = None if bad else self.bad_row
        return ROW_BAD_LOGITS if bad else ROW_FINE

    def poison(self, request, from_token: int = 0):
        self.poisoned[request] = from_token

    def breaks(self, step) -> bool:
        ends = zip(step.rows, (step.plan.starts + step.plan.query_lens).tolist(), strict=True)
        return any(end > self.poisoned.get(request, 10**9) for (request, _), end in ends)

    def fail(self, steps):
        self.broken.append([[r for r, _ in step.rows] for step in steps])
        self.failed += self.scheduler.fail(steps)
        self.check()

    def spoil(self):
        """All steps in flight break; what they wrote is garbage."""
        steps = list(self.in_flight)
        self.in_flight.clear()
        self.runner.drop()
        self.unsupplied = None
        for step in steps:
            for cache, slots in zip(self.runner.kv, self.written[step.plan.step], strict=True):
                cache.reshape(-1)[slots] = 12345
        self.fail(steps)

    def broke_at_launch(self, step):
        if not (self.at_launch and self.breaks(step)):
            return False
        while self.in_flight:
            self.commit()
        self.fail([step])
        return True

    def commit(self):
        if not self.at_launch and self.breaks(self.in_flight[0]):
            self.spoil()
            return []
        return super().commit()


def can_be_found(pool: Pool, block: int) -> bool:
    """Whether the index holds this block and all before it."""
    entry, places = pool.entries[block], {uid: place for place, uid in enumerate(pool.uids.tolist()) if uid}
    while entry is not None and not isinstance(entry.parent, bytes):
        entry = pool.entries[places[entry.parent]] if entry.parent in places else None
    return entry is not None


def replace_tokens(request: Request, tokens: Sequence[int]) -> Request:
    """Another request with these prompt tokens, and the same cache key."""
    return Request(
        id="other",
        parent="other",
        prompt_token_ids=list(tokens),
        params=ResolvedParams(),
        seed=0,
        sample_index=0,
        arrival=0,
        cache_key=request.cache_key,
    )


def truth(request: Request, max_model_len: int) -> list[int]:
    params = request.params
    shift = sum(processor.params.shift for processor in params.processors if isinstance(processor.params, ShiftParams))

    def bias(outputs: Sequence[int]) -> int:
        return shift + (sum(grammar(request.prompt_token_ids, outputs)) if request.host_states else 0)

    return expected_tokens(
        request.prompt_token_ids,
        min(params.max_tokens or max_model_len, max_model_len - request.prompt_len),
        VOCAB,
        stop_ids=params.stop_set,
        min_tokens=params.min_tokens,
        seed=0 if params.greedy else request.seed,
        sample_index=0 if params.greedy else request.sample_index,
        bias=bias,
    )


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(salt * 31 + i * 7 + i * i) % VOCAB for i in range(length)]


# Operations: what the property tests generate and the mutants are run against

Op = tuple[str, Any]


def run_ops(loop: BreakingLoop, ops: Iterable[Op]) -> None:
    """("add", prompt and its keywords), ("abort", index), ("bad", row of the next step), ("raise", where), ("budget",
    tokens), ("limit", tokens that the device has memory for), ("step" | "launch" | "break", None); then to the end."""
    for name, value in ops:
        if name == "add":
            longest = loop.config.max_model_len - (not value.get("pooling"))
            if 0 < len(value["prompt"]) <= longest:  # others do not get past the input processor
                with suppress(RequestError):
                    loop.add(**value)
        elif name == "abort":
            if loop.requests:
                loop.abort(loop.requests[value % len(loop.requests)])
        elif name == "step":
            loop.step()
        elif name == "raise":
            loop.raising = value
        elif name == "bad":
            loop.bad_row = value
        elif name == "budget":
            loop.set_budget(value)
        elif name == "limit":
            loop.limit = value
        elif name == "launch":
            if len(loop.in_flight) < (2 if loop.overlap else 1):
                loop.launch()
        elif loop.in_flight:
            loop.spoil()
    loop.finish_and_verify()


def random_ops(
    rng: random.Random, count: int, *, host: bool = True, breaks: bool = True, pooling: float = 0.0
) -> list[Op]:
    """pooling: the share of requests that pool."""
    ops: list[Op] = []
    for _ in range(count):
        kinds = ["add", "step", "launch", "abort", "break", "bad"]
        kind = rng.choices(kinds, [5, 8, 3, 0.5, 0.6 * breaks, 0.5 * breaks])[0]
        ops.append((kind, random_request(rng, host, pooling) if kind == "add" else rng.randrange(100)))
    return ops


def pooling_request(prompt: Sequence[int], pooling: str, priority: int = 0, cache_key: bytes = b"") -> dict[str, Any]:
    """As the input processor makes one."""
    return {
        "prompt": prompt,
        "pooling": pooling,
        "max_tokens": 1,
        "speculate": False,
        "priority": priority,
        "cache_key": cache_key,
    }


def random_request(rng: random.Random, host: bool = True, pooling: float = 0.0) -> dict[str, Any]:
    """Prompts share prefixes; a few ids stop, so that ends come at any place."""
    length = rng.randrange(1, 30)
    shared = min(length, rng.choice((0, 4, 8, 11, 16, 24)))
    prompt = prompt_of(shared) + prompt_of(length - shared, rng.randrange(3))
    if pooling and rng.random() < pooling:
        return pooling_request(prompt, rng.choice(("mean", "last")), rng.randrange(3), rng.choice((b"", b"", b"salt")))
    processors = (shift_processor(rng.randrange(5)),) if rng.random() < 0.3 else ()
    if host and rng.random() < 0.2:
        processors += (grammar_processor(fail_at=rng.choice((-1, -1, -1, 0, 4))),)
    return {
        "prompt": prompt,
        "max_tokens": rng.randrange(1, 20),
        "min_tokens": rng.choice((0, 0, 3)),
        "eos_ids": frozenset(rng.sample(range(VOCAB), rng.choice((0, 3)))),
        "stop_token_ids": frozenset(rng.sample(range(VOCAB), rng.choice((0, 3)))),
        "greedy": rng.random() < 0.3,
        "sample_index": rng.randrange(3),
        "priority": rng.randrange(3),
        "client": ("", "a", "b")[length % 3],
        "cache_key": rng.choice((b"", b"", b"salt")),
        "processors": processors,
        "logprobs": rng.choice((None, None, 0, 2)),
        "prompt_logprobs": rng.choice((None, None, None, 1)),
    }
