"""GGUF metadata -> config.json and generation_config.json, refusing by name whatever would change the computation.

Keys are those of the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanoengine.api import ModelSourceError

_SAMPLING_KEYS = {
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "temp": "temperature",
    "penalty_repeat": "repetition_penalty",
}

# The only schedule of frequencies that llama.cpp's converter writes as rope_freqs.weight, with the constants of every
# published Llama 3 model; a file with other ones is refused.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Metadata:
    """A file's key-value pairs, with errors that name the file and the key."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name = name
        self.values = values

    def error(self, text: str) -> ModelSourceError:
        return ModelSourceError(f"{self.name}: {text}")

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def require(self, key: str) -> Any:
        """Raises `ModelSourceError` if the file lacks the key."""
        if key not in self.values:
            raise self.error(f"key {key} is missing; without it the model cannot be told")
        return self.values[key]

    def positive_int(self, key: str, default: int | None = None) -> int:
        """Raises `ModelSourceError` for anything else, lists of values per layer among it."""
        value = self.require(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"key {key} must be one positive integer, not {value!r}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A float32 as the shortest decimal that gives it: 9.99999974e-06 is 1e-05 again."""
        value = self.require(key) if default is None else self.get(key, default)
        if not isinstance(value, (int, float)) or not np.isfinite(value):
            raise self.error(f"key {key} must be a finite number, not {value!r}")
        return float(str(np.float32(value)))

    def strings(self, key: str) -> list[str]:
        """Raises `ModelSourceError` for anything but a list of strings."""
        value = self.require(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"key {key} must be a list of strings")
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
    """Sizes, checked against each other."""
    hidden, heads = meta.positive_int(f"{arch}.embedding_length"), meta.positive_int(f"{arch}.attention.head_count")
    if f"{arch}.attention.key_length" not in meta.values and hidden % heads:
        raise meta.error(f"{heads} heads do not divide the width {hidden}, and {arch}.attention.key_length is missing")
    head_size = meta.positive_int(f"{arch}.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        other = meta.positive_int(f"{arch}.{key}", head_size)
        if other != head_size:
            raise meta.error(f"{arch}.{key} = {other} differs from the head size {head_size}, which is not served")
    return Shape(
        hidden=hidden,
        ffn=meta.positive_int(f"{arch}.feed_forward_length"),
        layers=meta.positive_int(f"{arch}.block_count"),
        heads=heads,
        kv_heads=meta.positive_int(f"{arch}.attention.head_count_kv", heads),
        head_size=head_size,
    )


def rope_parameters(
    meta: Metadata, arch: str, head_size: int, factors: np.ndarray | None, default_theta: float | None
) -> dict[str, Any]:
    """`rope_parameters` of config.json.

    Args:
        factors: float32 [head_size / 2], the file's rope_freqs.weight, by which frequencies are divided.
    """
    theta = meta.real(f"{arch}.rope.freq_base", default_theta)
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise meta.error(f"rope scaling {kind!r} is not served; valid: none, linear, or Llama 3's rope_freqs.weight")
    if factors is not None and not np.all(factors == 1):
        if kind != "none":
            raise meta.error(f"it has both rope_freqs.weight and rope scaling {kind!r}")
        return _llama3(meta, theta, head_size, factors)
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": meta.real(f"{arch}.rope.scaling.factor")}
    return {"rope_type": "default", "rope_theta": theta}


def _llama3(meta: Metadata, theta: float, head_size: int, factors: np.ndarray) -> dict[str, Any]:
    scale = float(str(np.float32(factors.max())))
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_size, 2) / head_size)
    smooth = np.clip((_LLAMA3["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / scale + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise meta.error(f"rope_freqs.weight is not Llama 3's schedule ({_LLAMA3}), the only one served")
    return {"rope_type": "llama3", "rope_theta": theta, "factor": scale, **_LLAMA3}


def token_ids(meta: Metadata) -> dict[str, int]:
    """bos, eos, pad (and unk) ids that the file names, each a real token; keys "bos_token_id", ..."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    count = len(meta.strings("tokenizer.ggml.tokens"))
    ids = {f"{ours}_token_id": meta.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    found = {key: value for key, value in ids.items() if value is not None}
    for key, value in found.items():
        if not isinstance(value, int) or not 0 <= value < count:
            raise meta.error(f"{key} {value!r} is outside the vocabulary of {count} tokens")
    return found


def model_config(
    meta: Metadata, arch: str, shape: Shape, *, tensors: Collection[str], vocab: int, dtype: str
) -> dict[str, Any]:
    """What config.json says of every architecture. `tensors`: the file's names. `vocab`: rows of its embedding."""
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
        "rms_norm_eps": meta.real(f"{arch}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": meta.positive_int(f"{arch}.context_length"),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return config | ids


def generation_config(meta: Metadata) -> dict[str, Any]:
    """generation_config.json: stop tokens (a list, where turns and messages end differently) and sampling defaults."""
    config: dict[str, Any] = {key: value for key, value in token_ids(meta).items() if key != "unk_token_id"}
    stops = [config.get("eos_token_id"), *(meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eot", "eom"))]
    stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if stops:
        config["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    for theirs, ours in _SAMPLING_KEYS.items():
        value = meta.get(f"general.sampling.{theirs}")
        if value is not None:
            config |= {"do_sample": True, ours: float(str(np.float32(value))) if isinstance(value, float) else value}
    return config


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
