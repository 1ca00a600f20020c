"""What a model's attention layers ask for, through the model kit and the engine, against a plain formula."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import feature_models
import pytest
import torch
from feature_models import TEMPERATURE, Kinds, hidden_states, logits, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanoengine import LLM, SamplingParams
from nanoengine.api import AttentionFeature, AttentionLayerSpec, AttentionNeed, ModelError, UnsupportedError
from nanoengine.api.parallel import ShapesOnly, SingleRank
from nanoengine.layers.decoder import DecoderConfig
from nanoengine.plugins.attention_backends.flash_attn import FlashAttn
from nanoengine.plugins.attention_backends.torch_paged import TorchPaged
from nanoengine.plugins.models.llama import Llama
from nanoengine.setup.plugins.discover import choose_attention, discover
from nanoengine.setup.start.build_model import Builder, build_model, kv_groups
from nanoengine.setup.start.weights import load_weights
from nanoengine.testing.checkpoints import tiny_llama
from nanoengine.testing.conformance import ConformanceError, check_model

FEATURES: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": True},
    "narrow values": {"value_size": 4},
    "wide values": {"value_size": 12},
    "shared": {"shares": True},
    "all": {"sinks": True, "value_size": 12, "shares": True},
}


@pytest.mark.parametrize("kinds", FEATURES.values(), ids=list(FEATURES))
def test_a_model_with_the_feature_equals_its_formula_in_chunks_and_on_two_ranks(
    kinds: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path, **kinds)
    check_model(Kinds, path, lambda ids: logits(path, ids[0]))


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ({"causal": False}, r"\['layers\.1\.attn'\] look ahead, and the kit divides prompts"),
        ({"temperature": 1.7}, r"lacks what layers need: \{'tests\.temperature': 'layers\.1\.attn'\}"),
    ],
)
def test_the_model_kit_says_what_it_cannot_check(kinds: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path, **kinds)
    with pytest.raises(ConformanceError, match=words):
        check_model(Kinds, path, lambda ids: logits(path, ids[0]))


@pytest.mark.parametrize("name", ["sinks", "shares"])
def test_without_the_feature_the_result_would_be_another(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, sinks=True, shares=True)
    with pytest.raises(ConformanceError, match="off by"):
        check_model(Kinds, path, lambda ids: logits(path, ids[0], **{name: False}), ranks=(1,))


class Rank(ShapesOnly):
    def __init__(self, size: int, rank: int) -> None:
        super().__init__(size)
        self.rank = rank


class LlamaWithSinks(Llama):
    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        return replace(super().read_config(hf), sinks=True)


@pytest.mark.parametrize("size", [1, 2])
def test_a_decoders_sinks_are_loaded_by_heads(size: int, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    hf = json.loads((path / "config.json").read_text())
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    tensors = load_file(path / "model.safetensors")
    for index in range(layers):
        tensors[f"model.layers.{index}.self_attn.sinks"] = torch.arange(heads) + 100.0 * index
    save_file(tensors, path / "model.safetensors")
    place: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    for rank in range(size):
        tp = Rank(size, rank) if size > 1 else SingleRank()
        built = build_model(LlamaWithSinks, hf, tp=tp, **place)
        load_weights(built.model, built.config, path, tp)
        share = heads // size
        for index, layer in enumerate(built.attention_layers):
            assert layer.spec.sinks is not None
            want = torch.arange(heads)[rank * share : (rank + 1) * share] + 100.0 * index
            assert torch.equal(layer.spec.sinks, want)


def log_probs(llm: LLM, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The greedy tokens of a prompt, and their log-probs."""
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0)
    [sample] = llm.generate([prompt], params, use_tqdm=False)[0].outputs
    assert sample.logprobs is not None
    tokens = list(sample.token_ids)
    return tokens, [each[token].logprob for token, each in zip(tokens, sample.logprobs, strict=True)]


def engine(path: Path, **options: Any) -> LLM:
    given = {"dtype": "float32", "max_model_len": 64, "num_gpu_blocks_override": 32, **options}  # on a GPU too
    return LLM(path, skip_tokenizer_init=True, plugins=[feature_models], **given)


def agrees(path: Path, prompt: list[int], found: tuple[list[int], list[float]], **instead: Any) -> bool:
    tokens, got = found
    want = logits(path, torch.tensor(prompt + tokens), **instead).log_softmax(-1)[len(prompt) - 1 : -1]
    return max(abs(float(row[t]) - each) for row, t, each in zip(want, tokens, got, strict=True)) < 5e-4


PROMPT = [(7 * i) % 37 for i in range(30)]


def test_sinks_shared_layers_and_wide_values_through_the_engine_chunked_and_cached(tmp_path: Path) -> None:
    path = write(tmp_path, **FEATURES["all"])
    with engine(path, attention="torch", max_num_batched_tokens=16) as llm:
        for _ in range(2):  # the second time from the prefix cache
            found = log_probs(llm, PROMPT)
            assert agrees(path, PROMPT, found)
    assert not agrees(path, PROMPT, found, sinks=False)


def hidden(path: Path, prompts: list[list[int]], **options: Any) -> list[float]:
    """How far the hidden states of each prompt are from the formula's."""
    with engine(path, attention="torch", **options) as llm:
        found = llm.hidden_states(prompts)
    want = [hidden_states(path, torch.tensor(prompt)) for prompt in prompts]
    return [float((got - right).abs().max()) for got, right in zip(found, want, strict=True)]


def test_attention_that_looks_ahead_runs_whole_prompts(tmp_path: Path) -> None:
    path = write(tmp_path, causal=False)
    prompts = [PROMPT, [*PROMPT, 3], PROMPT[:20] * 3, [4]]
    assert max(hidden(path, prompts)) < 1e-4
    other = hidden_states(path, torch.tensor(PROMPT), causal=True)
    assert (other - hidden_states(path, torch.tensor(PROMPT))).abs().max() > 1e-2


def test_in_chunks_the_result_would_be_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoengine.build.needs_whole_prompts", lambda built: False)
    assert max(hidden(write(tmp_path, causal=False), [PROMPT], max_num_batched_tokens=16)) > 1e-2


def first_log_probs(llm: LLM, prompts: list[list[int]], max_tokens: int | None = 1) -> list[Any]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=0)
    return llm.generate(prompts, params, use_tqdm=False)


def test_prompts_of_a_batch_are_not_divided_by_a_small_budget(tmp_path: Path) -> None:
    """Eleven prompts, of which a step has one or two; a prefix that all share is computed by each."""
    path = write(tmp_path, causal=False)
    prompts = [PROMPT[: 10 + 2 * i] for i in range(11)]
    with engine(path, attention="torch", max_num_batched_tokens=32) as llm:
        outputs = first_log_probs(llm, [*prompts, PROMPT + PROMPT[:10]])
        assert llm.stats().chunks == 0
        assert llm.stats().steps > 5
        assert outputs[-1].error.code == "does_not_fit"
        assert "40 tokens must run in one step, which has 32: raise max_num_batched_tokens" in str(outputs[-1].error)
        for prompt, output in zip(prompts, outputs, strict=False):
            [sample] = output.outputs
            want = logits(path, torch.tensor(prompt))[-1].log_softmax(-1)
            [token] = sample.token_ids
            assert abs(sample.logprobs[0][token].logprob - float(want[token])) < 5e-4


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_of_attention_that_looks_ahead_are_of_whole_prompts(pooling: Any, tmp_path: Path) -> None:
    path = write(tmp_path, causal=False)
    prompts = [PROMPT[: 10 + 2 * i] for i in range(11)]
    with engine(path, attention="torch", max_num_batched_tokens=32) as llm:
        *outputs, refused = llm.embed([*prompts, PROMPT + PROMPT[:10]], pooling, normalize=False, use_tqdm=False)
        assert llm.stats().chunks == 0
    assert refused.error is not None
    assert "40 tokens must run in one step, which has 32: raise max_num_batched_tokens" in str(refused.error)
    for prompt, output in zip(prompts, outputs, strict=True):
        hidden = hidden_states(path, torch.tensor(prompt))
        want = hidden.mean(0) if pooling == "mean" else hidden[-1]
        assert output.embedding is not None
        assert float((torch.tensor(output.embedding) - want).abs().max()) < 1e-4


def test_where_memory_runs_out_whole_prompts_run_alone_and_one_that_is_too_large_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, forward = [], Kinds.forward

    def small(self: Kinds, input_ids: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(input_ids))
        if len(input_ids) > 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids, *rest)

    path, lengths = write(tmp_path, causal=False), [20, 22, 30, 18, 6, 30, 5, 24]
    with engine(path, attention="torch") as llm:
        monkeypatch.setattr(Kinds, "forward", small)
        outputs = first_log_probs(llm, [PROMPT[:n] for n in lengths])
    assert [output.error and output.error.code for output in outputs] == [
        "out_of_memory" if n == 30 else None for n in lengths
    ]
    assert max(sizes) > 100  # memory did run out
    assert sizes.count(30) == 4, "the allocator gives back what it keeps before a second try"
    for length, output in zip(lengths, outputs, strict=True):
        if length < 30:
            [sample] = output.outputs
            want = logits(path, torch.tensor(PROMPT[:length]))[-1].log_softmax(-1)
            assert abs(sample.logprobs[0][sample.token_ids[0]].logprob - float(want[sample.token_ids[0]])) < 5e-4


@pytest.mark.parametrize("max_tokens", [2, None])
def test_a_model_that_looks_ahead_generates_one_token(max_tokens: int | None, tmp_path: Path) -> None:
    with engine(write(tmp_path, causal=False), attention="torch") as llm:
        [output] = first_log_probs(llm, [PROMPT], max_tokens)
        assert output.error.code == "not_supported"
        assert f"looks ahead: a request needs max_tokens=1, not {max_tokens}" in str(output.error)
        assert first_log_probs(llm, [PROMPT])[0].error is None


def test_a_plugins_model_gets_its_feature_from_its_plugins_backend(tmp_path: Path) -> None:
    path = write(tmp_path, temperature=1.7)
    with engine(path) as llm:
        found = log_probs(llm, PROMPT)
    assert agrees(path, PROMPT, found)
    assert not agrees(path, PROMPT, found, temperature=1.0)


def test_a_backend_that_lacks_the_feature_is_refused_with_the_layer_and_the_backends_that_have_it(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, temperature=1.7)
    words = r"'torch' does not support this model here \(attention=auto takes 'tempered'\).*"
    with pytest.raises(UnsupportedError, match=words + r"does not support tests\.temperature \(for layers\.1\.attn\)"):
        engine(path, attention="torch")
    with pytest.raises(UnsupportedError, match=r"TorchPaged does not support .*auto takes 'tempered'.*layers\.1\.attn"):
        engine(path, attention=TorchPaged)


def test_where_no_backend_does_each_says_why() -> None:
    words = r"\(no installed backend does\): .*layers\.1\.attn.*; tempered: supports .*, not float64"
    need = AttentionNeed(
        device="cpu",
        dtype="float64",
        head_sizes=frozenset({8}),
        features=frozenset({TEMPERATURE}),
        wanted_by={TEMPERATURE: ("layers.1.attn",)},
    )
    registry = discover(extra=[("tests", feature_models)])
    with pytest.raises(UnsupportedError, match=words):
        choose_attention(registry, need, "torch")


def test_layers_that_need_a_feature_are_counted() -> None:
    need = AttentionNeed(
        device="cuda",
        dtype="bfloat16",
        head_sizes=frozenset({64}),
        features=frozenset({AttentionFeature.SINKS}),
        wanted_by={AttentionFeature.SINKS: ("a", "b", "c")},
    )
    assert "does not support attention sinks (for a and 2 more)" in FlashAttn.unsupported(need)
    assert "does not support attention sinks" in FlashAttn.unsupported(replace(need, wanted_by={}))


def test_a_layer_that_shares_takes_no_memory(tmp_path: Path) -> None:
    place: dict[str, Any] = {"tp": SingleRank(), "dtype": torch.float32, "device": "meta"}
    for shares, count in ((True, 1), (False, 2)):
        config = {"architectures": ["KindsForCausalLM"], "value_size": 8, "sinks": False, "causal": True}
        built = build_model(Kinds, {**config, "shares": shares, "temperature": 1.0}, **place)
        [(_, layers)] = kv_groups(built.attention_layers)
        assert len(layers) == count


PLAIN = AttentionLayerSpec(num_heads=4, num_kv_heads=2, head_size=8, scale=1.0)


def builder() -> Builder:
    made = Builder(SingleRank(), torch.float32, torch.device("cpu"))
    made.attention("layers.0.attn", PLAIN)
    made.attention("layers.1.attn", replace(PLAIN, shares="layers.0.attn"))
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shares": "layers.0.atn"}, r"shares='layers\.0\.atn' is no earlier .*did you mean 'layers\.0\.attn'"),
        ({"shares": "layers.1.attn"}, r"shares='layers\.1\.attn' is no earlier .* that stores K and V"),
        ({"shares": 3}, "shares=3 is no earlier"),
        ({"shares": "layers.0.attn", "window": 4}, r"cannot share the K and V of layers\.0\.attn: .*window=4"),
        ({"shares": "layers.0.attn", "num_kv_heads": 1}, "cannot share the K and V"),
        ({"shares": "layers.0.attn", "value_size": 16}, "cannot share the K and V"),
        ({"sinks": [0.0] * 4}, r"sinks must be a float Tensor of \[num_heads\] = \(4,\), not \[0"),
        ({"sinks": torch.zeros(3)}, r"not torch\.float32 \(3,\)"),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, r"not torch\.int64 \(4,\)"),
        ({"sinks": torch.zeros(8)[::2]}, "sinks must be contiguous"),
        ({"value_size": 0}, "value_size must be None or an integer of at least 1, not 0"),
        ({"causal": 0}, "causal must be True or False, not 0"),
        ({"extras": {"bias": 1}}, "extras: 'bias' is no attention feature: one of a plugin is named 'package.feature'"),
        ({"extras": {"sliding window": 1}}, "'sliding window' is asked for by a field of AttentionLayerSpec"),
        ({"extras": [TEMPERATURE]}, "extras must be a mapping of features"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_by_the_layers_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match="layers.2.attn.*" + words):
        builder().attention("layers.2.attn", replace(PLAIN, **changes))


def test_a_layer_that_shares_stores_nothing() -> None:
    layer = builder().attention("layers.2.attn", replace(PLAIN, shares="layers.0.attn"))
    layer.bind(TorchPaged.__new__(TorchPaged), 0)
    assert layer.kv_cache() is None
    x: Tensor = torch.zeros(1, 4, 8)
    with pytest.raises(ModelError, match=r"layers\.2\.attn reads the K and V of layers\.0\.attn and stores none"):
        layer(x, x, x)


def test_the_shared_layer_is_no_module_of_the_one_that_reads_it() -> None:
    holder = nn.Module()
    holder.attn = builder().attention("layers.2.attn", replace(PLAIN, shares="layers.0.attn"))
    assert [name for name, _ in holder.named_modules()] == ["", "attn"]
