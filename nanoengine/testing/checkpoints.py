"""Tiny random checkpoints as Hugging Face folders: config.json, model.safetensors, optionally a byte tokenizer.

The weights are large enough that greedy tokens depend on the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
"""Ids 256, 257 and 258 of the byte tokenizer. The last one ends an answer."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

NULL: Any = object()
"""As an override: a null in config.json."""

_SMALL: Mapping[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "torch_dtype": "float32",
}


def tiny_llama(path: str | Path, **options: Any) -> Path:
    """A random `LlamaForCausalLM` in folder `path`; options as in `write_checkpoint`. Returns the folder."""
    base = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 131, "mlp_bias": False}
    return write_checkpoint(path, {**_SMALL, **base}, **options)


def tiny_qwen3(path: str | Path, **options: Any) -> Path:
    """A random `Qwen3ForCausalLM` in folder `path`, head size 20; options as in `write_checkpoint`."""
    base = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151, "head_dim": 20}
    return write_checkpoint(path, {**_SMALL, **base}, **options)


def tiny_qwen2(path: str | Path, **options: Any) -> Path:
    """A random `Qwen2ForCausalLM` in folder `path`; options as in `write_checkpoint`. Returns the folder."""
    base = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 143}
    return write_checkpoint(path, {**_SMALL, **base, "attention_bias": None}, **options)


def tiny_mistral(path: str | Path, **options: Any) -> Path:
    """A random `MistralForCausalLM` in folder `path`, window 11; options as in `write_checkpoint`."""
    base = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 137, "sliding_window": 11}
    return write_checkpoint(path, {**_SMALL, **base, "attention_bias": None}, **options)


_SMALL_GEMMA: Mapping[str, Any] = {
    **_SMALL,
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 4,
    "head_dim": 12,
    "query_pre_attn_scalar": 17,
    "sliding_window": 9,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}


def tiny_gemma2(path: str | Path, **options: Any) -> Path:
    """A random `Gemma2ForCausalLM` in folder `path`: local, global, local, global; options as in `write_checkpoint`."""
    base = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 133}
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 9.0}
    return write_checkpoint(path, {**_SMALL_GEMMA, **base, **caps}, **options)


def tiny_gemma3(path: str | Path, **options: Any) -> Path:
    """A random `Gemma3ForCausalLM` in folder `path`, in the form of the published files.

    Every second layer is global and has a rotation that is slower by a factor of 8. Options as in `write_checkpoint`.
    """
    base = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 139}
    ropes = {
        "rope_parameters": None,
        "rope_theta": 3000.0,
        "rope_local_base_freq": 200.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    return write_checkpoint(path, {**_SMALL_GEMMA, **base, **ropes, "sliding_window_pattern": 2}, **options)


def write_checkpoint(
    path: str | Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    std: float = 0.15,
    files: int = 1,
    dtype: torch.dtype = torch.float32,
    with_tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """Writes a folder for a decoder with Llama's tensor names.

    Args:
        config: config.json. overrides: fields to replace in it; None leaves a field out, `NULL` makes it null.
        seed, std: seed and standard deviation of the random weights. dtype: of the tensors.
        files: 1: model.safetensors; more: so many shards, and their index.
        with_tokenizer: also write a byte-level tokenizer with a chat template; vocab_size becomes at least 259.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, value in {**config, **overrides}.items() if value is not None}
    hf: dict[str, Any] = {name: None if value is NULL else value for name, value in given.items()}
    if with_tokenizer:
        end = 256 + SPECIAL_TOKENS.index("<|im_end|>")
        hf["vocab_size"] = max(hf["vocab_size"], 256 + len(SPECIAL_TOKENS))
        hf["eos_token_id"] = end
        write_byte_tokenizer(path)
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    (path / "config.json").write_text(json.dumps(hf, indent=2))
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _values(name, shape, std, generator).to(dtype) for name, shape in tensor_shapes(hf).items()}
    _save(path, tensors, files)
    return path


def tensor_shapes(hf: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint of a built-in model with this config.json."""
    hidden, middle, heads = hf["hidden_size"], hf["intermediate_size"], hf["num_attention_heads"]
    size = hf.get("head_dim") or hidden // heads
    q, kv = heads * size, (hf.get("num_key_value_heads") or heads) * size
    linears = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (middle, hidden), "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (hf["vocab_size"], hidden)}
    for i in range(hf["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if _has_bias(hf, name):
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if hf["model_type"] in ("qwen3", "gemma3_text"):
            norms |= {"self_attn.q_norm": size, "self_attn.k_norm": size}
        if hf["model_type"].startswith("gemma"):
            norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
        shapes |= {f"{prefix}{name}.weight": (width,) for name, width in norms.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not hf.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (hf["vocab_size"], hidden)
    return shapes


def _has_bias(hf: Mapping[str, Any], linear: str) -> bool:
    if hf["model_type"] == "qwen2":
        return linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return bool(hf.get("attention_bias" if linear.startswith("self_attn") else "mlp_bias"))


def _values(name: str, shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    return 1 + 0.3 * values if "norm" in name else std * values


def _save(path: Path, tensors: Mapping[str, Tensor], files: int) -> None:
    if files == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = {name: tensors[name] for name in names[i::files]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_byte_tokenizer(path: Path) -> None:
    """Writes a tokenizer without merges: ids 0 to 255 are the bytes, followed by `SPECIAL_TOKENS`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=_byte_characters(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    pad, start, end = SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": start,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _byte_characters() -> dict[str, int]:
    """GPT-2's visible character for each byte: the byte if printable in Latin-1, else the next one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
