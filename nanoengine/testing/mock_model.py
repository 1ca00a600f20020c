"""A model without weights whose logits are an exact function of the whole history, read back from the KV cache.

K has (token id, position) of each token. The backend mixes all entries of a row into an integer, and the logits are a
hash of this integer and the vocabulary id. A wrong block, an old slot, an unwritten position or a row that is confused
with another one gives other tokens, and every correct way of running gives the same tokens bit for bit. It is
registered like any other plugin: this module has the hooks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoengine.api import (
    API_VERSION,
    AttentionBackend,
    AttentionCapabilities,
    AttentionLayerSpec,
    AttentionSpec,
    BatchLimits,
    BuildContext,
    ForwardBatch,
    GraphSupport,
    KVSpec,
    Model,
    ModelConfig,
    ModelError,
    ModelSpec,
    StepInputs,
    hookimpl,
)

ARCHITECTURE = "MockForCausalLM"
_WORD = (1 << 32) - 1
_HALF = 1 << 20  # a hidden state has 20 bits, which are exact in float32


_Integers = TypeVar("_Integers", Tensor, NDArray[Any], int)  # int64, of which products keep the low bits


def mix(x: _Integers) -> _Integers:
    """A 32-bit integer mix (murmur3's finaliser) of int64 values in [0, 2^32)."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _WORD
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _WORD
    return x ^ (x >> 16)


def mark(token_ids: _Integers, positions: _Integers) -> _Integers:
    """The number that a token adds to the sum of the history, int64."""
    return mix((token_ids * 0x9E3779B1 + positions * 0x7F4A7C15 + 1) & _WORD)


def logits_of(history: Tensor, vocab_size: int) -> Tensor:
    """Sums of marks [R] -> logits float32 [R, V] in [0, 16), exact multiples of 2^-12."""
    ids = torch.arange(vocab_size, device=history.device)
    return (mix((mix(history & _WORD)[:, None] + ids * 0x27D4EB2F) & _WORD) >> 16).float() / 4096


def reference_logits(token_ids: Sequence[int], vocab_size: int) -> Tensor:
    """float32 [V]: the logits after `token_ids`, computed from the tokens alone; by NumPy, whose small arrays take a
    tenth of the time of small tensors."""
    ids = np.array(token_ids, dtype=np.int64)
    history = int(mark(ids, np.arange(len(ids), dtype=np.int64)).sum()) % (_HALF * _HALF)
    hashed = mix((mix(history & _WORD) + np.arange(vocab_size, dtype=np.int64) * 0x27D4EB2F) & _WORD) >> 16
    return torch.from_numpy(hashed.astype(np.float32) / 4096)


class MockAttention(AttentionBackend):
    """The attention of the mock model. A token's output is the sum of the marks of its context, in two 20-bit halves.

    On a GPU nothing depends on the lengths on the host, so any padded batch may be captured.
    """

    capabilities = AttentionCapabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({"float32"}),
        graphs=GraphSupport.ALWAYS,
        decode_queries=16,
    )

    @classmethod
    def kv_block_bytes(cls, spec: KVSpec, block_size: int) -> int:
        return block_size * 2 * 4

    def __init__(self, spec: KVSpec, limits: BatchLimits, device: torch.device) -> None:
        self.block_size, self.max_model_len, self.device = limits.block_size, limits.max_model_len, device

    def allocate(self, num_layers: int, num_blocks: int) -> None:
        shape = (num_layers, num_blocks * self.block_size, 2)
        self.cache = torch.full(shape, -1.0, device=self.device)

    def fill(self, inputs: StepInputs) -> None:
        self.inputs = inputs

    def forward(self, layer: int, spec: AttentionLayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache[layer]
        cache[self.inputs.slot_mapping] = k[:, 0]
        longest = max(self.inputs.seq_lens_host) if self.device.type == "cpu" else self.max_model_len
        index = torch.arange(longest, device=self.device)
        blocks = self.inputs.block_tables[:, index // self.block_size].long()
        entries = cache[blocks * self.block_size + index % self.block_size].long()  # [B, longest, 2]
        marks = mark(entries[..., 0], entries[..., 1]) * (index < self.inputs.seq_lens[:, None])
        sums = marks.cumsum(1)  # [B, longest]: history up to and with each position
        ends = self.inputs.query_start_loc[1:]
        tokens = torch.arange(len(q), dtype=ends.dtype, device=self.device)
        rows = torch.searchsorted(ends, tokens, right=True).clamp(max=len(ends) - 1)  # padding counts as the last row
        history = sums[rows, self.inputs.positions] % (_HALF * _HALF)
        return torch.stack((history // _HALF, history % _HALF), 1).float()[:, None, :]


class MockModel(Model):
    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        try:
            return ModelConfig(vocab_size=hf["vocab_size"], hidden_size=2, max_model_len=hf["max_position_embeddings"])
        except KeyError as error:
            raise ModelError(f"config.json of a mock model has no {error}") from error

    def __init__(self, config: ModelConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        self.vocab_size, self.tp = config.vocab_size, ctx.tp
        spec = AttentionLayerSpec(num_heads=1, num_kv_heads=1, head_size=2, scale=1.0)
        self.attention = ctx.attention("attention", spec)

    def forward(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        entry = torch.stack((input_ids.long(), positions), 1).float()[:, None, :]  # [T, 1, 2]
        hidden: Tensor = self.attention(entry, entry, entry)
        return hidden[:, 0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        halves = hidden.long()
        logits = logits_of(halves[:, 0] * _HALF + halves[:, 1], self.vocab_size)
        width = -(-self.vocab_size // self.tp.size)  # each rank computes all logits and returns its slice
        own = logits[:, self.tp.rank * width :][:, :width]
        return torch.nn.functional.pad(own, (0, width - own.shape[1]), value=float("-inf"))


def write_mock_checkpoint(
    folder: Path,
    *,
    vocab_size: int = 97,
    max_position_embeddings: int = 512,
    eos_token_id: int | list[int] | None = None,
) -> Path:
    """Writes a mock model's config.json (and generation_config.json) for `load_format="dummy"`. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [ARCHITECTURE],
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    if eos_token_id is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    return folder


@hookimpl
def register_models() -> list[ModelSpec]:
    target = "nanoengine.testing.mock_model:MockModel"
    return [ModelSpec(name="mock", architectures=(ARCHITECTURE,), target=target, api=API_VERSION)]


@hookimpl
def register_attention_backends() -> list[AttentionSpec]:
    target = "nanoengine.testing.mock_model:MockAttention"
    return [AttentionSpec(name="mock", target=target, api=API_VERSION, preference=-100)]
