"""Parts handed to `LLM` in Python: a backend class, a plugin file, an object with hooks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from nanoengine import LLM, SamplingParams
from nanoengine.api import (
    AttentionBackend,
    AttentionCapabilities,
    ColumnSpec,
    NanoEngineError,
    Phase,
    PluginError,
    SamplerSpec,
    SamplerStage,
    StageParams,
    hookimpl,
)
from nanoengine.core.setup.plan import TargetLoader
from nanoengine.core.setup.plugins import discover, load_checked

PROMPTS = [{"prompt_token_ids": [1, 2, 3, 4]}, {"prompt_token_ids": [9, 8]}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def tokens(model: Path, params: SamplingParams = GREEDY, **more: Any) -> list[list[int]]:
    with LLM(model, load_format="dummy", num_gpu_blocks_override=32, **more) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.error for output in outputs] == [None, None]
    return [list(output.outputs[0].token_ids) for output in outputs]


def built_in() -> type[AttentionBackend]:
    return load_checked(TargetLoader(), discover().attention("torch").spec.target, AttentionBackend)


def test_a_backend_class_is_used(tiny: Path) -> None:
    calls: list[int] = []
    base: Any = built_in()

    class Mine(base):
        def forward(self, layer: int, *rest: Any) -> torch.Tensor:
            calls.append(layer)
            return super().forward(layer, *rest)

    class Mutant(base):
        def forward(self, layer: int, *rest: Any) -> torch.Tensor:
            return super().forward(layer, *rest).roll(1, 0)  # each token gets its neighbour's attention

    expected = tokens(tiny)
    assert tokens(tiny, attention=Mine) == expected
    assert set(calls) == {0, 1}
    assert tokens(tiny, attention=Mutant) != expected


def test_a_backend_class_is_checked(tiny: Path) -> None:
    class Half(AttentionBackend):
        capabilities = AttentionCapabilities(devices=frozenset({"cpu"}))

    base: Any = built_in()

    class OtherDevice(base):
        capabilities = AttentionCapabilities(devices=frozenset({"tpu"}))

    with pytest.raises(PluginError, match=r"Half does not implement AttentionBackend\.__init__, allocate"):
        tokens(tiny, attention=Half)
    with pytest.raises(PluginError, match="not a class derived from"):
        tokens(tiny, attention=SimpleNamespace)
    with pytest.raises(NanoEngineError, match="runs on tpu, not on cpu"):
        tokens(tiny, attention=OtherDevice)


ONLY = """
import torch

@dataclass(frozen=True)
class OnlyParams(StageParams):
    columns = {"only_below": ColumnSpec(dtype="int32", default=2**31 - 1)}
    only_below: int = 2**31 - 1

class Only(SamplerStage):
    phase = Phase.MASK

    def apply(self, logits, rows):
        ids = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill(ids >= rows.column("only_below")[:, None], float("-inf"))

@hookimpl
def register_samplers():
    return [SamplerSpec(name="only", params=OnlyParams, target=f"{__name__}:Only", api=1)]
"""


def test_a_plugin_file_brings_a_parameter(tiny: Path, plugin_py: Any) -> None:
    narrow = SamplingParams(max_tokens=12, ignore_eos=True, seed=3, only_below=5)
    found = tokens(tiny, narrow, plugins=[plugin_py(ONLY)])
    assert max(max(row) for row in found) < 5
    with pytest.raises(NanoEngineError, match="only_below"):
        tokens(tiny, narrow)


@dataclass(frozen=True)
class LiftParams(StageParams):
    columns: ClassVar = {"lift": ColumnSpec(dtype="int32", default=-1)}
    lift: int = -1


class Lift(SamplerStage):
    """Makes token `lift` certain."""

    phase = Phase.BIAS

    def apply(self, logits: torch.Tensor, rows: Any) -> torch.Tensor:
        ids = torch.arange(logits.shape[1], device=logits.device)
        return logits + 1e4 * (ids == rows.column("lift")[:, None])


def test_an_object_with_hooks_brings_a_stage(tiny: Path) -> None:
    spec = SamplerSpec(name="lift", params=LiftParams, target=f"{__name__}:Lift", api=1)
    plugin = SimpleNamespace(register_samplers=hookimpl(lambda: [spec]))
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, lift=77)
    assert tokens(tiny, params, plugins=[plugin]) == [[77] * 4] * 2


def test_a_stage_whose_class_is_broken_is_named(tiny: Path) -> None:
    spec = SamplerSpec(name="lift", params=LiftParams, target=f"{__name__}:Missing", api=1)
    plugin = SimpleNamespace(register_samplers=hookimpl(lambda: [spec]))
    with pytest.raises(PluginError, match=r"test_handed_over:Missing.*AttributeError"):
        tokens(tiny, plugins=[plugin])
