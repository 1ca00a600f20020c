"""A GGUF file -> a folder in Hugging Face form: config.json, model.safetensors, tokenizer files, chat template.

Weights keep their exact values: F32, F16 and BF16 tensors are copied bit for bit, quantised ones become float32, since
scale x integer + offset needs more bits than bf16 or fp16 have. It costs disk (4 bytes a weight) and no accuracy.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanoengine.api import ModelSourceError
from nanoengine.plugins.model_sources.gguf_metadata import (
    Architecture,
    Metadata,
    Shape,
    generation_config,
    model_config,
    read_architecture,
    read_shape,
    rope_parameters,
    write_json,
)
from nanoengine.plugins.model_sources.gguf_tokenizer import write_tokenizer

CONVERTER_VERSION = 1
"""Part of the cache key: raise it whenever the same file would give another folder."""

# GGUF type -> (safetensors type, numpy type of the stored words, its name in config.json)
_COPIED = {"F32": ("F32", "<f4", "float32"), "F16": ("F16", "<f2", "float16"), "BF16": ("BF16", "<u2", "bfloat16")}


@dataclass(frozen=True, slots=True)
class TensorRule:
    """What becomes of one tensor: its name and shape afterwards, and in how many heads its rows are interleaved."""

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0


def convert(source: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Convert the GGUF file `source` into the existing, empty `folder`.

    Raises `ModelSourceError` naming what is not served, and `OSError` when the folder cannot be written.
    """
    meta, tensors = _read(source)
    name, arch = read_architecture(meta)
    factors = tensors.pop("rope_freqs.weight", None)
    shape = read_shape(meta, name)
    rope = rope_parameters(meta, name, shape.head_size, None if factors is None else _float32(meta, factors))
    rules = tensor_rules(meta, arch, shape, {key: _shape(tensor) for key, tensor in tensors.items()})
    config = model_config(
        meta, arch, shape, rope, tensors=tensors, vocab=_shape(tensors["token_embd.weight"])[0],
        dtype=_compute_dtype(tensors.values()),
    )  # fmt: skip
    write_tokenizer(meta, folder)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(meta))
    _write_tensors(meta, folder / "model.safetensors", tensors, rules, say)


def tensor_rules(
    meta: Metadata, arch: Architecture, shape: Shape, present: Mapping[str, Sequence[int]]
) -> dict[str, TensorRule]:
    """GGUF name -> rule, for every tensor of the model.

    Args:
        present: the file's tensors with their shapes, outer dimension first.

    Raises `ModelSourceError` naming tensors that are missing, unknown or misshapen.
    """
    hidden, q, kv = shape.hidden, shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    vocab = present.get("token_embd.weight", (0,))[0]
    if vocab < len(meta.strings("tokenizer.ggml.tokens")):
        raise meta.error(f"token_embd.weight has {vocab} rows for {len(meta.get('tokenizer.ggml.tokens'))} tokens")
    rules = {
        "token_embd.weight": TensorRule("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": TensorRule("model.norm.weight", (hidden,)),
    }
    if "output.weight" in present:
        rules["output.weight"] = TensorRule("lm_head.weight", (vocab, hidden))
    heads, kv_heads = (shape.heads, shape.kv_heads) if arch.interleaved else (0, 0)
    layer = {
        "attn_norm.weight": TensorRule("input_layernorm.weight", (hidden,)),
        "attn_q.weight": TensorRule("self_attn.q_proj.weight", (q, hidden), heads),
        "attn_k.weight": TensorRule("self_attn.k_proj.weight", (kv, hidden), kv_heads),
        "attn_v.weight": TensorRule("self_attn.v_proj.weight", (kv, hidden)),
        "attn_output.weight": TensorRule("self_attn.o_proj.weight", (hidden, q)),
        "ffn_norm.weight": TensorRule("post_attention_layernorm.weight", (hidden,)),
        "ffn_gate.weight": TensorRule("mlp.gate_proj.weight", (shape.ffn, hidden)),
        "ffn_up.weight": TensorRule("mlp.up_proj.weight", (shape.ffn, hidden)),
        "ffn_down.weight": TensorRule("mlp.down_proj.weight", (hidden, shape.ffn)),
    }
    if arch.qk_norm:
        layer["attn_q_norm.weight"] = TensorRule("self_attn.q_norm.weight", (shape.head_size,))
        layer["attn_k_norm.weight"] = TensorRule("self_attn.k_norm.weight", (shape.head_size,))
    if arch.biases and "blk.0.attn_q.bias" in present:
        layer["attn_q.bias"] = TensorRule("self_attn.q_proj.bias", (q,), heads)
        layer["attn_k.bias"] = TensorRule("self_attn.k_proj.bias", (kv,), kv_heads)
        layer["attn_v.bias"] = TensorRule("self_attn.v_proj.bias", (kv,))
        layer["attn_output.bias"] = TensorRule("self_attn.o_proj.bias", (hidden,))
    for index in range(shape.layers):
        for key, rule in layer.items():
            named = TensorRule(f"model.layers.{index}.{rule.name}", rule.shape, rule.interleaved_heads)
            rules[f"blk.{index}.{key}"] = named
    _check_tensors(meta, rules, present)
    return rules


def _check_tensors(meta: Metadata, rules: Mapping[str, TensorRule], present: Mapping[str, Sequence[int]]) -> None:
    wrong = [f"{name} is missing" for name in rules if name not in present]
    wrong += [f"{name} is unknown" for name in present if name not in rules]
    wrong += [
        f"{name} has shape {tuple(present[name])}, expected {rule.shape}"
        for name, rule in rules.items()
        if name in present and tuple(present[name]) != rule.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise meta.error(f"its tensors do not fit the architecture: {'; '.join(wrong[:5])}{more}")


def to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from interleaved rotary pairs (x0 y0 x1 y1 ...) to halves (x0 x1 ... y0 y1 ...), head by head.

    [heads * D, ...] -> the same shape. Undoes what llama.cpp's converter does to Llama checkpoints.
    """
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _read(source: Path) -> tuple[Metadata, dict[str, Any]]:
    """The file's key-value pairs, and its tensors by name (mapped from the file, not read)."""
    import gguf

    try:
        reader = gguf.GGUFReader(source)
        meta = Metadata(source.name, {key: field.contents() for key, field in reader.fields.items()})
    except (ValueError, IndexError, KeyError) as error:  # what the reader's slicing of a bad file runs into
        raise ModelSourceError(f"{source} is damaged or no GGUF file: {error}") from error
    return meta, {tensor.name: tensor for tensor in reader.tensors}


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _compute_dtype(tensors: Any) -> str:
    """config.json's dtype: that of the matrices if they are not quantised, else bfloat16, in which such models come."""
    kinds = {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1}
    return _COPIED[kinds.pop()][2] if len(kinds) == 1 and kinds <= _COPIED.keys() else "bfloat16"


def _float32(meta: Metadata, tensor: Any) -> np.ndarray:
    import gguf

    try:
        values: np.ndarray = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise meta.error(f"{tensor.name} is of type {tensor.tensor_type.name}, which is not served") from error
    return values.astype("<f4", copy=False)


def _words(meta: Metadata, tensor: Any, rule: TensorRule) -> np.ndarray:
    """The tensor as little-endian words of its type in the safetensors file, in its shape there."""
    kind = tensor.tensor_type.name
    if kind in _COPIED:
        words = tensor.data.view(_COPIED[kind][1]).reshape(rule.shape)
    else:
        words = _float32(meta, tensor).reshape(rule.shape)
    return to_halves(words, rule.interleaved_heads) if rule.interleaved_heads else words


def _write_tensors(
    meta: Metadata, path: Path, tensors: Mapping[str, Any], rules: Mapping[str, TensorRule], say: Callable[[str], None]
) -> None:
    """Write a safetensors file tensor by tensor, so that memory holds one at a time.

    The format: header length (uint64), JSON header, data (https://github.com/huggingface/safetensors).
    """
    from tqdm import tqdm

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, rule in rules.items():
        dtype = _COPIED.get(tensors[name].tensor_type.name, _COPIED["F32"])
        end = offset + int(np.prod(rule.shape)) * np.dtype(dtype[1]).itemsize
        header[rule.name] = {"dtype": dtype[0], "shape": rule.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    if shutil.disk_usage(path.parent).free < offset:
        raise OSError(f"the converted weights take {offset / 1e6:.0f} MB, more than is free in {path.parent}")
    say(f"converting {meta.name}: {len(rules)} tensors, {offset / 1e6:.0f} MB, once")
    bar = tqdm(total=offset, unit="B", unit_scale=True, desc="converting", file=sys.stderr, leave=False, disable=None)
    with path.open("wb") as file, bar:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, rule in rules.items():
            words = np.ascontiguousarray(_words(meta, tensors[name], rule))
            file.write(words.data)
            bar.update(words.nbytes)
