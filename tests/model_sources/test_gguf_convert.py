"""GGUF -> folder: tensors bit for bit, config as transformers reads it, refusals by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf_expanded import expanded_folder, expanded_tensors
from gguf_zoo import HEAD_SIZE, HEADS, HIDDEN, KEYS, LAYERS, TinyGGUF
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanoengine.api import ModelSourceError
from nanoengine.layers.config_keys import Recorded, unread_keys
from nanoengine.plugins.model_sources import gguf_convert
from nanoengine.plugins.model_sources.gguf_architectures import ARCHITECTURES
from nanoengine.plugins.model_sources.gguf_convert import convert
from nanoengine.plugins.model_sources.gguf_metadata import Metadata, Shape
from nanoengine.plugins.models.gemma2 import Gemma2
from nanoengine.plugins.models.gemma3 import Gemma3
from nanoengine.plugins.models.llama import Llama
from nanoengine.plugins.models.qwen2 import Qwen2
from nanoengine.plugins.models.qwen3 import Qwen3
from nanoengine.setup.start.quantization import quantised_by

HF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


GEMMA_NAMES = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}


def hf_name(name: str, arch: str) -> str:
    names = HF_NAMES | (GEMMA_NAMES if arch.startswith("gemma") else {})
    block, _, rest = name.partition("blk.")[2].partition(".")
    key = rest or name
    stem, _, suffix = key.rpartition(".")
    translated = names.get(key) or f"{HF_NAMES[stem]}.{suffix}"
    return f"model.layers.{block}.{translated}" if rest else translated


def converted(tiny: TinyGGUF, tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(tiny.write(tmp_path / "tiny.gguf"), folder, lambda text: None)
    return folder


def zoo() -> list[TinyGGUF]:
    return [
        TinyGGUF("llama"),
        TinyGGUF("llama", tied=False, biases=True, seed=1),
        TinyGGUF("qwen3", "qwen2"),
        TinyGGUF("qwen3", "qwen2", tied=False, seed=2),
        TinyGGUF("qwen2", "qwen2"),
        TinyGGUF("qwen2", "qwen2", tied=False, seed=3),
        TinyGGUF("gemma2"),
        TinyGGUF("gemma3"),
    ]


ZOO = pytest.mark.parametrize("tiny", zoo(), ids=lambda tiny: f"{tiny.arch}-{'tied' if tiny.tied else 'untied'}")


def mismatches(tiny: TinyGGUF, folder: Path) -> list[str]:
    """Names of tensors that are not, bit for bit, what was stored."""
    found = expanded_tensors(folder)
    names = {name: hf_name(name, tiny.arch) for name in tiny.weights}
    assert found.keys() == set(names.values())
    return [name for name in tiny.weights if not np.array_equal(found[names[name]].float(), tiny.stored(name))]


@ZOO
def test_tensors_are_the_stored_ones_in_hf_layout(tiny: TinyGGUF, tmp_path: Path) -> None:
    folder = converted(tiny, tmp_path)
    assert mismatches(tiny, folder) == []
    dtypes = {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}
    assert dtypes == {torch.float32, torch.float16, torch.bfloat16, torch.uint8}  # each kept its own


@ZOO
def test_blocks_are_kept_and_named_in_config(tiny: TinyGGUF, tmp_path: Path) -> None:
    """uint8 [rows, bytes of a row] for each matrix of a type with blocks, the embedding too; nothing is expanded."""
    folder = converted(tiny, tmp_path)
    blocks = {
        hf_name(name, tiny.arch): kind for name, (_, kind) in tiny.weights.items() if kind not in (Q.F32, Q.F16, Q.BF16)
    }
    given = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert given == {
        "quant_method": "gguf",
        "types": {name.removesuffix(".weight"): kind.name for name, kind in blocks.items()},
        "expanded": {},
    }
    found = load_file(folder / "model.safetensors")
    assert {name for name, tensor in found.items() if tensor.dtype == torch.uint8} == set(blocks)
    assert "model.embed_tokens.weight" in blocks
    for name, kind in blocks.items():
        width = HEADS * HEAD_SIZE if name.endswith("o_proj.weight") else HIDDEN
        assert found[name].shape[1] == width // 32 * gguf.GGML_QUANT_SIZES[kind][1]


def test_mutant_without_unpermuting_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TinyGGUF("llama", biases=True)
    monkeypatch.setattr(gguf_convert, "to_halves", lambda weight, heads: weight)
    wrong = {f"blk.{i}.attn_{which}.{kind}" for i in range(LAYERS) for which in "qk" for kind in ("weight", "bias")}
    assert set(mismatches(tiny, converted(tiny, tmp_path))) == wrong


def test_mutant_with_whole_norms_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TinyGGUF("gemma3")
    whole = replace(ARCHITECTURES["gemma3"], unit_offset=False)
    monkeypatch.setattr(gguf_convert, "read_architecture", lambda meta: ("gemma3", whole))
    assert set(mismatches(tiny, converted(tiny, tmp_path))) == {name for name in tiny.weights if "norm" in name}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_weights_equal_transformers_own_loader(arch: str, tmp_path: Path) -> None:
    tiny = TinyGGUF(arch, "qwen2")
    folder = converted(tiny, tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    theirs = load_gguf_checkpoint(str(tmp_path / "tiny.gguf"), return_tensors=True, model_to_load=model)["tensors"]
    ours = expanded_tensors(folder)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name].float(), theirs[name].float())] == []


GEMMA = {
    "query_pre_attn_scalar": HEAD_SIZE,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_activation": "gelu_pytorch_tanh",
}
REFERENCE: dict[str, dict[str, Any]] = {
    "gemma2": {
        **GEMMA,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "gemma3": {
        **GEMMA,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
}


@ZOO
def test_folder_loads_in_transformers_with_the_same_function(tiny: TinyGGUF, tmp_path: Path) -> None:
    """config.json says the same model: a reference built from the known sizes gives the same logits."""
    folder = expanded_folder(converted(tiny, tmp_path), tmp_path / "expanded")
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    reference = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            tiny.arch.replace("gemma3", "gemma3_text"),
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5, vocab_size=269, max_position_embeddings=512,
            attention_bias=tiny.biases, tie_word_embeddings=tiny.tied,
            **REFERENCE.get(tiny.arch, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ),
        dtype=torch.float32,
    )  # fmt: skip
    state = {
        hf_name(name, tiny.arch): torch.from_numpy(np.array(tiny.stored(name), dtype=np.float32))
        for name in tiny.weights
    }
    unfilled = reference.load_state_dict(state, strict=False)
    assert unfilled.missing_keys == (["lm_head.weight"] if tiny.tied else [])
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = loaded(ids).logits
        torch.testing.assert_close(logits, reference(ids).logits, atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.1


MODELS = {"llama": Llama, "qwen2": Qwen2, "qwen3": Qwen3, "gemma2": Gemma2, "gemma3": Gemma3}


@pytest.mark.parametrize("arch", MODELS)
def test_the_model_reads_every_key_of_config_json(arch: str, tmp_path: Path) -> None:
    hf = Recorded(json.loads((converted(TinyGGUF(arch=arch), tmp_path) / "config.json").read_text()))
    MODELS[arch].read_config(hf)
    quantised_by(hf)
    assert unread_keys(hf) == []


def test_config_and_generation_config(tmp_path: Path) -> None:
    tiny = TinyGGUF("llama")
    tiny.keys |= {"tokenizer.ggml.eot_token_id": 1, "general.sampling.temp": 0.6, "general.sampling.top_k": 20}
    folder = converted(tiny, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5  # stored as float32, 9.99999974e-06
    assert config["head_dim"] == HEAD_SIZE != HIDDEN // config["num_attention_heads"]
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 0, 0)
    assert config["dtype"] == "bfloat16"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 1]
    assert (generation["do_sample"], generation["temperature"], generation["top_k"]) == (True, 0.6, 20)
    assert (folder / "chat_template.jinja").read_text() == tiny.keys["tokenizer.chat_template"]


@pytest.mark.parametrize(("kind", "dtype"), [(Q.F32, "float32"), (Q.F16, "float16"), (Q.BF16, "bfloat16")])
def test_unquantised_file_keeps_its_dtype(kind: Q, dtype: str, tmp_path: Path) -> None:
    tiny = TinyGGUF("llama")
    tiny.weights = {name: (values, kind if values.ndim > 1 else Q.F32) for name, (values, _) in tiny.weights.items()}
    folder = converted(tiny, tmp_path)
    assert mismatches(tiny, folder) == []
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == getattr(torch, dtype)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def llama3_factors(scale: float, low: float = 1.0) -> np.ndarray:
    """The divisors of the frequencies as transformers' own implementation has them, float32 [HEAD_SIZE / 2]."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": scale, "low_freq_factor": low,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = AutoConfig.for_model("llama", head_dim=HEAD_SIZE, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 500000.0 ** (torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    return (plain / scaled).numpy()


@pytest.mark.parametrize("scale", [8.0, 32.0])
def test_llama3_rope_freqs_become_rope_parameters(scale: float, tmp_path: Path) -> None:
    tiny = TinyGGUF("llama", "llama-bpe")
    factors = llama3_factors(scale)
    assert 1.0 < np.sort(factors)[len(factors) // 2] < scale  # the smooth part is really in it
    tiny.weights["rope_freqs.weight"] = (factors, Q.F32)
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(tiny.write(tmp_path / "tiny.gguf"), folder, lambda text: None)
    assert "rope_freqs.weight" not in load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(expanded_folder(folder, tmp_path / "expanded"))
    plain = 1.0 / 500000.0 ** (torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    assert torch.allclose(model.model.rotary_emb.inv_freq, plain / torch.from_numpy(factors), rtol=1e-5)


def test_linear_rope_scaling(tmp_path: Path) -> None:
    tiny = TinyGGUF("llama")
    tiny.keys |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config = json.loads((converted(tiny, tmp_path) / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}


def add_rope(tiny: TinyGGUF) -> None:
    tiny.weights["rope_freqs.weight"] = (llama3_factors(8.0, low=2.0), Q.F32)


def narrow(tiny: TinyGGUF) -> None:
    values, kind = tiny.weights["blk.1.ffn_up.weight"]
    tiny.weights["blk.1.ffn_up.weight"] = (values[:-1], kind)


def key(name: str, value: Any) -> Any:
    return pytest.param(lambda tiny: tiny.keys.__setitem__(name, value), [name.split("llama.")[-1]], id=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda t: setattr(t, "arch", "mamba"), ["'mamba'", "gemma2, gemma3, llama"], id="arch"),
        pytest.param(lambda t: t.keys.update({"tokenizer.ggml.pre": "deepseek-llm"}),
                     ["'deepseek-llm'", "llama-bpe, qwen2, smollm"], id="pre-tokenizer"),
        pytest.param(lambda t: t.keys.pop("tokenizer.ggml.pre"), ["names no pre-tokenizer", "smollm"], id="no-pre"),
        pytest.param(lambda t: t.keys.update({"tokenizer.ggml.model": "bert"}), ["'bert'", "gpt2"], id="bert"),
        pytest.param(lambda t: t.keys.update({"llama.rope.scaling.type": "yarn"}), ["'yarn'", "none, linear"],
                     id="yarn"),
        pytest.param(add_rope, ["rope_freqs.weight", "low_freq_factor"], id="rope_freqs"),
        pytest.param(lambda t: t.weights.pop("blk.1.attn_v.weight"), ["blk.1.attn_v.weight is missing"], id="missing"),
        pytest.param(lambda t: t.weights.update({"blk.0.x.weight": (np.ones(4, np.float32), Q.F32)}),
                     ["blk.0.x.weight is unknown"], id="unknown"),
        pytest.param(narrow, ["blk.1.ffn_up.weight has shape (95, 64), expected (96, 64)"], id="misshapen"),
        pytest.param(lambda t: t.keys.update({"split.count": 3}), ["3 parts"], id="split"),
        pytest.param(lambda t: t.keys.update({"general.type": "adapter"}), ["'adapter'"], id="adapter"),
        pytest.param(lambda t: t.keys.update({"tokenizer.ggml.eos_token_id": 9999}), ["9999", "outside"], id="eos"),
        pytest.param(lambda t: t.keys.update({"tokenizer.ggml.merges": ["q z"]}), ["'q z'", "'qz'"], id="merge"),
        key("llama.rope.freq_base", "high"),
        key("llama.block_count", [1, 2]),
        pytest.param(lambda t: t.keys.update({"tokenizer.ggml.tokens": [1, 2]}), ["must be a list of strings"],
                     id="tokens"),
        pytest.param(lambda t: t.keys.update({"tokenizer.ggml.bos_token_id": "<s>"}), ["'<s>'"], id="bos"),
        key("llama.expert_count", 8),
        key("llama.attention.sliding_window", 4096),
        key("llama.rope.dimension_count", HEAD_SIZE // 2),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(change: Any, words: list[str], tmp_path: Path) -> None:
    tiny = TinyGGUF("llama")
    change(tiny)
    with pytest.raises(ModelSourceError, match=r"^tiny\.gguf: ") as caught:
        converted(tiny, tmp_path)
    assert [word for word in words if word not in str(caught.value)] == []


def test_qwen2_without_biases_is_refused(tmp_path: Path) -> None:
    tiny = TinyGGUF("qwen2", "qwen2")
    del tiny.weights["blk.1.attn_k.bias"]
    with pytest.raises(ModelSourceError, match=r"blk\.1\.attn_k\.bias is missing"):
        converted(tiny, tmp_path)


@pytest.mark.parametrize(("arch", "layers", "scalar"), [("gemma2", 46, 16), ("gemma3", 62, 16), ("gemma3", 46, 32)])
def test_scale_of_the_largest_gemma(arch: str, layers: int, scalar: int) -> None:
    """64 wide, 4 heads of 32: the 27B models are recognised by their number of layers, as llama.cpp does."""
    shape = Shape(hidden=64, ffn=96, layers=layers, heads=4, kv_heads=2, head_size=32)
    meta = Metadata("tiny.gguf", {**KEYS[arch]})
    assert ARCHITECTURES[arch].details(meta, shape, {})["query_pre_attn_scalar"] == scalar


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = TinyGGUF("llama").write(tmp_path / "whole.gguf").read_bytes()
    for name, content in {"text": b"no model at all", "empty": b"", "head": whole[:900], "half": whole[:-5000]}.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelSourceError, match=f"{name}.gguf is damaged or not a GGUF file"):
            convert(path, tmp_path, lambda text: None)
