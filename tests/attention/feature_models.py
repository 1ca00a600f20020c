"""A model with any feature of attention, its plain formula, and a backend with a feature of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoengine.api import (
    AttentionLayerSpec,
    AttentionSpec,
    BuildContext,
    ForwardBatch,
    Model,
    ModelConfig,
    ModelError,
    ModelSpec,
    hookimpl,
)
from nanoengine.layers.attention import AttentionSinks
from nanoengine.layers.sharding import heads_per_rank
from nanoengine.plugins.attention_backends.torch_paged import TorchPaged

WIDTH, HEADS, KV_HEADS, SIZE, VOCAB, LONGEST = 32, 4, 2, 8, 40, 96
TEMPERATURE = "tests.temperature"


@dataclass(frozen=True, slots=True, kw_only=True)
class KindsConfig(ModelConfig):
    """value_size: of all layers. sinks, causal, shares, temperature: of the second of the two layers."""

    value_size: int
    sinks: bool
    causal: bool
    shares: bool
    temperature: float


class Kinds(Model):
    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> KindsConfig:
        names = {"value_size": int, "sinks": bool, "causal": bool, "shares": bool, "temperature": float}
        for name, kind in names.items():
            if type(hf.get(name)) is not kind:
                raise ModelError(f"config.json: {name} must be a {kind.__name__}")
        if hf.get("architectures") != ["KindsForCausalLM"]:
            raise ModelError("config.json: architectures must be KindsForCausalLM")
        own = {name: hf[name] for name in names}
        return KindsConfig(vocab_size=VOCAB, hidden_size=WIDTH, max_model_len=LONGEST, **own)

    def __init__(self, config: KindsConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        self.embed = ctx.embedding("embed", VOCAB, WIDTH)
        self.layers = torch.nn.ModuleList([Layer(index, config, ctx) for index in range(2)])
        self.head = ctx.lm_head("head", WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        x: Tensor = self.embed(input_ids)
        x = x + (positions.unsqueeze(-1) / LONGEST).to(x.dtype)
        for layer in self.layers:
            x = x + layer(x)
        return x

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


class Layer(torch.nn.Module):
    def __init__(self, index: int, config: KindsConfig, ctx: BuildContext) -> None:
        super().__init__()
        name, second = f"layers.{index}", index == 1
        heads = heads_per_rank(HEADS, ctx.tp.size)
        kv_heads = heads_per_rank(KV_HEADS, ctx.tp.size, replicate=True)
        self.q = ctx.linear(f"{name}.q", WIDTH, HEADS * SIZE, parallel="column", head_size=SIZE)
        self.k = ctx.linear(f"{name}.k", WIDTH, KV_HEADS * SIZE, parallel="column", head_size=SIZE)
        values = config.value_size
        self.v = ctx.linear(f"{name}.v", WIDTH, KV_HEADS * values, parallel="column", head_size=values)
        self.o = ctx.linear(f"{name}.o", HEADS * values, WIDTH, parallel="row", head_size=values)
        self.shares = second and config.shares
        sinks = None
        if second and config.sinks:
            self.sinks = AttentionSinks(HEADS, ctx)
            sinks = self.sinks.weight
        spec = AttentionLayerSpec(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=SIZE,
            scale=0.5,
            sinks=sinks,
            causal=config.causal or not second,
            value_size=values,
            shares="layers.0.attn" if self.shares else None,
            extras={TEMPERATURE: config.temperature} if second and config.temperature != 1.0 else {},
        )
        self.attn = ctx.attention(f"{name}.attn", spec)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x).unflatten(1, (-1, SIZE)), self.k(x).unflatten(1, (-1, SIZE))
        if self.shares:
            out = self.attn.attend(q)
        else:
            out = self.attn(q, k, self.v(x).unflatten(1, (-1, self.attn.value_size)))
        y: Tensor = self.o(out.flatten(1))
        return y


def write(path: Path, **kinds: Any) -> Path:
    """A checkpoint with random weights."""
    options = {"value_size": SIZE, "sinks": False, "causal": True, "shares": False, "temperature": 1.0, **kinds}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["KindsForCausalLM"], **options}))
    values = options["value_size"]
    shapes = {"embed": (VOCAB, WIDTH), "head": (VOCAB, WIDTH)}
    for index in range(2):
        widths = {"q": HEADS * SIZE, "k": KV_HEADS * SIZE, "v": KV_HEADS * values}
        shapes |= {f"layers.{index}.{name}": (width, WIDTH) for name, width in widths.items()}
        shapes[f"layers.{index}.o"] = (WIDTH, HEADS * values)
    if options["sinks"]:
        shapes["layers.1.sinks"] = (HEADS,)
    torch.manual_seed(3)
    tensors = {
        f"{name}.weight": torch.randn(shape) * (2.0 if len(shape) == 1 else 0.25) for name, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors")
    return path


def hidden_states(path: Path, ids: Tensor, **instead: Any) -> Tensor:
    """The hidden states of one prompt, float64 [n, WIDTH], by the formula. `instead`: other options to compute with."""
    options = json.loads((path / "config.json").read_text()) | instead
    weights = {
        name.removesuffix(".weight"): each.double() for name, each in load_file(path / "model.safetensors").items()
    }
    n, values = len(ids), options["value_size"]
    x = weights["embed"][ids] + torch.arange(n).unsqueeze(-1) / LONGEST
    stored: dict[str, Tensor] = {}
    for index in range(2):
        of, second = {part: weights[f"layers.{index}.{part}"] for part in "qkvo"}, index == 1
        q = (x @ of["q"].T).view(n, HEADS, SIZE)
        if not (second and options["shares"]):
            stored["k"] = (x @ of["k"].T).view(n, KV_HEADS, SIZE).repeat_interleave(2, 1)
            stored["v"] = (x @ of["v"].T).view(n, KV_HEADS, values).repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", q, stored["k"]) * 0.5
        if second:
            scores = scores * options["temperature"]
        if options["causal"] or not second:
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        top = scores.exp()
        total = top.sum(-1, keepdim=True)
        if second and options["sinks"]:
            total = total + weights["layers.1.sinks"].exp().view(-1, 1, 1)
        x = x + torch.einsum("hqk,khd->qhd", top / total, stored["v"]).flatten(1) @ of["o"].T
    return x


def logits(path: Path, ids: Tensor, **instead: Any) -> Tensor:
    return hidden_states(path, ids, **instead) @ load_file(path / "model.safetensors")["head.weight"].double().T


class Tempered(TorchPaged):
    """Scores have a factor that the layer gives."""

    capabilities = replace(TorchPaged.capabilities, features=TorchPaged.capabilities.features | {TEMPERATURE})

    def attend(self, layer: int, spec: AttentionLayerSpec, q: Tensor) -> Tensor:
        return super().attend(layer, spec, q * spec.extras.get(TEMPERATURE, 1.0))


@hookimpl
def register_models() -> list[ModelSpec]:
    return [ModelSpec(name="kinds", architectures=("KindsForCausalLM",), target=f"{__name__}:Kinds", api=1)]


@hookimpl
def register_attention_backends() -> list[AttentionSpec]:
    return [AttentionSpec(name="tempered", target=f"{__name__}:Tempered", api=1, preference=-50)]
