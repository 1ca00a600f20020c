"""Shapes of models for dummy weights, and what a step of them must at least read and compute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a decoder, in elements. `architecture`: its name in config.json."""

    name: str
    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int
    tied: bool

    @property
    def layer_weights(self) -> int:
        """Number of elements in the matrices of one layer."""
        qkv = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_size
        return qkv + self.heads * self.head_size * self.hidden + 3 * self.hidden * self.intermediate

    @property
    def step_weights(self) -> int:
        """Number of elements that a decode step reads: all layers and the output layer."""
        return self.layers * self.layer_weights + self.vocab * self.hidden

    @property
    def kv_per_token(self) -> int:
        """Number of elements of K and V of one token, in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_size

    def write(self, folder: Path, max_model_len: int) -> Path:
        """Writes a config.json of this shape for `load_format="dummy"`. Returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.hf_config(max_model_len)))
        return folder

    def hf_config(self, max_model_len: int) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": self.architecture.removesuffix("ForCausalLM").lower(),
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": max_model_len,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        }


_SHAPES = (
    Shape(name="qwen3-0.6b", architecture="Qwen3ForCausalLM", hidden=1024, layers=28, heads=16, kv_heads=8,
          head_size=128, intermediate=3072, vocab=151936, tied=True),
    Shape(name="qwen3-8b", architecture="Qwen3ForCausalLM", hidden=4096, layers=36, heads=32, kv_heads=8,
          head_size=128, intermediate=12288, vocab=151936, tied=False),
    Shape(name="llama-3.2-1b", architecture="LlamaForCausalLM", hidden=2048, layers=16, heads=32, kv_heads=8,
          head_size=64, intermediate=8192, vocab=128256, tied=True),
    Shape(name="tiny", architecture="Qwen3ForCausalLM", hidden=64, layers=2, heads=4, kv_heads=2,
          head_size=32, intermediate=96, vocab=16384, tied=True),  # to try the commands on a CPU
)  # fmt: skip
SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in _SHAPES}
