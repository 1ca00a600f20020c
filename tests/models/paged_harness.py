"""Drives a built model and the torch backend without an engine: own block tables, ragged steps, shared prefixes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoengine.api import AttentionBackend, BatchLimits, ForwardBatch, Model, StepInputs
from nanoengine.api.parallel import SingleRank
from nanoengine.kernels.ops import Ops
from nanoengine.plugins.attention_backends.torch_paged import TorchPaged
from nanoengine.plugins.models import register_models
from nanoengine.setup.start.build_model import build_model, kv_groups
from nanoengine.setup.start.weights import load_weights

MODELS = {name: spec.target for spec in register_models() for name in spec.architectures}


def model_class(hf: Mapping[str, Any]) -> type[Model]:
    """The built-in model that serves a config.json."""
    module, _, name = MODELS[hf["architectures"][0]].partition(":")
    return getattr(import_module(module), name)


class PagedModel:
    """A checkpoint served from KV blocks. `tables[name]` is the block table of the sequence `name`."""

    def __init__(
        self,
        path: Path,
        block_size: int = 4,
        num_blocks: int = 200,
        dtype: torch.dtype = torch.float32,
        backend_cls: type[AttentionBackend] = TorchPaged,
        ops: Ops | None = None,
    ):
        hf = json.loads((path / "config.json").read_text())
        built = build_model(model_class(hf), hf, tp=SingleRank(), dtype=dtype, device="cpu", ops=ops)
        self.report = load_weights(built.model, built.config, path, SingleRank())
        self.model, self.config = built.model, built.config
        self.limits = BatchLimits(
            max_rows=16, max_tokens=256, max_model_len=built.config.max_model_len, block_size=block_size
        )
        self.backends = []
        for spec, layers in kv_groups(built.attention_layers):
            backend = backend_cls(spec, self.limits, torch.device("cpu"))
            backend.allocate(len(layers), num_blocks)
            for i, layer in enumerate(layers):
                layer.bind(backend, i)
            self.backends.append(backend)
        # handed out in a scattered order, so that neighbours in a sequence are not neighbours in memory
        self.free = [1 + (i * 77) % (num_blocks - 1) for i in range(num_blocks - 1)]
        assert len(set(self.free)) == num_blocks - 1
        self.tables: dict[str, list[int]] = {}
        self.done: dict[str, int] = {}

    def share(self, new: str, old: str, tokens: int) -> None:
        """Start sequence `new` on the first `tokens` tokens (whole blocks) of `old`."""
        assert tokens % self.limits.block_size == 0
        assert tokens <= self.done[old]
        self.tables[new] = self.tables[old][: tokens // self.limits.block_size]
        self.done[new] = tokens

    @torch.inference_mode()
    def step(self, chunks: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Runs the next tokens of each sequence in one forward pass; single tokens first. Returns logits [n, V]."""
        order = sorted(chunks, key=lambda name: len(chunks[name]) > 1)
        size = self.limits.block_size
        tables = torch.zeros(len(order), self.limits.max_blocks, dtype=torch.int32)
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        for row, name in enumerate(order):
            table, before = self.tables.setdefault(name, []), self.done.get(name, 0)
            after = before + len(chunks[name])
            while len(table) * size < after:
                table.append(self.free.pop())
            tables[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
            ids += chunks[name]
            slots += [table[p // size] * size + p % size for p in range(before, after)]
            positions += range(before, after)
            self.done[name] = after
        counts, lens = [len(chunks[name]) for name in order], [self.done[name] for name in order]
        decode = sum(count == 1 for count in counts)
        inputs = StepInputs(
            block_tables=tables,
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            query_start_loc=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
            slot_mapping=torch.tensor(slots),
            positions=torch.tensor(positions),
            num_decode_rows=decode,
            query_lens_host=tuple(counts),
            seq_lens_host=tuple(lens),
        )
        for backend in self.backends:  # every KV group has the same tables here
            backend.fill(inputs)
        batch = ForwardBatch(num_tokens=len(ids))
        hidden = self.model(torch.tensor(ids), torch.tensor(positions), batch)
        logits = self.model.compute_logits(hidden)
        return dict(zip(order, logits.split(counts), strict=True))
