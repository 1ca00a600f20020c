"""Families on the open decoder through the engine against transformers, float32: chunked, cached, on several ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from nanoengine import SamplingParams
from nanoengine.layers.decoder import NormNames
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.testing.conformance import ConformanceError, check_model

from . import families, tiny
from .compare import Mismatch, compare
from .test_tiny_models import assert_outputs_vary

COUNT = 16
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=3)
WITH_PROMPT = GREEDY.replace(prompt_logprobs=2)
ASKED = tiny.prompts(8, shared=21, longest=24)
Pair = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """family -> folder of the checkpoint, and transformers' model of it, made once."""

    @cache
    def make(family: str) -> Pair:
        folder = families.write(tmp_path_factory.mktemp("family"), family)
        return folder, tiny.reference(folder)

    return make


@pytest.mark.parametrize("family", families.FAMILIES)
def test_chunked_mixed_and_cached(pair: Callable[[str], Pair], family: str) -> None:
    folder, model = pair(family)
    with tiny.llm(folder, max_num_batched_tokens=24) as llm:
        first = llm.generate(ASKED, WITH_PROMPT, use_tqdm=False)
        chunks = llm.stats().chunks
        again = llm.generate(ASKED, GREEDY, use_tqdm=False)
        stats = llm.stats()
        hidden = llm.hidden_states(ASKED[:3])
    assert chunks > 4
    assert stats.mixed_steps > 0
    assert stats.prefix_hit_tokens > 20 * len(ASKED)
    for outputs, params in ((first, WITH_PROMPT), (again, GREEDY)):
        report = compare(model, outputs, params)
        assert report.positions == COUNT * len(ASKED)
        assert report.decided >= 0.97 * report.positions
        assert_outputs_vary(outputs)
    for prompt, got in zip(ASKED, hidden, strict=False):
        with torch.inference_mode():
            want = model.base_model(torch.tensor([prompt])).last_hidden_state[0]
        assert (got - want).square().mean().sqrt() < 1e-5 * want.square().mean().sqrt()


def model_class(folder: Path) -> Any:
    hf = json.loads((folder / "config.json").read_text())
    registry = discover()
    return TargetLoader(registry.plugin_files).load(registry.model_for(tuple(hf["architectures"])).spec.target)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_on_several_ranks(pair: Callable[[str], Pair], family: str) -> None:
    """As threads, with the kit; 4 ranks hold fewer than one KV head each. One rank is the engine above. Two and four of
    the first of each model, the most of its variants."""
    folder, model = pair(family)
    heads, kind = model.config.num_attention_heads, families.FAMILIES[family][0]
    ranks = [size for size in (2, 4) if heads % size == 0] or [1]
    if family != next(name for name, (other, *_) in families.FAMILIES.items() if other == kind):
        ranks = ranks[-1:]
    check_model(model_class(folder), folder, model, ranks=ranks)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("olmo2", {}),  # norms of queries and keys are over a width that ranks share
        ("gpt2", {}),  # tensors are transposed and cut
        ("qwen3-moe, one layer dense", {"enable_expert_parallel": True}),
        ("deepseek-v2, as V2.5", {}),  # latent vectors are whole on each rank
    ],
)
def test_two_processes(pair: Callable[[str], Pair], family: str, options: dict[str, Any]) -> None:
    folder, model = pair(family)
    with tiny.llm(folder, tensor_parallel_size=2, max_num_batched_tokens=24, **options) as llm:
        outputs = llm.generate(ASKED, GREEDY, use_tqdm=False)
    assert compare(model, outputs, GREEDY).positions == COUNT * len(ASKED)


# longrope chooses by the engine's longest request


@pytest.mark.parametrize("name", ["longrope", "su"])
def test_longrope_chooses_by_the_engines_longest_request(name: str, tmp_path: Path) -> None:
    """transformers chooses by the length of each sequence, at 32 tokens."""
    rope = {**families.LONG, "rope_type": name}
    folder = families.write_model(
        tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=32, sliding_window=None
    )
    model, params = tiny.reference(folder), GREEDY.replace(max_tokens=8)
    short, long = tiny.prompts(4, longest=23), tiny.prompts(4, shortest=40, longest=60)
    with tiny.llm(folder, max_model_len=32) as llm:
        compare(model, llm.generate(short, params, use_tqdm=False), params)
    with tiny.llm(folder, max_model_len=96) as llm:
        compare(model, llm.generate(long, params, use_tqdm=False), params)
        outputs = llm.generate(short, params, use_tqdm=False)
    with pytest.raises(Mismatch):  # what the choice changes shows
        compare(model, outputs, params)


def test_dynamic_is_unscaled_up_to_the_files_length_and_scaled_if_more_is_asked_for(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    folder = families.write_model(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=48)
    params = GREEDY.replace(max_tokens=6)
    asked = tiny.prompts(3, shortest=20, longest=40)
    with tiny.llm(folder, max_model_len=None) as llm:
        plain = llm.model.model.rotary_emb.inv_freq
        compare(tiny.reference(folder), llm.generate(asked, params, use_tqdm=False), params)
    with tiny.llm(folder, max_model_len=192) as llm:
        scaled = llm.model.model.rotary_emb.inv_freq
        [output] = llm.generate([tiny.prompts(1, shortest=150, longest=150)[0]], params, use_tqdm=False)
    assert output.error is None
    assert scaled[0] == plain[0]
    assert (scaled[1:] < plain[1:]).all()


# Mutants: each breaks one thing that these families need


def _own_mean_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank normalises by its own heads."""
    from nanoengine.layers import attention

    def norm_shared(norms: Any, values: Any) -> Any:
        return [n.ops.add_rms_norm(x, None, n.weight, n.eps)[0] for n, x in zip(norms, values, strict=True)]

    monkeypatch.setattr(attention, "norm_shared", norm_shared)


def _config(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """The model is built with another trait than its config.json asks for."""
    from nanoengine.layers import decoder

    original = decoder.DecoderLM.__init__

    def init(self: Any, config: Any, ctx: Any) -> None:
        rope = {"rope": replace(config.rope, **changes["rope"])} if "rope" in changes else {}
        original(self, replace(config, **{**changes, **rope}), ctx)

    return lambda monkeypatch: monkeypatch.setattr(decoder.DecoderLM, "__init__", init)


def _no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.layers.norm import LayerNorm

    def add(self: Any, x: torch.Tensor, residual: torch.Tensor | None) -> Any:
        total = x if residual is None else x + residual
        return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + self.eps) * self.weight, total

    monkeypatch.setattr(LayerNorm, "add", add)


def _one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLP reads what attention has added already."""
    from nanoengine.layers import decoder

    def forward(self: Any, x: torch.Tensor, residual: torch.Tensor | None, angles: Any) -> Any:
        norm = self.input_layernorm
        x, residual = decoder.joined(self.self_attn, norm, x, residual, angles)
        return decoder.joined(self.mlp, norm, x, residual)

    monkeypatch.setattr(decoder.DecoderLayer, "forward", forward)


def _no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm's bias is loaded, but not added."""
    from nanoengine.layers.norm import LayerNorm

    original = LayerNorm.add

    def add(self: Any, x: torch.Tensor, residual: torch.Tensor | None) -> Any:
        out, total = original(self, x, residual)
        return out - self.bias, total

    monkeypatch.setattr(LayerNorm, "add", add)


def _positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned positions are counted from one."""
    from nanoengine.plugins.models.gpt2 import GPT2

    original = GPT2.embed
    monkeypatch.setattr(GPT2, "embed", lambda self, ids, positions: original(self, ids, positions + 1))


GLM, UNSCALED = "glm4, biases, a quarter rotated", "gpt2, a head, narrow, unscaled"


def _routing(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """The router chooses or weighs otherwise."""
    from nanoengine.layers import moe

    original = moe.Router.__init__

    def init(self: Any, name: str, sizes: Any, routing: Any, *args: Any, **options: Any) -> None:
        original(self, name, sizes, replace(routing, **changes), *args, **options)

    return lambda monkeypatch: monkeypatch.setattr(moe.Router, "__init__", init)


def _ungated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the shared experts make is not scaled."""
    from nanoengine.layers import moe

    def shared(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.shared_expert(hidden)
        return out

    monkeypatch.setattr(moe.SparseMLP, "_shared", shared)


def _first_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank takes its own part of the experts' width for all of it."""
    from nanoengine.layers import moe

    monkeypatch.setattr(moe.SparseMLP, "forward", lambda self, hidden: self.experts(hidden, *self.gate(hidden)))
    monkeypatch.setattr(moe.SparseMLP, "joined", lambda self, *args, **rest: moe.Sublayer.joined(self, *args, **rest))


def _no_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens go to their own experts only."""
    from nanoengine.layers import moe

    monkeypatch.setattr(moe.SparseMLP, "_shared", lambda self, hidden: None)


def _shared_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank adds all of what the shared experts make, and then the ranks are summed."""
    from nanoengine.layers import moe

    original = moe.SparseMLP._shared
    monkeypatch.setattr(moe.SparseMLP, "_shared", lambda self, hidden: self.tp.all_reduce(original(self, hidden)))


def _correction(*, choice: bool, weights: bool) -> Callable[[pytest.MonkeyPatch], None]:
    """The correction of scores goes elsewhere than into the choice alone."""
    from nanoengine.kernels import experts
    from nanoengine.kernels.ops import Ops

    def route(self: Any, logits: Any, routing: Any, correction: Any, real: Any) -> Any:
        ids, mass = experts.route(logits, routing, correction if choice else None, real)
        chosen = (logits.sigmoid() + correction * weights).gather(1, ids.long())
        return ids, mass if not weights else routing.scale * chosen / chosen.sum(-1, keepdim=True)

    return lambda monkeypatch: monkeypatch.setattr(Ops, "route", route)


def _key_not_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of the key that heads share stays as it is."""
    from nanoengine.layers.rope import Angles

    original = Angles.rotate
    monkeypatch.setattr(Angles, "rotate", lambda self, x: x if x.shape[1] == 1 else original(self, x))


def _latent(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    from nanoengine.layers import latent

    original = latent.read_latent

    def read_latent(fields: Any) -> Any:
        return replace(original(fields), **changes)

    return lambda monkeypatch: monkeypatch.setattr("nanoengine.plugins.models.deepseek_v2.read_latent", read_latent)


V2_LITE, V2, WIDE = "deepseek-v2, as V2-Lite", "deepseek-v2, as V2.5", "deepseek-v2, biases, wide values"


def _no_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are loaded, but attention does not learn of them."""
    from nanoengine.layers.attention import DecoderAttention

    original = DecoderAttention.attention_spec
    monkeypatch.setattr(
        DecoderAttention, "attention_spec", lambda self, *args: replace(original(self, *args), sinks=None)
    )


def _gates_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read as if all gates were before all ups."""
    from nanoengine.plugins.models.gpt_oss import GptOss, moe_weights

    monkeypatch.setattr(GptOss, "weights", moe_weights(router="router", transposed=True))


QWEN_MOE = "qwen3-moe, one layer dense"
YARN_QWEN, YARN_LLAMA = "qwen3, yarn", "llama, yarn with its numbers"
MUTANTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None], int]] = {
    "each rank has a mean square of its own": ("olmo2", _own_mean_square, 2),
    "no norm after the MLP": ("olmo2", _config(norms=NormNames(after_attention="post_attention_layernorm")), 1),
    "residual not scaled": ("granite", _config(residual_scale=1.0), 1),
    "logits not scaled": ("granite", _config(logit_scale=1.0), 1),
    "scores scaled by head size": ("granite", _config(score_scale=None), 1),
    "embedding not scaled": ("granite", _config(embedding_scale=1.0), 1),
    "window one long": ("phi3, a window, all heads", _config(windows=(10, 10, 10)), 1),
    "all of a head rotated": ("phi3, partly rotated", _config(rope={"partial": 1.0}), 1),
    "halves rotated": ("cohere", _config(rope={"interleaved": False}), 1),
    "no mean in the norm": ("cohere", _no_mean, 1),
    "attention before MLP": ("cohere", _one_after_the_other, 1),
    "one norm for both": ("gpt_neox", _config(norms=NormNames(before_attention="input_layernorm")), 1),
    "GELU not exact": ("gpt_neox", _config(activation="gelu_tanh"), 1),
    "no bias in the norm": ("starcoder2", _no_bias, 1),
    "window one short": ("starcoder2, a window, no biases, a head", _config(windows=(8, 8, 8)), 1),
    "all layers rotated": ("smollm3", _config(rotated=()), 1),
    "the other layers rotated": ("smollm3", _config(rotated=(False, True, False)), 1),
    "positions one off": ("gpt2", _positions, 1),
    "scores scaled": (UNSCALED, _config(score_scale=None), 1),
    "halves of a part rotated": (GLM, _config(rope={"interleaved": False}), 1),
    "half instead of a quarter rotated": (GLM, _config(rope={"partial": 0.5}), 1),
    "no norm after attention": (
        "glm4",
        _config(
            norms=NormNames(
                before_attention="input_layernorm",
                before_mlp="post_attention_layernorm",
                after_mlp="post_mlp_layernorm",
            )
        ),
        1,
    ),
    "weights not renormalised": (QWEN_MOE, _routing(renormalise=False), 1),
    "one expert too few": (QWEN_MOE, _routing(top_k=2), 1),
    "sigmoid for softmax": (QWEN_MOE, _routing(scoring="sigmoid", renormalise=True), 1),
    "all layers have experts": (QWEN_MOE, _config(sparse=(True, True, True)), 1),
    "parts of experts not summed": (QWEN_MOE, _first_experts, 2),
    "shared expert not scaled": ("qwen2-moe", _ungated, 1),
    "groups ignored": (V2, _routing(groups=1, top_groups=1), 1),
    "one group too many": (V2, _routing(top_groups=3), 1),
    "groups by two scores": (V2, _routing(group_best=2), 1),
    "groups by one score": ("deepseek-v3", _routing(group_best=1), 1),
    "weights of experts not scaled": (V2, _routing(scale=1.0), 1),
    "no shared experts": (V2_LITE, _no_shared, 1),
    "shared experts summed twice": (V2_LITE, _shared_twice, 2),
    "scores not corrected": ("deepseek-v3", _correction(choice=False, weights=False), 1),
    "weights corrected too": ("deepseek-v3", _correction(choice=True, weights=True), 1),
    "scores without yarn's factor": (V2_LITE, _config(score_scale=16**-0.5), 1),
    "shared key not rotated": (V2_LITE, _key_not_rotated, 1),
    "halves of the shared key rotated": (V2_LITE, _config(rope={"interleaved": False}), 1),
    "latent norms with the model's eps": (WIDE, _latent(eps=1e-3), 1),
    "softmax over all experts": ("mixtral", _routing(scoring="softmax"), 1),
    "no sinks": ("gpt_oss", _no_sinks, 1),
    "gates before ups": ("gpt_oss", _gates_first, 1),
    "a window in every layer": ("gpt_oss", _config(windows=(9, 9, 9)), 1),
    "yarn without its magnitude": (YARN_QWEN, _config(rope={"attention_factor": 1.0}), 1),
    "yarn not scaled": (YARN_QWEN, _config(rope={"kind": "default"}), 1),
    "yarn's borders rounded": (YARN_LLAMA, _config(rope={"truncate": True}), 1),
    "yarn's scales swapped": (YARN_LLAMA, _config(rope={"mscale": 1.5, "mscale_all_dim": 0.7}), 1),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant: str, pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    family, patch, ranks = MUTANTS[mutant]
    folder, model = pair(family)
    cls = model_class(folder)
    patch(monkeypatch)
    with pytest.raises(ConformanceError):
        check_model(cls, folder, model, ranks=(ranks,))
