"""Checkpoints of AWQ and GPTQ equal their dequantised models."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import int4_packers as pack
import pytest
import torch
from safetensors.torch import load_file, save_file
from triton_interpreter import import_kernels, interpreted

from nanoengine import LLM, SamplingParams
from nanoengine.api import LayerInfo, ModelError, QuantizationContext, WeightsError
from nanoengine.api.parallel import ShapesOnly, SingleRank
from nanoengine.api.sources import cache_root
from nanoengine.kernels.cpu import NotBuilt, load
from nanoengine.kernels.ops import KernelChoice, Ops, TritonOps
from nanoengine.layers.linear import ParallelLinear
from nanoengine.layers.quantised import dummy_bits
from nanoengine.plugins.models.llama import Llama
from nanoengine.plugins.quantizations import int4, int4_layouts
from nanoengine.plugins.quantizations.awq import Awq
from nanoengine.plugins.quantizations.gptq import Gptq
from nanoengine.setup.start.build_model import build_model
from nanoengine.setup.start.weights import load_weights
from nanoengine.testing.checkpoints import tiny_llama, tiny_qwen2

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
PROMPT = [5, 6, 7, 8, 9, 10]
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"}
V2 = {"checkpoint_format": "gptq_v2"}

import_kernels()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source") / "llama", **SMALL)


def answer(path: Path, **options: Any) -> tuple[tuple[int, ...], list[float], LLM]:
    options = {"fuse_kernels": False} | options  # without, a CPU rounds inputs
    with LLM(path, attention="torch", max_model_len=64, num_gpu_blocks_override=64, **options) as llm:
        [sample] = llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs
    assert sample.logprobs is not None
    found = [each[token].logprob for token, each in zip(sample.token_ids, sample.logprobs, strict=True)]
    return sample.token_ids, found, llm


def assert_equal(packed: Path, plain: Path, **options: Any) -> LLM:
    want, got = answer(plain, **options), answer(packed, **options)
    assert got[0] == want[0]
    assert got[1] == pytest.approx(want[1], abs=1e-5)
    return got[2]


CASES = {
    "awq": (AWQ, pack.awq_tensors, {}),
    "awq, one group": (AWQ | {"group_size": -1}, pack.awq_tensors, {}),
    "awq, older keys": (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True},
        pack.awq_tensors,
        {},
    ),
    "gptq": (GPTQ, pack.gptq_tensors, {}),
    "gptq, symmetric": (GPTQ | {"sym": True}, pack.gptq_tensors, {"symmetric": True}),
    "gptq v2": (GPTQ | V2, partial(pack.gptq_tensors, version=2), {}),
    "gptq, act-order": (GPTQ | {"desc_act": True}, pack.gptq_tensors, {"act_order": True}),
    "gptq, one group": (GPTQ | {"group_size": -1}, pack.gptq_tensors, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_equals_its_dequantised_model(case: str, source: Path, tmp_path: Path) -> None:
    """With act-order, q, k and v have groups of different inputs here, and so have gate and up."""
    config, tensors_of, how = CASES[case]
    group = config.get("group_size", 64)
    llm = assert_equal(*pack.write(source, tmp_path, config, tensors_of, group, **how))
    [ours] = [each for each in llm.start_report.quantised if each.label]
    assert ours.layers == 8
    assert ours.label.startswith(f"int4 ({config['quant_method']}), {'one' if group == -1 else f'groups of {group}'}")
    assert ours.label.endswith("act-order") == ("act-order" in case)
    weights = 2 * (64 * (64 + 2 * 32 + 64) + 3 * 64 * 128)
    most = weights / 2 + weights / (64 if group == -1 else group) * (2 if how.get("symmetric") else 3)
    assert ours.num_bytes <= most + 4 * 2 * 2 * 512 * bool(how.get("act_order"))


@pytest.mark.parametrize("case", ["awq", "gptq, act-order"])
def test_by_kernels_in_c(case: str, source: Path, tmp_path: Path) -> None:
    """Inputs are rounded to signed bytes, as the report says; else the answers are equal."""
    if isinstance(load(cache_root()), NotBuilt):
        pytest.skip("no C compiler")
    config, tensors_of, how = CASES[case]
    packed, plain = pack.write(source, tmp_path, config, tensors_of, 32, **how)
    want, got = answer(plain), answer(packed, fuse_kernels=True)
    [ours] = [each for each in got[2].start_report.quantised if each.label]
    assert ours.label.endswith("inputs rounded to int8")
    same = 1 + next((i for i, (a, b) in enumerate(zip(got[0], want[0], strict=True)) if a != b), len(want[0]))
    assert 1e-5 < max(abs(a - b) for a, b in zip(got[1][:same], want[1][:same], strict=False)) < 0.15


@pytest.mark.parametrize("case", ["awq", "awq, one group", "gptq, symmetric", "gptq, act-order"])
def test_triton_kernels_agree(case: str, source: Path, tmp_path: Path) -> None:
    """In the interpreter: each layer alone, behind a norm with a gate, and before the residual stream. With one group
    that of 128 inputs is in tiles."""
    pytest.importorskip("triton")
    config, tensors_of, how = CASES[case]
    packed, _ = pack.write(source, tmp_path, config, tensors_of, config["group_size"], **how)
    generator = torch.Generator().manual_seed(1)
    with interpreted(), torch.no_grad():
        fused_ops = TritonOps(kernels=KernelChoice.of({"int4_gluon": "one group" in case}))
        models = [loaded(config, packed, ops) for ops in (Ops(), fused_ops)]
        weights = [piece.linear.keywords["weight"] for each in linears(models[1]) for piece in each.method._pieces]
        assert [each.tiled for each in weights] == [
            case == "awq, one group" and each.shape[1] == 128 for each in weights
        ]
        for plain, fused in zip(*map(linears, models), strict=True):
            outputs, inputs = plain.info.shape
            x, residual = (torch.randn(3, width, generator=generator) for width in (inputs, outputs))
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)
            got, left = fused.added(x, residual)
            assert (left is None) == (plain.info.parts == () or "act-order" not in case)  # one kernel, or one a part
            torch.testing.assert_close(got if left is None else got + left, plain(x) + residual, rtol=1e-5, atol=1e-5)
            if plain.info.name.endswith("gate_up_proj"):
                norm = models[0].model.norm
                want, _ = plain.normed(norm, x, x, gate="silu")
                got, _ = fused.normed(models[1].model.norm, x, x, gate="silu")
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_norms_are_prepared_by_the_product_before_them(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """In the interpreter: what a layer adds to the stream, and the layer behind the norm; not for other tensors, not
    without the switch, nor in float16, where x times the norm's weight may be too large."""
    pytest.importorskip("triton")
    config = AWQ | {"group_size": 64}
    packed, _ = pack.write(source, tmp_path, config, pack.awq_tensors, 64)
    generator = torch.Generator().manual_seed(1)
    seen = list[int]()

    def chain(model: Any, x: torch.Tensor, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decoder = model.model.layers[0]
        norm = decoder.post_attention_layernorm
        total, left = decoder.self_attn.o_proj.added(x, stream)
        y, total = decoder.mlp.gate_up_proj.normed(norm, total, left, gate="silu")
        return y, total

    with interpreted(), torch.no_grad():
        plainly = TritonOps(products=False)
        models = [loaded(config, packed, ops) for ops in (Ops(), TritonOps(), plainly)]
        inputs = models[0].model.layers[0].self_attn.o_proj.info.shape[::-1]
        x, stream = (torch.randn(3, width, generator=generator) for width in inputs)
        kind = type(models[0].model.layers[0].post_attention_layernorm)
        add = kind.add
        monkeypatch.setattr(kind, "add", lambda self, *given: seen.append(1) or add(self, *given))
        want, total = chain(models[0], x, stream)
        for model, norms in ((models[1], 0), (models[2], 1)):
            seen.clear()
            got, same = chain(model, x, stream)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(same, total, rtol=1e-5, atol=1e-5)
            assert len(seen) == norms
        decoder = models[1].model.layers[0]
        decoder.self_attn.o_proj.added(x, stream)
        other = torch.randn(3, inputs[1], generator=generator)
        got, _ = decoder.mlp.gate_up_proj.normed(decoder.post_attention_layernorm, other, None)
        plain = models[0].model.layers[0]
        want, _ = plain.mlp.gate_up_proj.normed(plain.post_attention_layernorm, other, None)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def linears(model: Any) -> list[ParallelLinear]:
    """The quantised ones."""
    return [each for each in model.modules() if isinstance(each, ParallelLinear) and each.method.label]


def test_parts_whose_inputs_have_one_order_are_one_product(source: Path, tmp_path: Path) -> None:
    """As GPTQ makes them: q, k and v see the same inputs."""
    packed, _ = pack.write(source, tmp_path, GPTQ | {"desc_act": True}, pack.gptq_tensors, 32, act_order=True)
    tensors = load_file(packed / "model.safetensors")
    for name in [name for name in tensors if name.endswith("g_idx")]:
        like = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        tensors[name] = tensors[like].clone()
    save_file(tensors, packed / "model.safetensors")
    dense = load_file(tmp_path / "plain" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("qweight")]:
        module = name.removesuffix(".qweight")
        codes = int4_layouts.unpack_words(tensors[name].t()).long()
        zeros = int4_layouts.gptq_zeros(tensors[f"{module}.qzeros"], minus_one=True).long()
        scales = tensors[f"{module}.scales"].t()
        dense[f"{module}.weight"] = pack.Quantised(codes, scales, zeros, tensors[f"{module}.g_idx"]).values
    save_file(dense, tmp_path / "plain" / "model.safetensors")
    assert_equal(packed, tmp_path / "plain")


@pytest.mark.parametrize(("config", "tensors_of"), [(AWQ, pack.awq_tensors), (GPTQ, pack.gptq_tensors)])
def test_parts_that_are_one_tensor_in_the_file(config: Any, tensors_of: Any, source: Path, tmp_path: Path) -> None:
    """As in Phi-3's files."""
    config = config | ({"dynamic": {r"+:.*\.qkv_proj": {"group_size": 64}}} if config["quant_method"] == "gptq" else {})
    group = 64 if "dynamic" in config else 32

    def group_of(module: str) -> int:
        return group if module.endswith(("q_proj", "k_proj", "v_proj")) else 32

    packed, plain = pack.write(source, tmp_path, config, tensors_of, group_of)
    tensors = load_file(packed / "model.safetensors")
    for layer, kind in product(range(2), tensors_of(pack.quantise(torch.ones(8, 32), 32))):
        where = f"model.layers.{layer}.self_attn."
        parts = [tensors.pop(f"{where}{part}_proj.{kind}") for part in "qkv"]
        tensors[f"{where}qkv_proj.{kind}"] = parts[0] if kind == "g_idx" else torch.cat(parts, 1)
    save_file(tensors, packed / "model.safetensors")
    assert_equal(packed, plain)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases, a vocabulary that is a multiple of 8, and a KV head for each of two ranks."""
    return tiny_qwen2(tmp_path_factory.mktemp("source") / "qwen2", **SMALL, vocab_size=144)


DYNAMIC = {
    r"-:model\.layers\.1\.mlp\.": {},
    r"+:.*\.(o|down)_proj": {"group_size": -1},
    r".*\.0\.mlp": {"group_size": 64, "desc_act": False},
}


def by_dynamic(module: str) -> int:
    return -1 if module.endswith(("o_proj", "down_proj")) else 64 if ".0.mlp" in module else 32


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_rules_by_module_and_ranks(ranks: int, wide: Path, tmp_path: Path) -> None:
    """GPTQModel's `dynamic`, a quantised output layer, layers with biases, rows cut in groups or in one."""
    packed, plain = pack.write(
        wide,
        tmp_path,
        GPTQ | {"lm_head": True, "dynamic": DYNAMIC},
        pack.gptq_tensors,
        by_dynamic,
        plain=lambda module: ".1.mlp." in module or module == "model.embed_tokens",
    )
    llm = assert_equal(packed, plain, tensor_parallel_size=ranks)
    assert {each.label: each.layers for each in llm.start_report.quantised} == {
        "": 3,
        "int4 (gptq), groups of 32": 3,
        "int4 (gptq), groups of 64": 1,
        "int4 (gptq), one group": 3,
    }


@pytest.mark.parametrize(
    ("config", "tensors_of", "plain"),
    [
        (AWQ | {"modules_to_not_convert": ["self_attn", "layers.0.mlp.down"]}, pack.awq_tensors, None),
        (GPTQ | {"modules_in_block_to_quantize": [["mlp.up_proj", "mlp.gate_proj"]]}, pack.gptq_tensors, None),
    ],
)
def test_modules_on_a_list_stay_plain(config, tensors_of, plain, source: Path, tmp_path: Path) -> None:
    def stays(module: str) -> bool:
        if config is AWQ or "modules_to_not_convert" in config:
            return "self_attn" in module or "layers.0.mlp.down" in module or "layers" not in module
        return not module.endswith(("up_proj", "gate_proj"))

    llm = assert_equal(*pack.write(source, tmp_path, config, tensors_of, 32, plain=stays))
    [ours] = [each for each in llm.start_report.quantised if each.label]
    assert ours.layers == (3 if "modules_to_not_convert" in config else 2)


def test_biases_of_zeros_that_the_model_has_not(source: Path, tmp_path: Path) -> None:
    """AutoGPTQ wrote one for every layer; one with values is another model's."""
    packed, plain = pack.write(source, tmp_path, GPTQ, pack.gptq_tensors, 32)
    tensors = load_file(packed / "model.safetensors")
    tensors |= {
        name.replace("qweight", "bias"): torch.zeros(values.shape[1])
        for name, values in tensors.items()
        if name.endswith("qweight")
    }
    save_file(tensors, packed / "model.safetensors")
    assert_equal(packed, plain)
    tensors["model.layers.1.mlp.down_proj.bias"][3] = 0.5
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.down_proj: .* bias that is not zero"):
        answer(packed)


def test_dummy_weights(source: Path, tmp_path: Path) -> None:
    """Each of the eight codes of a word is random, also in the lowest bits, for which a float has none."""
    words = dummy_bits(
        (torch.rand(9000, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 0.02 * 3**0.5, torch.int32
    )
    codes = words[:, None] >> torch.arange(0, 32, 4) & 15
    assert all(torch.bincount(code, minlength=16).min() > 400 for code in codes.T)
    config = json.loads((source / "config.json").read_text())
    for i, given in enumerate((AWQ, GPTQ | {"desc_act": True})):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": given}))
        assert len(set(answer(folder, load_format="dummy")[0])) > 1


# Mutants


def test_a_zero_that_is_off_by_one_shows(source: Path, tmp_path: Path) -> None:
    packed, plain = pack.write(source, tmp_path, GPTQ, pack.gptq_tensors, 32)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"  # which stores zeros as they are
    (packed / "config.json").write_text(json.dumps(config))
    assert answer(packed)[1] != pytest.approx(answer(plain)[1], abs=1e-3)


def test_act_order_that_is_not_applied_shows(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = pack.write(
        source, tmp_path, GPTQ | {"desc_act": True}, pack.gptq_tensors, 32, act_order=True, symmetric=True
    )
    monkeypatch.setattr(int4, "_order", lambda layer, name, group: None)
    assert answer(packed)[1] != pytest.approx(answer(plain)[1], abs=1e-3)


def test_scales_that_are_swapped_between_parts_show(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, plain = pack.write(source, tmp_path, AWQ, pack.awq_tensors, 32)
    load = int4.Int4.load

    def swapped(self, layer, name, shard, values) -> None:
        if name == "scales" and shard.part in ("k", "v"):
            other = {"k": slice(96, 128), "v": slice(64, 96)}[shard.part]  # of 64 + 32 + 32 outputs
            shard = replace(shard, target=(shard.target[0], other))
        load(self, layer, name, shard, values)

    monkeypatch.setattr(int4.Int4, "load", swapped)
    assert answer(packed)[1] != pytest.approx(answer(plain)[1], abs=1e-3)


# What is refused


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AWQ | {"bits": 3}, r"quantization_config\.bits is 3; supported is 4"),
        (AWQ | {"version": "gemv_fast"}, r"version is 'gemv_fast'; supported is 'gemm'"),
        (AWQ | {"backend": "llm-awq"}, r"backend is 'llm-awq'"),
        (AWQ | {"desc_act": True}, r"desc_act is true; supported is false"),
        (AWQ | {"group_size": 0}, r"group_size is 0; supported is a positive number"),
        (AWQ | {"group_size": "32"}, r"group_size is '32'"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, r"modules_to_not_convert is 'lm_head'; supported is a list"),
        (AWQ | {"w_bit": 8}, r"w_bit is 8; supported is 4"),
        (AWQ | {"rotation": "hadamard"}, r"has rotation, which may mean other values; known: .*group_size"),
        ({"quant_method": "awq", "group_size": 32}, r"has no bits; supported is 4"),
        (GPTQ | {"bits": 8}, r"bits is 8; supported is 4"),
        (GPTQ | {"bits": 2}, r"bits is 2; supported is 4"),
        (GPTQ | {"bits": True}, r"bits is true; supported is 4"),
        (GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format is 'marlin'; supported is 'gptq' or 'gptq_v2'"),
        (GPTQ | {"is_marlin_format": True}, r"is_marlin_format is true; supported is false"),
        (GPTQ | {"format": "gptq_v2"}, r"has checkpoint_format and format with different values"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, r"dynamic\['\+:\.\*'\]\.bits is 8; supported is 4"),
        (GPTQ | {"dynamic": {"+:.*": {"adapter": {"rank": 4}}}}, r"dynamic\[.*\] has adapter"),
        (GPTQ | {"dynamic": {"-:(": {}}}, r"dynamic has '\(', no regular expression"),
        (GPTQ | {"dynamic": ["-:x"]}, r"dynamic is .*; supported is an object of objects"),
        (GPTQ | {"pack_dtype": "int16"}, r"pack_dtype is 'int16'; supported is 'int32'"),
        (GPTQ | {"desc_act": "yes"}, r"desc_act is 'yes'; supported is true or false"),
        (GPTQ | {"group_size": 48}, r"qkv_proj: 64 inputs in groups of 48 are not supported .*multiple of 32"),
        (GPTQ | {"dynamic": {r"-:.*\.1\..*v_proj": {}}}, r"layers\.1\.self_attn\.qkv_proj: .* leaves .*v_proj plain"),
        (
            GPTQ | {"dynamic": {r".*\.1\..*up_proj": {"group_size": 64}}},
            r"1\.mlp\.gate_up_proj: its fused parts are quantised in different ways .*group=32.*group=64",
        ),
    ],
)
def test_values_that_are_not_supported_are_named(config: dict[str, Any], words: str, source: Path) -> None:
    with pytest.raises(ModelError, match=words):
        built(config, source)


def loaded(config: dict[str, Any], packed: Path, ops: Ops) -> Any:
    made = built(config, packed, device="cpu", ops=ops)
    load_weights(made.model, made.config, packed, SingleRank())
    return made.model


def built(
    config: dict[str, Any],
    source: Path,
    *,
    tp: Any = None,
    device: str = "meta",
    ops: Ops | None = None,
    **changed: Any,
) -> Any:
    """A model whose config.json has this `quantization_config`."""
    hf = json.loads((source / "config.json").read_text()) | changed
    spec, target = config["quant_method"], {"awq": Awq, "gptq": Gptq}[config["quant_method"]]
    tp = tp or SingleRank()
    context = QuantizationContext(name=spec, config=config, dtype=torch.float32, device="cpu", tp_size=tp.size)
    return build_model(
        Llama,
        hf,
        tp=tp,
        dtype=torch.float32,
        device=device,
        ops=ops,
        choose=target.read(context).method,
    )


@pytest.mark.parametrize(
    ("config", "changed", "words"),
    [
        (
            AWQ,
            {"intermediate_size": 96},
            r"down_proj: 96 inputs over tensor_parallel_size=2 .* 48 each, .* block of 32",
        ),
        (
            GPTQ,
            {"intermediate_size": 96},
            r"down_proj: 96 inputs over tensor_parallel_size=2 .* 48 each, .* block of 32",
        ),
        (
            GPTQ | {"group_size": -1},
            {"intermediate_size": 96},
            r"96 inputs, 48 of them on each of 2 ranks in groups of 48",
        ),
        (
            AWQ,
            {"head_dim": 12, "num_attention_heads": 8},
            r"qkv_proj: part k of 24 outputs over .*=2 ranks are 12 each, .* block of 8",
        ),
        (GPTQ | {"desc_act": True}, {}, r"o_proj: its inputs are cut over tensor_parallel_size=2 ranks, but act-order"),
        (
            GPTQ | {"lm_head": True},
            {"vocab_size": 136},
            r"lm_head: 136 outputs over .*=2 ranks are 68 each, .* block of 8",
        ),
    ],
)
def test_cuts_within_groups_are_refused_with_the_numbers(config, changed, words: str, source: Path) -> None:
    with pytest.raises(ModelError, match=words):
        built(config, source, tp=ShapesOnly(2), **changed)
    built(config, source, **changed)


@pytest.mark.parametrize("how", [{"static_groups": True}, {"group_size": -1}])
def test_act_order_that_moves_nothing_is_cut(how: dict[str, Any], source: Path) -> None:
    built(GPTQ | {"desc_act": True} | how, source, tp=ShapesOnly(2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0.mlp.down_proj.g_idx": torch.zeros(128, dtype=torch.int32)}, r"groups that are not all of 32 inputs"),
        ({"0.mlp.down_proj.qzeros": None}, r"1 missing: .*0\.mlp\.down_proj\.qzeros"),
        ({"0.mlp.down_proj.qweight": torch.zeros(16, 64)}, r"qweight of dtype F32, expected one of I32"),
        (
            {"0.mlp.down_proj.qweight": torch.zeros(32, 64, dtype=torch.int32)},
            r"qweight \[32, 64\], expected \[16, 64\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, words: str, source: Path, tmp_path: Path) -> None:
    packed, _ = pack.write(source, tmp_path, GPTQ, pack.gptq_tensors, 32)
    tensors = load_file(packed / "model.safetensors") | {f"model.layers.{name}": each for name, each in change.items()}
    save_file({name: each for name, each in tensors.items() if each is not None}, packed / "model.safetensors")
    with pytest.raises(WeightsError, match=words):
        answer(packed)


@pytest.mark.parametrize("reader", [Awq, Gptq])
def test_experts_are_refused_unless_they_are_on_the_list(reader: Any) -> None:
    config = {"quant_method": "x", "bits": 4, "group_size": 32, "modules_to_not_convert": ["block_sparse_moe.experts"]}
    info = LayerInfo(name="mlp.experts", kind="experts", shape=(4, 64, 32), sources=("block_sparse_moe.experts.{}.w1",))
    common = {"name": "x", "dtype": torch.float32, "device": "cpu", "tp_size": 1}
    assert reader.read(QuantizationContext(config=config, **common)).method(info) is None
    with pytest.raises(ModelError, match=r"mlp\.experts: experts in .* are not supported"):
        reader.read(QuantizationContext(config=config | {"modules_to_not_convert": None}, **common)).method(info)
