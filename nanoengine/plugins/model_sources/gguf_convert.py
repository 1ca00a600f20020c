"""Converts a GGUF file to a folder in Hugging Face format: config.json, model.safetensors, tokenizer, chat template.

Weights keep their exact values: F32, F16 and BF16 tensors are copied bit for bit, and so are the blocks of matrices in
a type of `KEPT`: uint8 [rows, bytes of a row], whose types config.json names. Matrices of other types become float32,
because scale x integer + offset needs more bits than bf16 or fp16 have.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanoengine.plugins.model_sources.gguf_architectures import Architecture, read_architecture, skipped_keys
from nanoengine.plugins.model_sources.gguf_header import Tensor, read_header
from nanoengine.plugins.model_sources.gguf_metadata import (
    Metadata,
    Shape,
    generation_config,
    model_config,
    pooling_config,
    read_shape,
    rope_parameters,
    write_json,
)
from nanoengine.plugins.model_sources.gguf_tokenizer import write_tokenizer

CONVERTER_VERSION = 4
"""Part of the cache key. Increase it if the same file would give another folder."""

KEPT = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"})
"""Types whose blocks are kept: those of `kernels.gguf`, which needs torch and is not imported here."""

_SHOWN = 20  # most skipped keys in a message

# GGUF type -> (safetensors type, numpy type of the stored words, name in config.json)
_COPIED = {"F32": ("F32", "<f4", "float32"), "F16": ("F16", "<f2", "float16"), "BF16": ("BF16", "<u2", "bfloat16")}


@dataclass(frozen=True, slots=True)
class TensorRule:
    """How one tensor is converted.

    Attributes:
        name, shape: after the conversion.
        interleaved_heads: number of heads whose rows are interleaved; 0: none. less_one: subtract 1, in float32.
    """

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0
    less_one: bool = False


def convert(source: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Converts the GGUF file `source` into the existing, empty `folder`.

    Raises `ModelSourceError` that names what is not supported, and `OSError` if the folder cannot be written.
    """
    header = read_header(source)
    meta, tensors = Metadata(source.name, header.values), dict(header.tensors)
    name, arch = read_architecture(meta)
    if not tensors:
        raise meta.error("it has no tensors: it is a vocabulary without weights, not a model")
    _check_types(meta, tensors.values())
    factors = tensors.pop("rope_freqs.weight", None) if arch.frequencies else None
    shape = read_shape(meta, name)
    if shape.layers > len(tensors):
        raise meta.error(f"{name}.block_count is {shape.layers}, but it has {len(tensors)} tensors")
    rules = tensor_rules(meta, arch, shape, {key: tensor.shape for key, tensor in tensors.items()})
    divisors = None if factors is None else _float32(factors)
    rope = rope_parameters(meta, name, shape.head_size, divisors)
    vocab = tensors["token_embd.weight"].shape[0]
    config: dict[str, Any] = {"architectures": [arch.hf_class], "model_type": arch.model_type}
    config |= model_config(meta, name, shape, tensors=tensors, vocab=vocab, dtype=_compute_dtype(tensors.values()))
    if arch.biases and not arch.optional_biases:  # the model has them in any case, and no key for them
        del config["attention_bias"]
    config |= arch.details(meta, shape, rope) | quantization_config(tensors, rules)
    write_tokenizer(meta, folder)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(meta))
    pooling = pooling_config(meta, name)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        write_json(folder / "1_Pooling" / "config.json", pooling)
    skipped = skipped_keys(meta)
    if skipped:
        shown = [key if key.isprintable() else repr(key) for key in skipped[:_SHOWN]]
        more = f" and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
        say(f"{meta.name}: skipped keys: {', '.join(key[:100] for key in shown)}{more}")
    _write_tensors(meta, folder / "model.safetensors", tensors, rules, say)


def tensor_rules(
    meta: Metadata, arch: Architecture, shape: Shape, present: Mapping[str, Sequence[int]]
) -> dict[str, TensorRule]:
    """GGUF name -> rule, for every tensor of the model.

    Args:
        present: the file's tensors with their shapes, outer dimension first.

    Raises `ModelSourceError` that names tensors which are missing, unknown or of a wrong shape.
    """
    hidden, q, kv = shape.hidden, shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    vocab = present.get("token_embd.weight", (0,))[0]
    if vocab < len(meta.strings("tokenizer.ggml.tokens")):
        raise meta.error(f"token_embd.weight has {vocab} rows for {len(meta.get('tokenizer.ggml.tokens'))} tokens")
    rules = {
        "token_embd.weight": TensorRule("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": TensorRule("model.norm.weight", (hidden,), less_one=arch.unit_offset),
    }
    if "output.weight" in present:
        rules["output.weight"] = TensorRule("lm_head.weight", (vocab, hidden))
    heads, kv_heads = (shape.heads, shape.kv_heads) if arch.interleaved else (0, 0)
    layer = {
        "attn_q.weight": TensorRule("self_attn.q_proj.weight", (q, hidden), heads),
        "attn_k.weight": TensorRule("self_attn.k_proj.weight", (kv, hidden), kv_heads),
        "attn_v.weight": TensorRule("self_attn.v_proj.weight", (kv, hidden)),
        "attn_output.weight": TensorRule("self_attn.o_proj.weight", (hidden, q)),
        "ffn_gate.weight": TensorRule("mlp.gate_proj.weight", (shape.ffn, hidden)),
        "ffn_up.weight": TensorRule("mlp.up_proj.weight", (shape.ffn, hidden)),
        "ffn_down.weight": TensorRule("mlp.down_proj.weight", (hidden, shape.ffn)),
        **_norm_rules(arch, shape),
    }
    if not arch.optional_biases or "blk.0.attn_q.bias" in present:
        biases = {
            "q": TensorRule("self_attn.q_proj.bias", (q,), heads),
            "k": TensorRule("self_attn.k_proj.bias", (kv,), kv_heads),
            "v": TensorRule("self_attn.v_proj.bias", (kv,)),
            "output": TensorRule("self_attn.o_proj.bias", (hidden,)),
        }
        layer |= {f"attn_{which}.bias": biases[which] for which in arch.biases}
    for index in range(shape.layers):
        for key, rule in layer.items():
            rules[f"blk.{index}.{key}"] = replace(rule, name=f"model.layers.{index}.{rule.name}")
    _check_tensors(meta, rules, present)
    return rules


def _norm_rules(arch: Architecture, shape: Shape) -> dict[str, TensorRule]:
    """The norms of one layer. The norm before the MLP has another name if there is also a norm after attention."""
    names = {"attn_norm": "input_layernorm"}
    if arch.post_norms:
        names |= {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    else:
        names["ffn_norm"] = "post_attention_layernorm"
    sizes = dict.fromkeys(names, shape.hidden)
    if arch.qk_norm:
        names |= {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
        sizes |= {"attn_q_norm": shape.head_size, "attn_k_norm": shape.head_size}
    return {
        f"{theirs}.weight": TensorRule(f"{ours}.weight", (sizes[theirs],), less_one=arch.unit_offset)
        for theirs, ours in names.items()
    }


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


def quantization_config(tensors: Mapping[str, Tensor], rules: Mapping[str, TensorRule]) -> dict[str, Any]:
    """What config.json says of quantised matrices, by module: the type of blocks that are kept ("types"), and the type
    that those of float32 had ("expanded"). {} where there is none."""
    kinds = {
        rule.name.removesuffix(".weight"): tensors[name].tensor_type.name
        for name, rule in rules.items()
        if len(rule.shape) > 1 and tensors[name].tensor_type.name not in _COPIED
    }
    types = {module: kind for module, kind in kinds.items() if kind in KEPT}
    expanded = {module: kind for module, kind in kinds.items() if kind not in KEPT}
    if not kinds:
        return {}
    return {"quantization_config": {"quant_method": "gguf", "types": types, "expanded": expanded}}


def to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows of q or k, per head: interleaved rotary pairs (x0 y0 x1 y1 ...) to halves (x0 x1 ... y0 y1 ...).

    [heads * D, ...] -> the same shape. This is the inverse of what llama.cpp's converter does with Llama checkpoints.
    """
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _compute_dtype(tensors: Iterable[Tensor]) -> str:
    """The dtype in config.json: that of the matrices if they are not quantised, else bfloat16."""
    kinds = {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1}
    return _COPIED[kinds.pop()][2] if len(kinds) == 1 and kinds <= _COPIED.keys() else "bfloat16"


def _check_types(meta: Metadata, tensors: Iterable[Tensor]) -> None:
    """Raises `ModelSourceError` for a type that the gguf package cannot read. Called before anything is written."""
    for kind, name in {tensor.tensor_type: tensor.name for tensor in tensors}.items():
        if not _readable(kind):
            valid = ", ".join(each.name for each in type(kind) if _readable(each))
            raise meta.error(f"{name} is of type {kind.name}, which is not supported; valid: {valid}")


def _readable(kind: Any) -> bool:
    import gguf

    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _float32(tensor: Tensor) -> np.ndarray:
    import gguf

    values: np.ndarray = gguf.dequantize(tensor.data, tensor.tensor_type)
    return values.astype("<f4", copy=False)


def _stored(tensor: Tensor, rule: TensorRule) -> tuple[str, str, tuple[int, ...]]:
    """After the conversion: (safetensors type, numpy type of the words, shape)."""
    kind = tensor.tensor_type.name
    if rule.less_one or kind not in _COPIED.keys() | KEPT or (kind in KEPT and len(rule.shape) == 1):
        return *_COPIED["F32"][:2], rule.shape
    if kind in KEPT:
        return "U8", "u1", tensor.data.shape
    return *_COPIED[kind][:2], rule.shape


def _words(tensor: Tensor, rule: TensorRule) -> np.ndarray:
    """The tensor for the safetensors file: little-endian words. Rows may be reordered, as blocks lie within them."""
    dtype, numpy_type, shape = _stored(tensor, rule)
    if rule.less_one:
        words = _float32(tensor) - np.float32(1)
    elif dtype == "F32" and tensor.tensor_type.name != "F32":
        words = _float32(tensor)
    else:
        words = tensor.data.view(numpy_type)
    words = words.reshape(shape)
    return to_halves(words, rule.interleaved_heads) if rule.interleaved_heads else words


def _write_tensors(
    meta: Metadata,
    path: Path,
    tensors: Mapping[str, Tensor],
    rules: Mapping[str, TensorRule],
    say: Callable[[str], None],
) -> None:
    """Writes a safetensors file tensor by tensor, so that only one tensor is in memory.

    The format: header length (uint64), JSON header, data (https://github.com/huggingface/safetensors).
    """
    from tqdm import tqdm

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, rule in rules.items():
        dtype, numpy_type, shape = _stored(tensors[name], rule)
        end = offset + math.prod(shape) * np.dtype(numpy_type).itemsize
        header[rule.name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    if shutil.disk_usage(path.parent).free < offset:
        raise OSError(f"the converted weights take {offset / 1e6:.0f} MB, more than is free in {path.parent}")
    say(f"converting {meta.name}: {len(rules)} tensors, {offset / 1e6:.0f} MB, once")
    hidden = os.environ.get("TERM") == "dumb" or None  # None: hidden if standard error is not a terminal
    bar = tqdm(total=offset, unit="B", unit_scale=True, desc="converting", file=sys.stderr, leave=False, disable=hidden)
    with path.open("wb") as file, bar:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, rule in rules.items():
            words = np.ascontiguousarray(_words(tensors[name], rule))
            file.write(words.data)
            bar.update(words.nbytes)
