"""Random blocks of a GGUF type: any code, any scale that is finite."""

from __future__ import annotations

import gguf
import numpy as np
import torch

from nanoengine.kernels.gguf import BLOCK_TYPES

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
