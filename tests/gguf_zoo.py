"""Tiny GGUF files, written the way llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, FFN, LAYERS = 64, 4, 2, 32, 96, 2
MERGES = ["Ġ Ġ", "Ċ Ċ", "Ġ =", "1 2", "12 3", "h e", "l l", "he ll", "Ġ hell"]
SPECIALS = ["<|end|>", "<|start|>", "<think>"]

# name in a layer -> (shape, type in the file); every block type here holds 32 values, which divides all row lengths
LAYER: Mapping[str, tuple[tuple[int, ...], Q]] = {
    "attn_norm.weight": ((HIDDEN,), Q.F32),
    "attn_q.weight": ((HEADS * HEAD_SIZE, HIDDEN), Q.Q4_1),
    "attn_k.weight": ((KV_HEADS * HEAD_SIZE, HIDDEN), Q.Q8_0),
    "attn_v.weight": ((KV_HEADS * HEAD_SIZE, HIDDEN), Q.Q5_0),
    "attn_output.weight": ((HIDDEN, HEADS * HEAD_SIZE), Q.F16),
    "ffn_norm.weight": ((HIDDEN,), Q.F32),
    "ffn_gate.weight": ((FFN, HIDDEN), Q.Q4_0),
    "ffn_up.weight": ((FFN, HIDDEN), Q.Q5_1),
    "ffn_down.weight": ((HIDDEN, FFN), Q.BF16),
}
QK_NORMS = {"attn_q_norm.weight": ((HEAD_SIZE,), Q.F32), "attn_k_norm.weight": ((HEAD_SIZE,), Q.F32)}
POST_NORMS = {"post_attention_norm.weight": ((HIDDEN,), Q.F32), "post_ffw_norm.weight": ((HIDDEN,), Q.F32)}
BIASES = {
    "attn_q.bias": ((HEADS * HEAD_SIZE,), Q.F32),
    "attn_k.bias": ((KV_HEADS * HEAD_SIZE,), Q.F32),
    "attn_v.bias": ((KV_HEADS * HEAD_SIZE,), Q.F32),
    "attn_output.bias": ((HIDDEN,), Q.F32),
}


# What an architecture has beyond `LAYER`, and its keys; the window is short enough to matter in a test.
EXTRAS: Mapping[str, Mapping[str, tuple[tuple[int, ...], Q]]] = {
    "llama": {},
    "qwen2": {name: spec for name, spec in BIASES.items() if name != "attn_output.bias"},
    "qwen3": QK_NORMS,
    "gemma2": POST_NORMS,
    "gemma3": {**QK_NORMS, **POST_NORMS},
}
KEYS: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {
        "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0,
        "gemma2.attention.sliding_window": 8,
    },
    "gemma3": {
        "gemma3.attention.sliding_window": 8,
        "gemma3.attention.sliding_window_pattern": 2,
        "gemma3.rope.freq_base_swa": 10000.0,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    },
}


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins of the 256 bytes, by byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tokens() -> list[str]:
    return [*SPECIALS, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES), "[PAD268]"]


def token_types() -> list[int]:
    kinds = {"<|end|>": 3, "<|start|>": 3, "<think>": 4, "[PAD268]": 5}
    return [kinds.get(token, 1) for token in tokens()]


@dataclass
class TinyGGUF:
    """What to write; change it, then `write`.

    Attributes:
        keys: key-value pairs. weights: GGUF name -> (values in Hugging Face's layout, type in the file).
    """

    arch: str = "llama"
    pre: str = "smollm"
    tied: bool = True
    biases: bool = False
    seed: int = 0
    keys: dict[str, Any] = field(init=False)
    weights: dict[str, tuple[np.ndarray, Q]] = field(init=False)

    def __post_init__(self) -> None:
        arch = self.arch
        self.keys = {
            f"{arch}.block_count": LAYERS,
            f"{arch}.context_length": 512,
            f"{arch}.embedding_length": HIDDEN,
            f"{arch}.feed_forward_length": FFN,
            f"{arch}.attention.head_count": HEADS,
            f"{arch}.attention.head_count_kv": KV_HEADS,
            f"{arch}.attention.key_length": HEAD_SIZE,
            f"{arch}.attention.value_length": HEAD_SIZE,
            f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{arch}.rope.freq_base": 500000.0,
            f"{arch}.rope.dimension_count": HEAD_SIZE,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": tokens(),
            "tokenizer.ggml.token_type": token_types(),
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.chat_template": "{{ messages[0]['content'] }}<|end|>\n",
        }
        rng = np.random.default_rng(self.seed)
        self.keys |= KEYS.get(arch, {})
        layer = {**LAYER, **EXTRAS[arch], **(BIASES if self.biases else {})}
        shapes = {f"blk.{i}.{name}": spec for i in range(LAYERS) for name, spec in layer.items()}
        shapes["token_embd.weight"] = ((len(tokens()), HIDDEN), Q.Q8_0)
        shapes["output_norm.weight"] = ((HIDDEN,), Q.F32)
        if not self.tied:
            shapes["output.weight"] = ((len(tokens()), HIDDEN), Q.F32)
        self.weights = {
            name: (rng.normal(1.0 if "norm" in name else 0.0, 0.3, shape).astype(np.float32), kind)
            for name, (shape, kind) in shapes.items()
        }

    def stored(self, name: str) -> np.ndarray:
        """float32 values of a weight after its type's rounding, in Hugging Face's layout (rows are rounded alone)."""
        values, kind = self.weights[name]
        if self._is_whole(name):
            return (values + np.float32(1)) - np.float32(1)
        return gguf.dequantize(gguf.quantize(values, kind), kind)

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.arch)
        self._write_keys(writer)
        for name, (values, kind) in self.weights.items():
            laid_out = self._laid_out(name, values)
            writer.add_tensor(name, gguf.quantize(laid_out, kind), raw_dtype=kind)
        self._finish(writer)
        return path

    def _write_keys(self, writer: gguf.GGUFWriter) -> None:
        for key, value in self.keys.items():
            _adder(writer, value)(key, value)

    def _finish(self, writer: gguf.GGUFWriter) -> None:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _is_whole(self, name: str) -> bool:
        """Whether it is stored whole, where checkpoints hold it less one."""
        return self.arch.startswith("gemma") and name.endswith("norm.weight")

    def _laid_out(self, name: str, values: np.ndarray) -> np.ndarray:
        if self._is_whole(name):
            return values + np.float32(1)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        if self.arch != "llama" or heads is None:
            return values
        halves = values.reshape(heads, 2, HEAD_SIZE // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _adder(writer: gguf.GGUFWriter, value: Any) -> Callable[[str, Any], None]:
    if isinstance(value, bool):
        return writer.add_bool
    if isinstance(value, int) and value < 0:
        return writer.add_int32
    kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    return kinds[type(value)]
