"""Parts handed to `LLM` in Python: a backend class, a plugin file, an object with hooks."""

from __future__ import annotations

import json
import re
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
    LogitsProcessor,
    Model,
    ModelError,
    ModelSource,
    ModelSourceError,
    ModelSourceSpec,
    NanoEngineError,
    Phase,
    PluginError,
    ProcessorParams,
    SamplerSpec,
    SourceContext,
    hookimpl,
)
from nanoengine.setup.plugins.discover import discover, load_checked
from nanoengine.setup.plugins.targets import TargetLoader

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
class OnlyParams(ProcessorParams):
    columns = {"only_below": ColumnSpec(dtype="int32", default=2**31 - 1)}
    only_below: int = 2**31 - 1

class Only(LogitsProcessor):
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
class LiftParams(ProcessorParams):
    columns: ClassVar = {"lift": ColumnSpec(dtype="int32", default=-1)}
    lift: int = -1


class Lift(LogitsProcessor):
    """Makes token `lift` certain."""

    phase = Phase.BIAS

    def apply(self, logits: torch.Tensor, rows: Any) -> torch.Tensor:
        ids = torch.arange(logits.shape[1], device=logits.device)
        return logits + 1e4 * (ids == rows.column("lift")[:, None])


def test_an_object_with_hooks_brings_a_processor(tiny: Path) -> None:
    spec = SamplerSpec(name="lift", params=LiftParams, target=f"{__name__}:Lift", api=1)
    plugin = SimpleNamespace(register_samplers=hookimpl(lambda: [spec]))
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, lift=77)
    assert tokens(tiny, params, plugins=[plugin]) == [[77] * 4] * 2


class Refuses(Lift):
    def __init__(self, ctx: Any) -> None:
        raise ValueError("no table for me")


class Exits(Lift):
    def __init__(self, ctx: Any) -> None:
        raise SystemExit(3)


class NoPhase(Lift):
    phase: ClassVar[Any] = "bias"


class NoNeeds(Lift):
    needs: ClassVar[Any] = {"prompt_mask"}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("Missing", r"test_handed_over:Missing.*AttributeError"),
        ("PROMPTS", r"test_handed_over:PROMPTS.*not a class derived from nanoengine\.api\.LogitsProcessor"),
        ("Refuses", r"failed in __init__: ValueError: no table for me"),
        ("Exits", r"failed in __init__: SystemExit: 3"),
        ("NoPhase", r"must set `phase` to a nanoengine\.api\.Phase, not 'bias'"),
        ("NoNeeds", r"must set `needs` to a frozenset of nanoengine\.api\.Need"),
    ],
)
def test_a_broken_processor_fails_only_who_uses_it(tiny: Path, target: str, words: str) -> None:
    expected = tokens(tiny)
    spec = SamplerSpec(name="lift", params=LiftParams, target=f"{__name__}:{target}", api=1)
    plugin = SimpleNamespace(register_samplers=hookimpl(lambda: [spec]))
    with LLM(tiny, load_format="dummy", num_gpu_blocks_override=32, plugins=[plugin]) as llm:
        with pytest.raises(
            PluginError, match=rf"logits processor 'lift', which lift needs, cannot run: .*{words}.*fix"
        ):
            llm.generate(PROMPTS, [GREEDY, GREEDY.replace(lift=7)], use_tqdm=False)
        assert not llm.text_engine.has_unfinished_requests()
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
        random = GREEDY.replace(temperature=0.7, top_k=5, presence_penalty=0.3)
        assert all(output.error is None for output in llm.generate(PROMPTS, random, use_tqdm=False))


@dataclass(frozen=True)
class FaultyParams(LiftParams):
    """Whatever the engine asks of it raises."""

    def __post_init__(self) -> None:
        raise ArithmeticError("constructed")

    def active(self) -> bool:
        raise ArithmeticError("asked")


def test_broken_parameters_fail_only_who_gives_them(tiny: Path) -> None:
    spec = SamplerSpec(name="lift", params=FaultyParams, target=f"{__name__}:Lift", api=1)
    plugin = SimpleNamespace(register_samplers=hookimpl(lambda: [spec]))
    assert tokens(tiny, plugins=[plugin]) == tokens(tiny)
    with pytest.raises(PluginError, match=r"processor 'lift': FaultyParams failed on .*ArithmeticError: constructed"):
        tokens(tiny, GREEDY.replace(lift=3), plugins=[plugin])


class AnswersNothing(ModelSource):
    asked: ClassVar[list[str]] = []

    def resolve(self, source: str, ctx: SourceContext) -> Path | None:
        self.asked.append(source)
        return None


class CannotBeMade(AnswersNothing):
    def __init__(self) -> None:
        raise OSError("no disk")


class Crashes(AnswersNothing):
    def resolve(self, source: str, ctx: SourceContext) -> Path | None:
        raise LookupError("lost the way")


def test_broken_model_sources_hinder_no_other(tiny: Path) -> None:
    names = ("NotThere", "CannotBeMade", "Crashes", "AnswersNothing")
    specs = [ModelSourceSpec(name=n.lower(), target=f"{__name__}:{n}", api=1, order=-9) for n in names]
    plugin = SimpleNamespace(register_model_sources=hookimpl(lambda: specs))
    assert tokens(tiny, plugins=[plugin]) == tokens(tiny)
    assert str(tiny) in AnswersNothing.asked
    with pytest.raises(ModelSourceError, match="no model 'nowhere'") as caught:
        LLM("nowhere", plugins=[plugin])
    for words in ("'notthere'.*it has no", "'cannotbemade'.*OSError: no disk", "LookupError: lost the"):
        assert re.search(words, str(caught.value)), words


def test_a_models_own_exceptions_name_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = discover().models["llama"].spec.target
    model: Any = load_checked(TargetLoader(), target, Model)

    def raises(error: BaseException) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            raise error

        return call

    with monkeypatch.context() as patch:
        patch.setattr(model, "read_config", raises(KeyError("num_widgets")))
        with pytest.raises(ModelError, match=rf"{target}\.read_config failed: KeyError: 'num_widgets'"):
            tokens(tiny)
        patch.setattr(model, "read_config", lambda hf: {"vocab_size": 3})
        with pytest.raises(ModelError, match=rf"{target}\.read_config returned .*not a nanoengine\.api\.ModelConfig"):
            tokens(tiny)
    monkeypatch.setattr(model, "__init__", raises(SystemExit(2)))
    with pytest.raises(ModelError, match=rf"{target}\.__init__ failed: SystemExit: 2"):
        tokens(tiny)


@pytest.mark.parametrize("architectures", [[5], "LlamaForCausalLM", {"a": 1}])
def test_architectures_that_are_no_list_of_names(tiny: Path, architectures: Any) -> None:
    path = tiny / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": architectures}))
    with pytest.raises(ModelError, match=r'config\.json: "architectures" must be a list of names') as caught:
        tokens(tiny)
    assert repr(architectures) in str(caught.value)
