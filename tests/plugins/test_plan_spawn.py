"""An `EnginePlan` crosses into a spawned process, which builds the same model from it: only targets travel."""

from __future__ import annotations

import io
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoengine.api import AttentionBackend, LogitsProcessor, Model, PluginError
from nanoengine.api.parallel import SingleRank
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.engine_plan import EnginePlan, ProcessorPlan
from nanoengine.setup.plugins.discover import Registry, discover, load_checked
from nanoengine.setup.plugins.policies import choose_policy
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.setup.start.build_model import build_model

TINY = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip

FROM_FILE = """
import torch
from nanoengine.plugins.models.llama import Llama


class Doubled(Llama):
    def compute_logits(self, hidden):
        return super().compute_logits(hidden) * 2


@hookimpl
def register_models():
    return [ModelSpec(name="doubled", architectures=("DoubledForCausalLM",), target=f"{__name__}:Doubled", api=1)]
"""


def describe(plan: EnginePlan) -> dict[str, Any]:
    """Builds the plan's parts as a worker does, and says what came out."""
    loader = TargetLoader(plan.plugin_files)
    model_class = load_checked(loader, plan.model, Model)
    dtype = getattr(torch, plan.options.dtype)
    built = build_model(model_class, plan.hf_config, tp=SingleRank(), dtype=dtype, device=plan.options.device)
    for index, parameter in enumerate(built.model.parameters()):
        torch.nn.init.constant_(parameter, 0.01 * (index + 1))
    with torch.inference_mode():
        logits = built.model.compute_logits(torch.ones(1, built.config.hidden_size))
    processors = [load_checked(loader, processor.target, LogitsProcessor) for processor in plan.processors]
    return {
        "model": model_class.__qualname__,
        "parameters": {name: tuple(p.shape) for name, p in built.model.named_parameters()},
        "processors": [processor.__qualname__ for processor in processors],
        "backend": load_checked(loader, plan.attention, AttentionBackend).__qualname__,
        "logit": round(float(logits[0, 0]), 6),
    }


def child(pipe: Any, pickled: bytes) -> None:
    try:
        pipe.send(describe(pickle.loads(pickled)))
    except PluginError as error:
        pipe.send(str(error))


def in_spawned_process(plan: EnginePlan) -> Any:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=child, args=(there, pickle.dumps(plan)))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join(100)
        assert process.exitcode == 0


def plan_of(registry: Registry, architecture: str) -> EnginePlan:
    backend = next(iter(registry.attention_backends.values()))
    return EnginePlan(
        model_path="unused",
        hf_config={**TINY, "architectures": [architecture]},
        model=registry.model_for([architecture]).spec.target,
        attention_name=backend.spec.name,
        attention=backend.spec.target,
        processors=tuple(
            ProcessorPlan(name=s.spec.name, target=s.spec.target, columns=dict(s.spec.params.columns))
            for s in registry.processors()
        ),
        policy=choose_policy(registry, "fcfs", {}),
        options=EngineOptions(device="cpu", dtype="float32"),
        plugin_files=registry.plugin_files,
    )


def test_a_plan_survives_pickling_and_carries_no_class_of_a_plugin() -> None:
    named: list[str] = []

    class Noting(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            named.append(module)
            return super().find_class(module, name)

    plan = plan_of(discover(), "LlamaForCausalLM")
    assert Noting(io.BytesIO(pickle.dumps(plan))).load() == plan
    modules = ("params.engine_plan", "params.engine_options", "api.processor_params")
    assert set(named) == {f"nanoengine.{module}" for module in modules}


@pytest.mark.slow
def test_a_spawned_process_builds_the_same_model() -> None:
    plan = plan_of(discover(), "LlamaForCausalLM")
    expected = describe(plan)
    assert expected["model"] == "Llama"
    assert len(expected["processors"]) >= 8
    assert in_spawned_process(plan) == expected


@pytest.mark.slow
def test_a_spawned_process_builds_a_model_from_a_plugin_file(plugin_py: Any) -> None:
    path: Path = plugin_py(FROM_FILE)
    registry = discover([path])
    plan = plan_of(registry, "DoubledForCausalLM")
    plain = describe(plan_of(registry, "LlamaForCausalLM"))
    there = in_spawned_process(plan)
    assert there["model"] == "Doubled"
    assert there["logit"] == pytest.approx(2 * plain["logit"])
    path.unlink()
    assert "FileNotFoundError" in in_spawned_process(plan)  # it was loaded from the file, and says so when it is gone
