"""Engines over small quantised checkpoints, and their layers beside what the checkpoint means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from eight_bit_files import Module
from torch import Tensor

from nanoengine import LLM, SamplingParams
from nanoengine.api import LinearMethod, Quantization
from nanoengine.layers.linear import ParallelLinear, Unquantised
from nanoengine.plugins.models.qwen3 import Qwen3
from nanoengine.setup.start.build_model import build_model
from nanoengine.setup.start.weights import load_weights
from nanoengine.testing.checkpoints import tiny_llama, tiny_qwen3
from nanoengine.testing.conformance.ranks import Ranks

SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SMALL: Mapping[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "fuse_kernels": False,  # the kernels in C round inputs
    "max_num_seqs": 4,
    "block_size": 4,
    "num_gpu_blocks_override": 64,
    "max_model_len": 64,
    "max_logprobs": -1,
}
IDS = [(7 * i + 3) % 120 for i in range(24)]


def llama(folder: Path, **overrides: Any) -> Path:
    return tiny_llama(folder, **{**SIZES, **overrides})


def qwen3(folder: Path, **overrides: Any) -> Path:
    return tiny_qwen3(folder, **{**SIZES, **overrides})


def start(folder: Path, **options: Any) -> LLM:
    return LLM(folder, **{**SMALL, **options})


def logprobs(llm: LLM, ids: list[int] = IDS) -> Tensor:
    """Log-probs [tokens - 1, vocabulary] of the tokens behind each of the prompt's but the last."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, ignore_eos=True)
    (output,) = llm.generate([ids], params, use_tqdm=False)
    assert output.error is None
    rows = output.prompt_logprobs[1:]
    return torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])


def linears(llm: LLM, method: type[LinearMethod] = LinearMethod) -> dict[str, ParallelLinear]:
    """The linear layers whose method is quantised, by name, once the engine is up."""
    model = llm._built.executor.runner.model
    found = {each.info.name: each for each in model.modules() if isinstance(each, ParallelLinear)}
    return {
        name: each for name, each in found.items()
        if isinstance(each.method, method) and not isinstance(each.method, Unquantised)
    }  # fmt: skip


@torch.no_grad()
def layers_off(llm: LLM, made: Mapping[str, Module]) -> float:
    """Largest relative error of a quantised layer's product, over its parts, against what the checkpoint means.

    All modules that the checkpoint quantises must have been found.
    """
    worst, seen, generator = 0.0, set[str](), torch.Generator().manual_seed(3)
    for layer in linears(llm).values():
        for rows in (1, 5):
            x = torch.randn(rows, layer.info.shape[1], generator=generator)
            names = (layer.info.name,) if layer.info.name in made else layer.info.sources
            seen |= set(names)
            expected = [made[name](x) for name in names]
            got = layer.method.apply(layer, x, None).split([each.shape[1] for each in expected], 1)
            for each, wanted in zip(got, expected, strict=True):
                worst = max(worst, float((each - wanted).norm() / wanted.norm()))
    assert seen == set(made), seen ^ set(made)
    return worst


@torch.no_grad()
def ranks_off(folder: Path, made: Mapping[str, Module], chosen: Quantization, size: int = 2) -> float:
    """As `layers_off`, of a model over ranks, which are threads here. A rank quantises its own part of the inputs."""
    hf = json.loads((folder / "config.json").read_text())
    ranks = Ranks(size)

    def built(rank: int) -> dict[str, ParallelLinear]:
        found = build_model(Qwen3, hf, tp=ranks.groups[rank], dtype=torch.float32, device="cpu", choose=chosen.method)
        load_weights(found.model, found.config, folder, ranks.groups[rank])
        return {each.info.name: each for each in found.model.modules() if isinstance(each, ParallelLinear)}

    models = [built(rank) for rank in range(size)]
    worst, kinds, generator = 0.0, set[str](), torch.Generator().manual_seed(3)
    for name, first in models[0].items():
        names, parallel = first.info.sources, first.info.parallel
        if names[0] not in made:
            continue
        kinds.add(parallel)
        x = torch.randn(3, first.info.shape[1], generator=generator)
        of_rank = list(x.chunk(size, 1)) if parallel == "row" else [x] * size
        got = ranks.each(lambda rank, name=name, of_rank=of_rank: models[rank][name](of_rank[rank]))
        if parallel == "row":
            (module,) = (made[each] for each in names)
            cut = [Module({}, weight, module.see) for weight in module.weight.chunk(size, 1)]
            pairs = [(each, sum(part(own) for part, own in zip(cut, of_rank, strict=True))) for each in got]
        else:
            parts = [made[each](x).chunk(size, 1) for each in names]
            pairs = [(each, torch.cat([part[rank] for part in parts], 1)) for rank, each in enumerate(got)]
        worst = max(worst, *(float((each - wanted).norm() / wanted.norm()) for each, wanted in pairs))
    assert kinds == {"column", "row"}
    return worst
