"""Loading is complete or an error that names the tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_harness import model_class
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoengine.api import ModelError, WeightsError
from nanoengine.api.parallel import SingleRank
from nanoengine.layers.rope import RopeConfig
from nanoengine.plugins.models.gemma3 import Gemma3, Gemma3WithImages
from nanoengine.plugins.models.llama import Llama
from nanoengine.setup.start.build_model import BuiltModel, build_model, kv_groups
from nanoengine.setup.start.weights import LoadReport, dummy_weights, load_weights
from nanoengine.testing.checkpoints import (
    NULL,
    tiny_gemma2,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
    tiny_qwen2,
    tiny_qwen3,
)


def load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[BuiltModel, LoadReport]:
    hf = json.loads((path / "config.json").read_text())
    built = build_model(model_class(hf), hf, tp=SingleRank(), dtype=dtype, device="cpu")
    return built, load_weights(built.model, built.config, path, SingleRank())


def change(path: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of model.safetensors; None removes one. `__` in a name stands for a dot."""
    held = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        held.pop(name.replace("__", "."), None)
        if tensor is not None:
            held[name.replace("__", ".")] = tensor
    save_file(held, path / "model.safetensors")


def test_sharded_files_and_single_file_load_the_same(tmp_path: Path) -> None:
    one, report = load(tiny_llama(tmp_path / "one"))
    three, sharded = load(tiny_llama(tmp_path / "three", files=3))
    assert len(list((tmp_path / "three").glob("*.safetensors"))) == 3
    assert report.num_tensors == sharded.num_tensors == 3 + 3 * 9
    assert report.num_bytes == sharded.num_bytes == 4 * sum(p.numel() for p in one.model.parameters())
    for a, b in zip(one.model.parameters(), three.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_dtypes_are_converted(tmp_path: Path) -> None:
    built, _ = load(tiny_llama(tmp_path, dtype=torch.float16), torch.bfloat16)
    want = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    got = built.model.get_parameter("model.norm.weight")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.to(torch.bfloat16))


def test_everything_wrong_is_named_at_once(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    change(
        path,
        model__layers__1__self_attn__k_proj__weight=None,
        model__layers__2__mlp__up_proj__weight=torch.zeros(3, 4),
        model__layers__0__input_layernorm__weight=torch.zeros(48, dtype=torch.int32),
        model__layers__9__mlp__up_proj__weight=torch.zeros(2),
        model__layers__0__self_attn__q_proj__bias=torch.zeros(48),
    )
    with pytest.raises(WeightsError) as caught:
        load(path)
    message = str(caught.value)
    assert "1 missing: model.layers.1.self_attn.k_proj.weight" in message
    assert "2 unexpected: model.layers.0.self_attn.q_proj.bias, model.layers.9.mlp.up_proj.weight" in message
    assert "model.layers.2.mlp.up_proj.weight [3, 4], expected [56, 48]" in message
    assert "model.layers.0.input_layernorm.weight of dtype I32" in message


def test_long_lists_are_cut(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    change(path, **{f"extra{i}": torch.zeros(1) for i in range(9)})
    with pytest.raises(WeightsError, match="9 unexpected: extra0, extra1, extra2, extra3, extra4 and 4 more"):
        load(path)


def damage(path: Path, how: str) -> str:
    """Breaks the checkpoint; returns what the error must say."""
    file = path / ("model-00002-of-00003.safetensors" if "shard" in how else "model.safetensors")
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
        return "cannot be read, it may be incomplete"
    if how == "not safetensors":
        file.write_bytes(b"no header at all, and no tensors")
        return "cannot be read, it may be incomplete"
    if how == "gone":
        file.unlink()
        return "no model.safetensors or model.safetensors.index.json"
    if how == "shard gone":
        file.unlink()
        return "names model-00002-of-00003.safetensors, which is missing"
    if how == "shard lacks a tensor":
        held = load_file(file)
        del held[next(iter(held))]
        save_file(held, file)
        return "1 missing"
    (path / "model.safetensors.index.json").write_text("{}")
    return "is not a safetensors index"


@pytest.mark.parametrize(
    "how", ["truncated", "not safetensors", "gone", "shard gone", "shard lacks a tensor", "shard index broken"]
)
def test_damaged_files(how: str, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, files=3 if "shard" in how else 1)
    message = damage(path, how)
    with pytest.raises(WeightsError, match=message):
        load(path)


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}, "rope_type must be one of.*'ntk'"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor"),
    ({"rope_theta": 5e5}, "contradicts"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_act": "gelu"}, "hidden_act must be one of silu"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ({"num_attention_heads": "six"}, "num_attention_heads must be a positive integer"),
    ({"num_attention_heads": 7}, "must be a multiple of num_attention_heads 7"),
    ({"num_attention_heads": 5, "num_key_value_heads": 2, "head_dim": 8}, "5 attention heads"),
    ({"head_dim": 7}, "even head size"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS)
def test_configs_that_are_not_supported(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    hf = {**json.loads((tiny_llama(tmp_path) / "config.json").read_text()), **fields}
    hf = {name: value for name, value in hf.items() if value is not None}
    with pytest.raises(ModelError, match=message):
        build_model(Llama, hf, tp=SingleRank(), dtype=torch.float32, device="meta")


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (tiny_qwen3, {"head_dim": NULL}, "head_dim must not be null"),
    (tiny_qwen3, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must be a list of 3 of"),
    (tiny_qwen3, {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types must be"),
    (tiny_qwen2, {"layer_types": ["sliding_attention"] * 3}, "there is no sliding_window"),
    (tiny_qwen2, {"use_sliding_window": True, "sliding_window": "all"}, "sliding_window must be a positive integer"),
    (tiny_qwen2, {"use_sliding_window": True, "max_window_layers": 1.5}, "max_window_layers must be an integer"),
    (tiny_mistral, {"layer_types": ["full_attention"] * 3}, "layer_types"),
    (tiny_mistral, {"sliding_window": 0}, "sliding_window must be a positive integer, not 0"),
    (tiny_gemma2, {"hidden_activation": "relu"}, "hidden_activation must be one of silu, swish, gelu_py"),
    (tiny_gemma2, {"use_bidirectional_attention": True}, "use_bidirectional_attention = true is not supported"),
    (tiny_gemma2, {"final_logit_softcapping": -1.0}, "final_logit_softcapping must be a positive number"),
    (tiny_gemma3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
    (tiny_gemma3, {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope_type must be one of"),
]


@pytest.mark.parametrize(("make", "fields", "message"), REFUSED)
def test_each_model_names_what_it_does_not_support(
    make: Any, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    hf = json.loads((make(tmp_path) / "config.json").read_text())
    hf = {name: None if value is NULL else value for name, value in {**hf, **fields}.items() if value is not None}
    with pytest.raises(ModelError, match=message):
        model_class(hf).read_config(hf)


# Fields of published config.json files that tell the families' sizes apart, and what must be read from them.
GEMMA_3_1B = {
    "head_dim": 256, "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
}  # fmt: skip
GEMMA_3_27B = {
    "text_config": {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
        "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}  # fmt: skip
GEMMA_3_4B = {
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}  # fmt: skip


def test_published_gemma_3_configs() -> None:
    small = Gemma3.read_config(GEMMA_3_1B)
    assert (small.windows.count(None), small.windows[:7]) == (4, (512,) * 5 + (None, 512))
    assert (small.rope, small.local_rope) == (RopeConfig(theta=1e6), RopeConfig(theta=1e4))
    assert (small.num_kv_heads, small.score_scale, small.logit_cap, small.tied) == (1, 1 / 16, None, True)
    middle = Gemma3WithImages.read_config(GEMMA_3_4B)
    assert (middle.num_heads, middle.num_kv_heads, middle.head_size, middle.vocab_size) == (8, 4, 256, 262208)
    assert (middle.max_model_len, middle.eps, middle.tied) == (131072, 1e-6, True)
    large = Gemma3WithImages.read_config(GEMMA_3_27B)
    assert (large.head_size, large.num_layers, large.windows[5], large.windows[61]) == (128, 62, None, 1024)
    assert large.score_scale == pytest.approx(168**-0.5)
    assert large.rope == middle.rope == RopeConfig(theta=1e6, kind="linear", factor=8.0)
    assert large.local_rope == RopeConfig(theta=1e4)


@pytest.mark.parametrize("text", [[], "gemma3_text", 7])
def test_a_nested_config_must_be_an_object(text: Any) -> None:
    hf = {**GEMMA_3_4B, "text_config": text}
    with pytest.raises(ModelError, match="text_config"):
        Gemma3WithImages.read_config(hf)


def test_norm_weights_less_one_are_kept_whole_in_float32(tmp_path: Path) -> None:
    path = tiny_gemma3(tmp_path, dtype=torch.bfloat16)
    built, _ = load(path, torch.bfloat16)
    stored = load_file(path / "model.safetensors")["model.norm.weight"]
    got = built.model.get_parameter("model.norm.weight")
    assert got.dtype == torch.float32
    assert torch.equal(got, 1.0 + stored.float())
    assert not torch.equal(got, got.bfloat16().float())  # as bfloat16 they would be others
    dummy_weights(built.model, 0, SingleRank())
    assert torch.equal(got, torch.ones_like(got))


def test_kv_groups_follow_kv_needs(tmp_path: Path) -> None:
    built, _ = load(tiny_llama(tmp_path))
    ((spec, layers),) = kv_groups(built.attention_layers)
    assert (spec.num_kv_heads, spec.head_size, spec.dtype) == (2, 8, "float32")
    assert layers == built.attention_layers
    built, _ = load(tiny_gemma3(tmp_path / "gemma"))
    (local, first), (everywhere, second) = kv_groups(built.attention_layers)
    assert (local.window, everywhere.window) == (9, None)
    assert (first, second) == (built.attention_layers[::2], built.attention_layers[1::2])


def test_byte_tokenizer_round_trip(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = tiny_llama(tmp_path, with_tokenizer=True)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "Héllo  wörld\n\t 1 \U0001f600"
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|im_end|>").ids == [258]
    assert json.loads((path / "config.json").read_text())["vocab_size"] == 259
    load(path)
