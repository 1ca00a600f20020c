"""Experts with weights of eight bits, through the whole engine and in Triton, against what the checkpoint means."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import eight_bit_engines as engines
import pytest
import torch
from eight_bit_files import FP8, INT8, Module, See, by_block, by_channel, per_group, per_token, write
from parity import families
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu
from triton_interpreter import import_kernels, interpreted

from nanoengine import LLM
from nanoengine.api import LayerInfo, ModelError, Quantization, QuantizationContext
from nanoengine.kernels import eight_bit
from nanoengine.kernels.ops import TritonOps
from nanoengine.layers.experts import ParallelExperts
from nanoengine.plugins.models.qwen3_moe import Qwen3MoE
from nanoengine.plugins.quantizations.compressed_tensors import CompressedTensors
from nanoengine.plugins.quantizations.eight_bit_experts import EightBitExperts
from nanoengine.plugins.quantizations.fp8 import Fp8
from nanoengine.plugins.quantizations.int8 import Int8
from nanoengine.setup.start.build_model import build_model
from nanoengine.setup.start.weights import load_weights
from nanoengine.testing.conformance.ranks import Ranks

import_kernels()
SIZES = {
    "hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_experts": 4,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 151,
}  # fmt: skip
PLAIN = ["lm_head", "re:.*mlp\\.gate$"]


def compressed(kind: str, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    one = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {"targets": ["Linear"], "weights": {**one, "strategy": "channel"}}
    group |= {} if inputs is None else {"input_activations": {**one, **inputs}}
    form = "naive-quantized" if inputs is None else f"{kind}-quantized"
    return {"quant_method": "compressed-tensors", "format": form, "ignore": PLAIN, "config_groups": {"a": group}}


@dataclass(frozen=True)
class Kind:
    """config: None: the checkpoint is plain, and `online` quantises it."""

    config: dict[str, Any] | None
    values: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    see: See
    label: str
    reader: type[Quantization]
    scale: str = "weight_scale"
    online: str = "auto"

    def pack(self, name: str, weight: Tensor) -> Module | None:
        if name == "lm_head" or name.endswith("mlp.gate"):
            return None
        codes, scale, values = self.values(weight)
        return Module({"weight": codes, self.scale: scale}, values, self.see)

    def quantization(self) -> Quantization:
        config = self.config or {}
        return self.reader.read(
            QuantizationContext(name="x", config=config, dtype=torch.float32, device="cpu", tp_size=1)
        )


TOKEN = {"strategy": "token", "dynamic": True}
HALVES = "fp8 blocks of which parts have a half"
KINDS = {
    "fp8 blocks": Kind(
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
        lambda w: by_block(w, FP8, 32, 32), per_group(FP8, 32), "fp8 block 32, dynamic", Fp8, "weight_scale_inv",
    ),
    HALVES: Kind(  # gate and up have half a block each
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        lambda w: by_block(w, FP8, 128, 128), per_group(FP8, 128), "fp8 block 128, dynamic", Fp8, "weight_scale_inv",
    ),
    "fp8 dynamic": Kind(
        compressed("float", TOKEN), lambda w: by_channel(w, FP8), per_token(FP8), "fp8 channel, dynamic",
        CompressedTensors,
    ),
    "int8 dynamic": Kind(
        compressed("int", TOKEN), lambda w: by_channel(w, INT8), per_token(INT8), "int8 channel, dynamic",
        CompressedTensors,
    ),
    "int8 weight": Kind(
        compressed("int", None), lambda w: by_channel(w, INT8), lambda x: x, "int8 channel, weight only",
        CompressedTensors,
    ),
    "fp8 online": Kind(
        None, lambda w: by_channel(w, FP8), per_token(FP8), "fp8 channel, dynamic, quantised while loading", Fp8,
        online="fp8",
    ),
    "int8 online": Kind(
        None, lambda w: by_channel(w, INT8), lambda x: x, "int8 channel, weight only, quantised while loading", Int8,
        online="int8",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write_model(tmp_path_factory.mktemp("moe") / "plain", "qwen3_moe", **SIZES)


def written(kind: Kind, source: Path, folder: Path) -> tuple[Path, dict[str, Module]]:
    """The folder to load, and what its modules mean."""
    if kind.config is not None:
        return folder, write(source, folder, kind.config, kind.pack)
    tensors = load_file(source / "model.safetensors")
    modules = {name.removesuffix(".weight"): each for name, each in tensors.items() if "_proj." in name}
    return source, {name: Module({}, kind.values(each)[2], kind.see) for name, each in modules.items()}


def expected(made: Mapping[str, Module], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out, path = torch.zeros_like(x), "model.layers.0.mlp.experts."
    for t in range(len(x)):
        for expert, weight in zip(ids[t].tolist(), weights[t], strict=True):
            gate, up, down = (made[f"{path}{expert}.{each}_proj"] for each in ("gate", "up", "down"))
            row = x[t : t + 1]
            out[t] += weight * down(silu(gate(row)) * up(row))[0]
    return out


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)]).to(torch.int32)
    return torch.randn(9, 64, generator=generator), ids, torch.rand(9, 2, generator=generator)


def experts_of(llm: LLM) -> ParallelExperts:
    (found,) = (each for each in llm._built.executor.runner.model.modules() if isinstance(each, ParallelExperts))
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_experts_are_what_the_checkpoint_means(name: str, source: Path, tmp_path: Path) -> None:
    kind = KINDS[name]
    folder, made = written(kind, source, tmp_path / "model")
    x, ids, weights = inputs()
    with engines.start(folder, quantization=kind.online) as llm:
        layer = experts_of(llm)
        torch.testing.assert_close(layer(x, ids, weights), expected(made, x, ids, weights), rtol=1e-5, atol=1e-5)
        report = {found.label: found.layers for found in llm.start_report.quantised}
        assert report[f"{kind.label} (experts)"] == 2  # gate and up, down
        assert report[kind.label] == 2
        assert layer.gate_up_proj.get_parameter("weight").element_size() == 1
        assert engines.logprobs(llm).isfinite().all()
        pytest.importorskip("triton")
        ops = layer.gate_up_proj.ops
        try:
            with interpreted():
                layer.gate_up_proj.ops = layer.down_proj.ops = TritonOps()
                layer.gate_up_proj.finish(), layer.down_proj.finish()
                assert layer.method._kernels is not eight_bit
                got = layer(x, ids, weights, add=x)
        finally:
            layer.gate_up_proj.ops = layer.down_proj.ops = ops
        wanted = expected(made, x, ids, weights) + x
        assert (got - wanted).norm() < 4e-3 * wanted.norm()


def test_a_model_of_such_weights_is_its_dequantised_one(source: Path, tmp_path: Path) -> None:
    kind = KINDS["int8 weight"]
    folder, made = written(kind, source, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    plain = tmp_path / "dequantised"
    plain.mkdir()
    (plain / "config.json").write_text((source / "config.json").read_text())
    save_file(
        {**tensors, **{f"{name}.weight": each.weight for name, each in made.items()}}, plain / "model.safetensors"
    )
    with engines.start(folder) as one, engines.start(plain) as other:
        torch.testing.assert_close(engines.logprobs(one), engines.logprobs(other), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True], ids=["width", "experts"])
@pytest.mark.parametrize("name", [each for each in KINDS if each != HALVES])
def test_two_ranks(name: str, whole: bool, source: Path, tmp_path: Path) -> None:
    """Ranks have a part of each expert, whose inputs they quantise themselves, or whole experts."""
    kind = KINDS[name]
    folder, made = written(kind, source, tmp_path / "model")
    hf, ranks = json.loads((folder / "config.json").read_text()), Ranks(2)
    x, ids, weights = inputs()

    def run(rank: int) -> Tensor:
        tp, choose = ranks.groups[rank], kind.quantization().method
        options: dict[str, Any] = {"device": "cpu", "choose": choose, "expert_parallel": whole}
        built = build_model(Qwen3MoE, hf, tp=tp, dtype=torch.float32, **options)
        load_weights(built.model, built.config, folder, tp)
        (layer,) = (each for each in built.model.modules() if isinstance(each, ParallelExperts))
        return tp.all_reduce(layer(x, ids, weights))

    wanted = expected(made, x, ids, weights)
    exact = whole or name in ("fp8 blocks", "int8 weight")
    for got in ranks.each(run):
        assert (got - wanted).norm() < (1e-5 if exact else 0.04) * wanted.norm()


def test_a_cut_within_a_block_is_refused_with_the_numbers(source: Path, tmp_path: Path) -> None:
    kind = replace(
        KINDS["fp8 blocks"], config={"quant_method": "fp8", "weight_block_size": [64, 64]},
        values=lambda w: by_block(w, FP8, 64, 64),
    )  # fmt: skip
    hf = {**json.loads((source / "config.json").read_text()), "num_attention_heads": 8, "num_key_value_heads": 8}
    message = r"experts.gate_up_proj: part gate of 64 outputs over .*=2 ranks are 32 each, .* block of 64"
    with pytest.raises(ModelError, match=message):
        build_model(
            Qwen3MoE, hf, tp=Ranks(2).groups[0], dtype=torch.float32, device="meta", choose=kind.quantization().method
        )


class Transposed(EightBitExperts):
    """Scales in another order."""

    def finish(self, layer: Any) -> None:
        super().finish(layer)
        own = layer.name.rpartition(".")[2]
        w = self._weights[own]
        self._weights[own] = replace(w, scale=w.scale.flip(1).contiguous())


class PlainInputs(EightBitExperts):
    def finish(self, layer: Any) -> None:
        super().finish(layer)
        self._weights = {name: replace(each, inputs="plain") for name, each in self._weights.items()}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "mutant"),
    [("fp8 blocks", Transposed), ("fp8 blocks", PlainInputs), ("int8 online", Transposed), ("fp8 online", PlainInputs)],
)
def test_mutants_are_seen(
    name: str, mutant: type[EightBitExperts], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = KINDS[name]
    folder, made = written(kind, source, tmp_path / "model")
    for module in ("fp8", "reading"):
        monkeypatch.setattr(f"nanoengine.plugins.quantizations.{module}.EightBitExperts", mutant)
    x, ids, weights = inputs()
    with engines.start(folder, quantization=kind.online) as llm:
        wanted = expected(made, x, ids, weights)
        assert (experts_of(llm)(x, ids, weights) - wanted).norm() > 1e-3 * wanted.norm()


def test_scales_that_experts_cannot_have_are_named() -> None:
    info = LayerInfo(name="layers.0.mlp.experts", kind="experts", shape=(4, 128, 64))
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    chosen = replace(KINDS["fp8 blocks"], config=config).quantization()
    with pytest.raises(ModelError, match=r"layers.0.mlp.experts: experts are not supported .*fp8 tensor, static"):
        chosen.method(info)
