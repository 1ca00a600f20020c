"""`check_policy`: tests a scheduling policy on a queue that fills and empties, and in an engine."""

from __future__ import annotations

import random
import tempfile
from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nanoengine.api import PolicySpec, QueuedRequest, hookimpl
from nanoengine.api.policies import Key
from nanoengine.api.policy_checks import CheckedPolicy
from nanoengine.api.specs import Origin
from nanoengine.setup.plugins.discover import Registered, Registry, discover
from nanoengine.setup.plugins.policies import choose_policy, make_policy
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.setup.plugins.validation import check_spec
from nanoengine.testing.conformance.failure import during, require
from nanoengine.testing.conformance.processor import check_imports

_CLIENTS = ("", "acme", "bolt", "ünal 🙂", "x" * 200)
_PRIORITIES = (0, 0, 0, 1, -1, 2**63 - 1, -(2**63))


def check_policy(spec: PolicySpec, *examples: Mapping[str, Any]) -> None:
    """Tests a scheduling policy.

    Args:
        spec: what the plugin's `register_policies` returns.
        examples: values of its options to test it with; default: their defaults.

    Raises `ConformanceError` that says what was wrong.
    """
    with during(f"scheduling policy {spec.name!r}"):
        check_spec(spec)
        check_imports(spec.params)
        for values in examples or ({},):
            policy = _make(spec, values)
            first = _Queue(policy).run(seed=1)
            _Queue(_make(spec, values)).run(seed=2)
            again = _Queue(_make(spec, values)).run(seed=1)
            require(first == again, "a new instance orders the same requests differently: it shares state with others")
            _check_engine(spec, values)


def _make(spec: PolicySpec, values: Mapping[str, Any]) -> CheckedPolicy:
    found = Registered(spec, Origin(plugin="conformance kit"))
    registry = Registry(models={}, samplers={}, attention_backends={}, model_sources={}, policies={spec.name: found})
    plan = choose_policy(registry, spec.name, values)
    return make_policy(plan, TargetLoader(local={plan.params_target: spec.params}))


@dataclass
class _Queue:
    """Requests that come, are admitted, get tokens, are preempted, and end, in any order."""

    policy: CheckedPolicy
    waiting: list[tuple[Key, QueuedRequest]] = field(default_factory=list)
    running: dict[str, QueuedRequest] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)  # of the waiting ones and of those that run
    admitted: list[str] = field(default_factory=list)
    added: int = 0

    def run(self, seed: int) -> list[str]:
        """The ids of the requests in the order of admission."""
        rng = random.Random(seed)
        for _ in range(400):
            rng.choices((self.add, self.admit, self.serve, self.preempt, self.end), (4, 3, 6, 0.5, 2))[0](rng)
        while self.waiting:
            self.admit(rng)
        while self.running:
            self.serve(rng)
            self.end(rng)
        return self.admitted

    def add(self, rng: random.Random) -> None:
        self.added += 1
        request = QueuedRequest(
            id=f"req-{self.added}/0",
            client=rng.choice(_CLIENTS),
            priority=rng.choice(_PRIORITIES),
            arrival=self.added,
            num_prompt_tokens=rng.randrange(1, 1000),
            max_tokens=rng.randrange(1, 1000),
        )
        with during("waiting_key()"):
            self.keys[request.id] = (*self.policy.waiting_key(request), request.arrival)
        self._queue(request, returned=False)

    def _queue(self, request: QueuedRequest, *, returned: bool) -> None:
        insort(self.waiting, (self.keys[request.id], request), key=lambda each: each[0])
        with during("queued()"):
            self.policy.queued(request, returned)

    def admit(self, rng: random.Random) -> None:
        if not self.waiting:
            return
        with during("next_key()"):
            at = bisect_left(self.waiting, self.policy.next_key(), key=lambda each: each[0]) if self.policy.picks else 0
        require(at < len(self.waiting), "next_key() is above the waiting_key of every request that waits")
        request = self.waiting[at][1]
        if self.policy.by_arrival:
            require(request.arrival == min(each.arrival for _, each in self.waiting), "by_arrival is set, and not true")
        with during("running_key()"):
            self.policy.running_key(request)
        del self.waiting[at]
        with during("left()"):
            self.policy.left(request)
        self.running[request.id] = request
        self.admitted.append(request.id)
        self._served(request, rng.randrange(request.num_prompt_tokens + 1), 0)

    def serve(self, rng: random.Random) -> None:
        for request in self.running.values():
            self._served(request, 0, rng.choice((1, 1, 1, 5)))

    def _served(self, request: QueuedRequest, prompt: int, generated: int) -> None:
        with during("served()"):
            self.policy.served(request, prompt, generated)

    def preempt(self, rng: random.Random) -> None:
        if self.running:
            self._queue(self.running.popitem()[1], returned=True)

    def end(self, rng: random.Random) -> None:
        """One that runs; now and then one that waits, as an abort does."""
        if self.waiting and rng.random() < 0.2:
            request = self.waiting.pop(rng.randrange(len(self.waiting)))[1]
            with during("left() of a request that was not admitted"):
                self.policy.left(request)
        elif self.running:
            del self.running[rng.choice(list(self.running))]


def _check_engine(spec: PolicySpec, values: Mapping[str, Any]) -> None:
    """Runs requests on the mock model with few slots and blocks: all end well, with the tokens that fcfs gives."""
    from nanoengine import LLM, SamplingParams
    from nanoengine.testing import mock_model

    found = discover().policies.get(spec.name)
    own = [] if found and found.spec == spec else [SimpleNamespace(register_policies=hookimpl(lambda: [spec]))]
    prompts = [[7 + i, 1, 2 + i] * (1 + i % 3) for i in range(12)]
    params = [SamplingParams(max_tokens=20, seed=i, ignore_eos=True, priority=i % 3) for i in range(12)]
    options: dict[str, Any] = {"load_format": "dummy", "num_gpu_blocks_override": 6, "block_size": 8, "max_num_seqs": 3}
    said = []
    with tempfile.TemporaryDirectory() as folder, during("in the engine"):
        path = mock_model.write_mock_checkpoint(Path(folder), vocab_size=97, max_position_embeddings=64)
        chosen: dict[str, Any] = {"scheduling_policy": spec.name, "policy_options": values}
        for policy in ({}, chosen):
            with LLM(path, attention="mock", plugins=[mock_model, *own], device="cpu", **options, **policy) as llm:
                outputs = llm.generate(prompts, params, use_tqdm=False)
                require(llm.stats().preemptions > 0, "no request was preempted: the kit's mistake, please report it")
            for output in outputs:
                require(output.error is None, f"the request failed: {output.error}")
            said.append([output.outputs[0].token_ids for output in outputs])
    require(said[0] == said[1], "tokens are different with this policy: the engine's mistake, please report it")
