"""Scheduling policies as plugins: chosen by name with options, checked by a kit; what one raises fails one request."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoengine import LLM, SamplingParams
from nanoengine.api import (
    ConfigError,
    ParamsError,
    PluginError,
    Policy,
    PolicyParams,
    PolicySpec,
    QueuedRequest,
    hookimpl,
)
from nanoengine.plugins.policies import register_policies
from nanoengine.plugins.policies.params import FairParams
from nanoengine.setup.config.config import load_config
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.policies import choose_policy, make_policy
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.testing import mock_model
from nanoengine.testing.conformance import ConformanceError, check_policy

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "fcfs": [{}],
    "priority": [{}],
    "fair": [{}, {"weights": {"acme": 3, "": 0.1}, "prompt_cost": 0}],
}


@pytest.mark.parametrize("spec", register_policies(), ids=lambda spec: spec.name)
def test_the_built_in_policies_conform(spec: PolicySpec) -> None:
    check_policy(spec, *EXAMPLES[spec.name])


# -- options ----------------------------------------------------------------------------------------------------------


def test_a_plan_has_the_policy_and_its_checked_options() -> None:
    plan = choose_policy(discover(), "fair", {"weights": {"acme": 3}})
    assert (plan.name, plan.target) == ("fair", "nanoengine.plugins.policies.fair:Fair")
    assert plan.params == {"weights": {"acme": 3.0}}
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert make_policy(plan, TargetLoader())._policy.params == FairParams(weights={"acme": 3.0})


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("fcsf", {}, PluginError, "did you mean 'fcfs'"),
        ("fcfs", {"weights": {}}, ConfigError, r"'fcfs' has no option 'weights'; Valid: \(none\)"),
        ("fair", {"weight": {}}, ConfigError, "did you mean 'weights'"),
        ("fair", {"weights": {"acme": "much"}}, ConfigError, "engine.policy_options.weights must be a mapping"),
        (
            "fair",
            {"weights": {"acme": 0}},
            ConfigError,
            "weights must be above 0 and finite, not 0.0 .of client",
        ),
        ("fair", {"weights": {"acme": float("nan")}}, ConfigError, "weights must be above 0 and finite, not nan"),
        ("fair", {"default_weight": -1}, ConfigError, "default_weight must be above 0"),
        ("fair", {"output_cost": float("inf")}, ConfigError, "output_cost must be 0 or more, not inf"),
        ("fair", {"output_cost": 0, "prompt_cost": 0}, ConfigError, "must not both be 0"),
    ],
)
def test_a_mistake_names_the_option_and_the_choices(
    name: str, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        choose_policy(discover(), name, options)


def test_a_mistake_in_a_file_is_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for text, line, said in (
        ("scheduling_policy: fare", 3, "did you mean 'fair'"),
        ("scheduling_policy: fair\n  policy_options:\n    weights: {a: -1}", 5, "weights must be above 0"),
    ):
        file.write_text(f"model: {tmp_path}\nengine:\n  {text}\n")
        with pytest.raises((ConfigError, PluginError), match=f"run.yaml:{line}.*{said}"):
            load_config(str(file))


# -- plugins with mistakes --------------------------------------------------------------------------------------------

RAISING = ("waiting_key", "running_key", "next_key", "queued", "left", "served")


class Raises(Policy):
    """Raises in one method: for requests with seven tokens; `next_key` knows no request."""

    params: RaisesParams

    def _raise(self, method: str, request: QueuedRequest | None = None) -> None:
        if method == self.params.method and (request is None or request.num_prompt_tokens == 7):
            raise SystemExit("no order today")

    def waiting_key(self, request: QueuedRequest) -> tuple[int, ...]:
        self._raise("waiting_key", request)
        return ()

    def running_key(self, request: QueuedRequest) -> tuple[int, ...]:
        self._raise("running_key", request)
        return (0,)

    def next_key(self) -> tuple[int, ...]:
        self._raise("next_key")
        return ()

    def queued(self, request: QueuedRequest, returned: bool) -> None:
        self._raise("queued", request)

    def left(self, request: QueuedRequest) -> None:
        self._raise("left", request)

    def served(self, request: QueuedRequest, prompt: int, generated: int) -> None:
        self._raise("served", request)


@dataclasses.dataclass(frozen=True)
class RaisesParams(PolicyParams):
    method: str = ""


def spec_of(policy: type[Policy], params: type[PolicyParams] = PolicyParams) -> PolicySpec:
    return PolicySpec(name="mine", target=f"{__name__}:{policy.__name__}", help="A test.", api=1, params=params)


def holder(spec: PolicySpec) -> SimpleNamespace:
    return SimpleNamespace(register_policies=hookimpl(lambda: [spec]))


@pytest.mark.parametrize("method", RAISING)
def test_a_policy_that_raises_fails_its_request_and_nothing_hangs(method: str, tmp_path: Path) -> None:
    path = mock_model.write_mock_checkpoint(tmp_path, vocab_size=97, max_position_embeddings=64)
    with LLM(
        path, attention="mock", plugins=[mock_model, holder(spec_of(Raises, RaisesParams))], load_format="dummy",
        scheduling_policy="mine", policy_options={"method": method}, max_num_seqs=2, device="cpu",
        num_gpu_blocks_override=32,
    ) as llm:  # fmt: skip
        prompts = [[1 + i] * (7 if i == 2 else 5) for i in range(6)]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True), use_tqdm=False)
        failed = [i for i, output in enumerate(outputs) if output.error]
        assert failed == [2] if method != "next_key" else failed
        for i in failed:
            error = outputs[i].error
            assert error is not None
            assert error.code == "policy_failed"
            assert f"{method}() of scheduling policy 'mine' (Raises of object" in str(error)
            assert "SystemExit: no order today" in str(error)
        for i in set(range(6)) - set(failed):
            assert len(outputs[i].outputs[0].token_ids) == 6
        stats = llm.stats()
        assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)


# -- the kit notices ---------------------------------------------------------------------------------------------------


class Floats(Policy):
    def waiting_key(self, request: QueuedRequest) -> Any:
        return (request.priority / 2,)


class Changes(Policy):
    def waiting_key(self, request: QueuedRequest) -> Any:
        return (request.client or 0,)


class NotByArrival(Policy):
    by_arrival = True

    def waiting_key(self, request: QueuedRequest) -> Any:
        return (request.num_prompt_tokens,)


class TooHigh(Policy):
    def next_key(self) -> Any:
        return (10**9,)

    def waiting_key(self, request: QueuedRequest) -> Any:
        return (1,)


class NoTier(Policy):
    def running_key(self, request: QueuedRequest) -> Any:
        return ()


class Shared(Policy):
    seen: dict[str, int] = {}  # noqa: RUF012 - the mistake

    def waiting_key(self, request: QueuedRequest) -> Any:
        self.seen[request.client] = self.seen.get(request.client, 0) + 1
        return (self.seen[request.client] % 7,)


class ForgetsAborted(Policy):
    """Counts on each request being admitted before it leaves."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.order: list[str] = []

    def queued(self, request: QueuedRequest, returned: bool) -> None:
        self.order.append(request.id)

    def left(self, request: QueuedRequest) -> None:
        assert self.order.pop(0) == request.id


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Floats, "not a tuple of integers and strings"),
        (Changes, "all must be alike"),
        (NotByArrival, "by_arrival is set, and not true"),
        (TooHigh, "above the waiting_key of every request"),
        (NoTier, "no first item"),
        (Shared, "it shares state"),
        (ForgetsAborted, r"left\(\)"),
    ],
)
def test_the_kit_says_what_is_wrong(policy: type[Policy], said: str) -> None:
    with pytest.raises(ConformanceError, match=said):
        check_policy(spec_of(policy))


@pytest.mark.parametrize("field", ["help", "params", "name"])
def test_a_wrong_spec_is_refused(field: str) -> None:
    wrong = dataclasses.replace(spec_of(Policy), **{field: 7})
    with pytest.raises(PluginError, match=f"PolicySpec.{field} must be"):
        discover(extra=[("p", holder(wrong))])


# -- who asks ---------------------------------------------------------------------------------------------------------


def test_a_fair_engine_does_not_let_one_client_wait_behind_another(tmp_path: Path) -> None:
    path = mock_model.write_mock_checkpoint(tmp_path, vocab_size=97, max_position_embeddings=64)
    with LLM(
        path, attention="mock", plugins=[mock_model], load_format="dummy", scheduling_policy="fair", max_num_seqs=1,
        device="cpu", num_gpu_blocks_override=32,
    ) as llm:  # fmt: skip
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        for i in range(6):
            llm.engine.add_request(f"many {i}", [1, 2, 3 + i], params, client="many")
        llm.engine.add_request("few", [9, 9, 9], params, client="few")
        order = []
        while llm.engine.has_unfinished_requests():
            order += [delta.request_id for delta in llm.engine.step() if delta.finished]
        assert order.index("few") <= 1
        for wrong in (7, None, "half \ud800"):
            with pytest.raises(ParamsError, match="client must be a string of valid Unicode"):
                llm.engine.add_request("x", [1], params, client=wrong)  # type: ignore[arg-type]
