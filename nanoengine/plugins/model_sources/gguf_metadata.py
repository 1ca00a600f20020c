"""GGUF metadata -> config.json and generation_config.json. A value that is not supported raises an error that names it.

Keys are those of the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nanoengine.api import ModelSourceError

T = TypeVar("T")

POOLING: Mapping[int, str] = {1: "mean", 2: "cls", 3: "lasttoken", 4: "rank"}
"""llama.cpp's numbers -> sentence-transformers' names, or the name of what it does not have."""

_SAMPLING_KEYS = {
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "temp": "temperature",
    "penalty_repeat": "repetition_penalty",
}

# our name -> NAME in the key tokenizer.ggml.NAME_token_id
_TOKEN_KINDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}
_CONTROL = 3  # token type
_END_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
})  # fmt: skip

# The only frequencies that llama.cpp's converter writes as rope_freqs.weight, with the constants of every published
# Llama 3 model. A file with other constants is rejected.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Metadata:
    """The key-value pairs of a file. Its errors name the file and the key."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name = name
        self.values = values

    def error(self, text: str) -> ModelSourceError:
        return ModelSourceError(f"{self.name}: {text:.2000}")

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def require(self, key: str) -> Any:
        """The value of the key. Raises `ModelSourceError` if the file does not have it."""
        if key not in self.values:
            raise self.error(f"key {key} is missing; it is needed to identify the model")
        return self.values[key]

    def positive_int(self, key: str, default: int | None = None) -> int:
        """A positive integer, or a list with the same value for all layers. Without a default, the key is required.

        Raises `ModelSourceError` for anything else.
        """
        value = self.require(key) if default is None else self.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
            raise self.error(f"key {key} must be one positive integer below 2**31, not {value!r:.200}")
        return value

    def real(self, key: str, default: float | None = None, *, positive: bool = False) -> float:
        """A float32 as the shortest decimal that has this float32 value: 1e-05 instead of 9.99999974e-06."""
        value = self.require(key) if default is None else self.get(key, default)
        kind = "positive" if positive else "finite"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(np.float32(value)):
            raise self.error(f"key {key} must be a {kind} number, not {value!r:.200}")
        if positive and value <= 0:
            raise self.error(f"key {key} must be a {kind} number, not {value!r:.200}")
        return float(str(np.float32(value)))

    def text(self, key: str, default: str) -> str:
        """A string. Raises `ModelSourceError` for anything else."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.error(f"key {key} must be a string, not {value!r:.200}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false. Raises `ModelSourceError` for anything else."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"key {key} must be true or false, not {value!r:.200}")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of strings. Raises `ModelSourceError` for anything else."""
        return self._list(key, str, "strings")

    def integers(self, key: str) -> list[int]:
        """A list of integers. Raises `ModelSourceError` for anything else."""
        return self._list(key, int, "integers")

    def reals(self, key: str) -> list[float]:
        """A list of finite numbers. Raises `ModelSourceError` for anything else."""
        values = self._list(key, float, "numbers")
        if not np.isfinite(values).all():
            raise self.error(f"key {key} must be a list of finite numbers")
        return values

    def _list(self, key: str, kind: type[T], what: str) -> list[T]:
        value = self.require(key)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self.error(f"key {key} must be a list of {what}")
        return value


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder: hidden width, FFN width, layers, query heads, KV heads, head size."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int


def read_shape(meta: Metadata, arch: str) -> Shape:
    """Reads the sizes of the model. Raises `ModelSourceError` if they contradict each other."""
    hidden, heads = meta.positive_int(f"{arch}.embedding_length"), meta.positive_int(f"{arch}.attention.head_count")
    if f"{arch}.attention.key_length" not in meta.values and hidden % heads:
        raise meta.error(f"{heads} heads do not divide the width {hidden}, and {arch}.attention.key_length is missing")
    head_size = meta.positive_int(f"{arch}.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        other = meta.positive_int(f"{arch}.{key}", head_size)
        if other != head_size:
            raise meta.error(f"{arch}.{key} = {other} differs from the head size {head_size}, which is not supported")
    return Shape(
        hidden=hidden,
        ffn=meta.positive_int(f"{arch}.feed_forward_length"),
        layers=meta.positive_int(f"{arch}.block_count"),
        heads=heads,
        kv_heads=meta.positive_int(f"{arch}.attention.head_count_kv", heads),
        head_size=head_size,
    )


def rope_parameters(meta: Metadata, arch: str, head_size: int, factors: np.ndarray | None) -> dict[str, Any]:
    """`rope_parameters` of config.json. Defaults are those of llama.cpp: base 10000, linear scaling by 1.

    Args:
        factors: float32 [head_size / 2], the file's rope_freqs.weight; frequencies are divided by it.
    """
    theta = meta.real(f"{arch}.rope.freq_base", 10000.0, positive=True)
    kind = meta.text(f"{arch}.rope.scaling.type", "linear")
    old_name = f"{arch}.rope.scale_linear"
    factor = meta.real(f"{arch}.rope.scaling.factor", meta.real(old_name, 0.0)) or 1.0  # 0 means no scaling
    if kind == "none":
        factor = 1.0
    if kind not in ("none", "linear"):
        raise meta.error(f"rope scaling {kind!r} is not supported; valid: none, linear, or Llama 3's rope_freqs.weight")
    if factor < 0:
        raise meta.error(f"key {arch}.rope.scaling.factor must be a positive number, not {factor}")
    if factors is not None and not np.all(factors == 1):
        if factor != 1:
            raise meta.error(f"it has both rope_freqs.weight and rope scaling {kind!r} by {factor}")
        return _llama3(meta, theta, head_size, factors)
    if factor != 1:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _llama3(meta: Metadata, theta: float, head_size: int, factors: np.ndarray) -> dict[str, Any]:
    wrong = meta.error(f"rope_freqs.weight is not Llama 3's schedule ({_LLAMA3}), the only one supported")
    if factors.shape != (head_size // 2,) or not np.isfinite(factors).all() or factors.min() < 1:
        raise wrong
    scale = float(str(np.float32(factors.max())))
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_size, 2) / head_size)
    smooth = np.clip((_LLAMA3["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / scale + smooth), rtol=1e-4):
        raise wrong
    return {"rope_type": "llama3", "rope_theta": theta, "factor": scale, **_LLAMA3}


def token_ids(meta: Metadata) -> dict[str, int]:
    """The ids of bos, eos, pad (and unk) that are in the vocabulary; keys "bos_token_id", ...

    A SentencePiece vocabulary without these keys has the ids of the library: unk 0, bos 1, eos 2, as in llama.cpp. An
    id outside the vocabulary is ignored, except eos, which is an error.
    """
    count = len(meta.strings("tokenizer.ggml.tokens"))
    ids = dict(_SENTENCEPIECE_IDS) if meta.get("tokenizer.ggml.model") == "llama" else {}
    for ours, theirs in _TOKEN_KINDS.items():
        value = meta.get(f"tokenizer.ggml.{theirs}_token_id", ids.get(ours))
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise meta.error(f"key tokenizer.ggml.{theirs}_token_id must be a token id, not {value!r:.200}")
        if 0 <= value < count:
            ids[ours] = value
            continue
        if ours == "eos" and f"tokenizer.ggml.{theirs}_token_id" in meta.values:
            raise meta.error(f"eos_token_id {value} is outside the vocabulary of {count} tokens")
        ids.pop(ours, None)
    return {f"{kind}_token_id": value for kind, value in ids.items()}


def stop_ids(meta: Metadata) -> list[int]:
    """Ids that end an answer: EOS, ends of turns and messages, and special tokens whose text llama.cpp knows."""
    tokens = meta.strings("tokenizer.ggml.tokens")
    named = [meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eot", "eom")]
    ids = [token_ids(meta).get("eos_token_id"), *named]
    types = meta.get("tokenizer.ggml.token_type")
    if isinstance(types, list) and len(types) == len(tokens):
        ids += [index for index, token in enumerate(tokens) if token in _END_TEXTS and types[index] == _CONTROL]
    else:
        ids += [index for index, token in enumerate(tokens) if token in _END_TEXTS]
    return list(dict.fromkeys(stop for stop in ids if type(stop) is int and 0 <= stop < len(tokens)))


def model_config(
    meta: Metadata, arch: str, shape: Shape, *, tensors: Collection[str], vocab: int, dtype: str
) -> dict[str, Any]:
    """The fields of config.json that all architectures have. `tensors`: names in the file. `vocab`: embedding rows."""
    ids = {key: value for key, value in token_ids(meta).items() if key != "unk_token_id"}
    config = {
        "dtype": dtype,
        "vocab_size": vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "rms_norm_eps": meta.real(f"{arch}.attention.layer_norm_rms_epsilon", positive=True),
        "max_position_embeddings": meta.positive_int(f"{arch}.context_length"),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return config | ids


def pooling_config(meta: Metadata, name: str) -> dict[str, Any] | None:
    """config.json of sentence-transformers' Pooling module; None: the file says nothing about embeddings."""
    mode = POOLING.get(meta.get(f"{name}.pooling_type", 0))
    return None if mode is None else {"pooling_mode": mode}


def generation_config(meta: Metadata) -> dict[str, Any]:
    """generation_config.json: stop tokens (a list if there are several) and sampling defaults."""
    config: dict[str, Any] = {key: value for key, value in token_ids(meta).items() if key != "unk_token_id"}
    stops = stop_ids(meta)
    if stops:
        config["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    for theirs, ours in _SAMPLING_KEYS.items():
        key = f"general.sampling.{theirs}"
        if key in meta.values:
            value = meta.real(key)
            config |= {"do_sample": True, ours: int(value) if ours == "top_k" else value}
    if config.get("top_k", 0) < 0:  # means the whole vocabulary
        config["top_k"] = 0
    if config.get("temperature", 1.0) <= 0:  # means the likeliest token
        del config["temperature"]
        config["do_sample"] = False
    return config


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
