"""Random blocks of a GGUF type, any code, any scale that is finite; and models of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from nanoengine.kernels.gguf import BLOCK_TYPES
from nanoengine.testing.checkpoints import tiny_llama

KINDS = tuple(BLOCK_TYPES)
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Bytes at which a block has a float16; those that are not here have one at 0."""


def random_blocks(kind: str, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, bytes of a row] whose weights are about 0.05."""
    rng, type_ = np.random.default_rng((seed, *kind.encode())), BLOCK_TYPES[kind]
    blocks = rng.integers(0, 256, (rows, width // type_.block, type_.size), np.uint8)
    for at in HALVES.get(kind, (0,)):
        spread = {"K": 4e-5, "0": 5e-3, "1": 5e-3}[kind[-1]] / (16 if kind == "Q8_0" else 1)
        halves = rng.normal(0, spread, (rows, width // type_.block, 1)).astype(np.float16)
        blocks[..., at : at + 2] = halves.view(np.uint8)
    return blocks.reshape(rows, -1)


def expected(blocks: np.ndarray, kind: str) -> torch.Tensor:
    """What the gguf package says that the blocks are: float32 [rows, weights of a row]."""
    return torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]))


def checkpoint(folder: Path, kinds: Mapping[str, str] | str, **config: Any) -> tuple[Path, Path]:
    """(a model of random blocks, the same in float32).

    kinds: type of each matrix by the last word of its module's name, others are Q4_1; "" is plain.
    """
    plain = tiny_llama(
        folder / "plain", hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, **config
    )
    tensors, types = load_file(plain / "model.safetensors"), dict[str, str]()
    packed = dict(tensors)
    for number, (name, tensor) in enumerate(tensors.items()):
        module = name.removesuffix(".weight")
        kind = kinds if isinstance(kinds, str) else kinds.get(module.rpartition(".")[2], "Q4_1")
        if tensor.dim() == 2 and kind:
            blocks = random_blocks(kind, *tensor.shape, seed=number)
            types[module], packed[name] = kind, torch.from_numpy(blocks)
            tensors[name] = expected(blocks, kind)
    save_file(tensors, plain / "model.safetensors")
    (folder / "packed").mkdir()
    save_file(packed, folder / "packed" / "model.safetensors")
    given = json.loads((plain / "config.json").read_text())
    given["quantization_config"] = {"quant_method": "gguf", "types": types, "expanded": {}}
    (folder / "packed" / "config.json").write_text(json.dumps(given))
    return folder / "packed", plain
