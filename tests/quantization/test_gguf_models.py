"""Models in the blocks of a GGUF file through the engine, beside the same models dequantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from empty_cache import empty_cache
from gguf_blocks import KINDS, checkpoint, expected, random_blocks
from gguf_expanded import expanded_folder
from gguf_zoo import TinyGGUF
from safetensors.torch import load_file, save_file
from torch import Tensor
from triton_interpreter import INSTALLED, import_kernels, interpreted

from nanoengine import LLM, SamplingParams
from nanoengine.api import LayerInfo, ModelError, QuantizationContext, ShardSpec, WeightLayer, WeightsError
from nanoengine.api.parallel import ShapesOnly, SingleRank
from nanoengine.kernels.gguf import BLOCK_TYPES, dequantise
from nanoengine.kernels.matmul import Ahead
from nanoengine.kernels.ops import Ops, TritonOps
from nanoengine.layers.config_keys import Recorded, unread_keys
from nanoengine.plugins.model_sources.gguf_convert import convert
from nanoengine.plugins.quantizations import gguf as plugin
from nanoengine.plugins.quantizations.gguf import Gguf, GgufMethod
from nanoengine.plugins.quantizations.gguf_stores import Blocks, has_products
from nanoengine.setup.start.gguf_blocks import GGUF
from nanoengine.setup.start.quantization import quantised_by

import_kernels()
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [17]]
MIX = {"q_proj": "Q4_K", "k_proj": "Q6_K", "v_proj": "", "o_proj": "Q5_K", "gate_proj": "Q8_0", "up_proj": "Q5_0"}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are kept also on a CPU, by plain torch, whose products are those of the dequantised weights."""
    monkeypatch.setattr(plugin, "store_for", lambda layer, weight, kind, *_: Blocks(weight, kind))


def answers(path: Path, **options: Any) -> tuple[list[tuple[int, ...]], list[float], LLM]:
    """Tokens and their log-probs."""
    given = {"attention": "torch", "max_model_len": 64, "num_gpu_blocks_override": 64, "dtype": "float32", **options}
    with LLM(path, **given) as llm:
        samples = [each.outputs[0] for each in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    found = [each[t].logprob for s in samples for t, each in zip(s.token_ids, s.logprobs or [], strict=True)]
    return [tuple(each.token_ids) for each in samples], found, llm


def assert_same(got: tuple[Any, list[float], LLM], want: tuple[Any, list[float], LLM]) -> None:
    assert got[0] == want[0]
    assert got[1] == pytest.approx(want[1], abs=1e-5)
    assert len(set(want[1])) > 6


def labels(llm: LLM) -> dict[str, tuple[int, int]]:
    return {each.label: (each.layers, each.num_bytes) for each in llm.start_report.quantised}


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_one_type_equals_its_dequantised_one(kind: str, tmp_path: Path) -> None:
    """Fused layers, embedding and output layer; nothing is expanded, and the start report has the blocks' bytes."""
    packed, plain = checkpoint(tmp_path, kind)
    got = answers(packed)
    assert_same(got, answers(plain))
    type_ = BLOCK_TYPES[kind]
    rows = 2 * (256 + 2 * 128 + 256 + 2 * 512) + 2 * 131
    size = rows * type_.row_bytes(256) + 2 * 256 * type_.row_bytes(512)
    assert labels(got[2]) == {f"gguf {kind}": (2 * 4 + 2, size)}
    assert f"gguf {kind}: 10 layers" in got[2].start_report.line()


@pytest.mark.usefixtures("kept")
def test_dummy_weights_are_blocks_of_random_codes(tmp_path: Path) -> None:
    """Layers of one type and of several: log-probs differ, and are finite."""
    packed, _ = checkpoint(tmp_path, MIX)
    _, found, llm = answers(packed, load_format="dummy")
    assert len(set(found)) > 6
    assert torch.tensor(found).isfinite().all()
    assert {"gguf Q8_0 + Q5_0", "gguf Q5_K"} <= labels(llm).keys()


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("tied", [False, True])
def test_parts_of_different_types_equal_the_dequantised_model(tied: bool, tmp_path: Path) -> None:
    """Also a part that is plain, and an output layer that is tied to the embedding."""
    packed, plain = checkpoint(tmp_path, MIX, tie_word_embeddings=tied, attention_bias=True)
    got = answers(packed)
    assert_same(got, answers(plain))
    assert {label: layers for label, (layers, _) in labels(got[2]).items()} == {
        "gguf Q4_K + Q6_K + plain": 2,
        "gguf Q5_K": 2,
        "gguf Q8_0 + Q5_0": 2,
        "gguf Q4_1": 2 + (1 if tied else 2),
    }


DECODE = {kind: type_.decode for kind, type_ in BLOCK_TYPES.items()}


def exchanged(blocks: Tensor, codes: Tensor) -> Tensor:
    """A mutant of Q4_1: scale and minimum for each other."""
    return DECODE["Q4_1"](torch.cat([blocks[:, 2:4], blocks[:, :2], blocks[:, 4:]], dim=1), codes)


def off_by_one(blocks: Tensor, codes: Tensor) -> Tensor:
    """A mutant of Q4_0: the zero point is 7."""
    return DECODE["Q4_0"](blocks, codes) + blocks[:, :2].contiguous().view(torch.float16).float()


def next_scale(blocks: Tensor, codes: Tensor) -> Tensor:
    """A mutant of Q6_K: sixteen weights have the scale of the next sixteen."""
    moved = torch.cat([blocks[:, :192], blocks[:, 192:208].roll(1, dims=1), blocks[:, 208:]], dim=1)
    return DECODE["Q6_K"](moved, codes)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(("kind", "mutant"), [("Q4_1", exchanged), ("Q4_0", off_by_one), ("Q6_K", next_scale)])
def test_mutants_of_a_type_are_seen(
    kind: str, mutant: Callable[[Tensor, Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, plain = checkpoint(tmp_path, {"v_proj": kind})
    want = answers(plain)
    assert_same(answers(packed), want)
    monkeypatch.setitem(BLOCK_TYPES, kind, replace(BLOCK_TYPES[kind], decode=mutant))
    assert answers(packed)[1] != pytest.approx(want[1], abs=1e-3)


@pytest.mark.usefixtures("kept")
def test_a_mutant_that_exchanges_parts_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = checkpoint(tmp_path, {"gate_proj": "Q8_0", "up_proj": "Q5_0"})
    want = answers(plain)
    apply = GgufMethod.apply

    def wrong(self: GgufMethod, layer: WeightLayer, x: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        y = apply(self, layer, x, bias, **options)
        return y.roll(y.shape[1] // 2, dims=1) if "gate_up" in layer.name else y

    monkeypatch.setattr(GgufMethod, "apply", wrong)
    assert answers(packed)[1] != pytest.approx(want[1], abs=1e-3)


# Where blocks are not kept


def test_without_kernels_weights_are_expanded_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "store_for", lambda *_: None)
    packed, plain = checkpoint(tmp_path, MIX, tie_word_embeddings=True)
    got = answers(packed)
    assert_same(got, answers(plain))
    assert all("expanded" in label for label in labels(got[2]))
    assert sum(size for _, size in labels(got[2]).values()) == 4 * (131 * 256 + 2 * (1792 * 256 + 256 * 512))


def test_none_dequantises_while_loading_and_the_report_says_so(tmp_path: Path) -> None:
    packed, plain = checkpoint(tmp_path, MIX, tie_word_embeddings=True)
    got = answers(packed, quantization="none")
    assert_same(got, answers(plain))
    assert labels(got[2]) == {}
    made = got[2].start_report.dequantised
    assert made is not None
    assert (made.method, made.tensors) == ("gguf", 2 * 6 + 1)
    assert "13 gguf tensors dequantised" in got[2].start_report.line()


# Whole files


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
def test_a_file_gives_the_log_probs_of_its_dequantised_folder(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of q and k in another order, norms that lack one, types that differ within a layer."""
    monkeypatch.setenv("NANOENGINE_CACHE", empty_cache(tmp_path / "cache"))
    tiny = TinyGGUF(arch, "smollm" if arch == "llama" else "qwen2")
    file, folder = tiny.write(tmp_path / "tiny.gguf"), tmp_path / "folder"
    folder.mkdir()
    convert(file, folder, lambda text: None)
    got = answers(file)
    assert_same(got, answers(expanded_folder(folder, tmp_path / "expanded")))
    assert labels(got[2]).keys() >= {"gguf Q4_1 + Q8_0 + Q5_0", "gguf Q4_0 + Q5_1", "gguf Q8_0"}


def test_no_key_of_the_format_is_reported_as_unread() -> None:
    given = {"quant_method": "gguf", "types": {"lm_head": "Q4_0"}, "expanded": {"model.norm": {"a": [1]}}}
    config = Recorded({"quantization_config": given})
    assert quantised_by(config) is not None
    assert unread_keys(config) == []


def test_types_that_were_expanded_are_named_in_the_report(tmp_path: Path) -> None:
    _, plain = checkpoint(tmp_path, "Q4_0")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gguf", "types": {}, "expanded": {"model.layers.0.mlp.down_proj": "IQ2_XS"}
    }  # fmt: skip
    (plain / "config.json").write_text(json.dumps(config))
    found = labels(answers(plain)[2])
    assert found["gguf IQ2_XS, expanded when the file was converted"] == (1, 4 * 256 * 512)


def test_parts_that_were_expanded_are_named_in_the_report() -> None:
    given = {"types": {"up": "Q5_1"}, "expanded": {"gate": "IQ4_NL"}}
    layer = LayerInfo(name="gate_up", kind="linear", shape=(64, 32), sources=("gate", "up"))
    context = QuantizationContext(name="gguf", config=given, dtype=torch.float32, device="cpu", tp_size=1)
    method = Gguf.read(context).method(layer)
    assert method is not None
    assert method.label == "gguf IQ4_NL (expanded) + Q5_1"


# Ranks


@pytest.mark.slow
def test_two_ranks_hold_half_of_the_blocks_each(tmp_path: Path) -> None:
    """Parts by rows, row-parallel layers by blocks, the vocabulary padded."""
    packed, plain = checkpoint(tmp_path, {**MIX, "o_proj": "Q5_1", "down_proj": "Q6_K", "v_proj": "Q5_0"})
    got = answers(packed, tensor_parallel_size=2, device="cpu")
    if any("expanded" in label for label in labels(got[2])):
        assert_same(got, answers(plain))
    else:  # the kernels in C round the inputs: as one rank does, but for sums in another order
        assert got[1] == pytest.approx(answers(packed)[1], abs=5e-2)
        assert got[1] == pytest.approx(answers(plain)[1], abs=0.2)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_a_rank_reads_the_blocks_of_its_inputs(kind: str, rank: int) -> None:
    """A row-parallel weight [24, 1024] is cut between blocks; heads of 64 stay together."""
    blocks = random_blocks(kind, 24, 1024)
    layer = layer_of(rank, 2)
    method = GgufMethod((kind,), torch.float32)
    method.create(layer, ShardSpec(shape=(24, 1024), dim=1, join=0, split="even", unit=64))
    [shard] = layer.specs["weight"].shards(rank, 2)
    method.load(layer, "weight", shard, torch.from_numpy(blocks)[shard.source])
    values = dequantise(layer.get_parameter("weight"), kind)
    assert torch.equal(values, expected(blocks, kind)[:, rank * 512 : (rank + 1) * 512])


@pytest.mark.parametrize(
    ("width", "ranks", "words"),
    [
        (768, 2, "mlp.x: 768 inputs over tensor_parallel_size=2 ranks are 384 each, which end within a block of 256"),
        (256, 2, "mlp.x: 256 inputs .* 128 each, .* block of 256: the ranks must divide the number of blocks, 1"),
        (800, 1, "mlp.x: rows of 800 weights are no whole blocks of Q6_K, of 256"),
    ],
)
def test_cuts_within_blocks_are_refused_with_the_numbers(width: int, ranks: int, words: str) -> None:
    method = GgufMethod(("Q6_K",), torch.float32)
    with pytest.raises(ModelError, match=words):
        method.create(layer_of(0, ranks), ShardSpec(shape=(24, width), dim=1, join=0, split="even"))


def layer_of(rank: int, size: int) -> WeightLayer:
    tp = SingleRank() if size == 1 else ShapesOnly(size)
    made = WeightLayer(SimpleNamespace(tp=tp, ops=Ops(), dtype=torch.float32, device="cpu"), "mlp.x")  # type: ignore[arg-type]
    made.tp.rank = rank  # type: ignore[misc]
    return made


# What is refused


def context(**config: Any) -> QuantizationContext:
    given = {"quant_method": "gguf", **config}
    return QuantizationContext(name="gguf", config=given, dtype=torch.float32, device="cpu", tp_size=1)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"types": {"lm_head": "Q2_K"}}, "lm_head has blocks of 'Q2_K'; valid: Q4_0, Q4_1"),
        ({"types": ["Q4_0"]}, "quantization_config.types of gguf maps modules to types"),
        ({"types": {"lm_head": 4}}, "quantization_config.types of gguf maps modules to types"),
        ({"types": {}, "bits": 4}, "quantization_config of gguf has bits; known: expanded, quant_method, types"),
    ],
)
def test_configs_that_are_not_supported_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        Gguf.read(context(**config))


@pytest.mark.parametrize("types", [["Q4_0"], {"lm_head": 4}, None])
def test_types_are_checked_where_blocks_are_dequantised(types: Any) -> None:
    with pytest.raises(ModelError, match=r"quantization_config\.types of gguf maps modules to types"):
        GGUF.reading({"quant_method": "gguf", "types": types})
    assert GGUF.reading({"quant_method": "gguf"}).types == {}


def test_experts_in_blocks_are_refused_and_others_stay_plain() -> None:
    made = Gguf.read(context(types={"mlp.experts.{}.up_proj": "Q4_0"}))
    with pytest.raises(ModelError, match=r"mlp\.experts: experts in the blocks of a GGUF file are not supported"):
        made.method(LayerInfo(name="mlp.experts", kind="experts", shape=(8, 4, 4), sources=("mlp.experts.{}.up_proj",)))
    assert made.method(LayerInfo(name="lm_head", kind="head", shape=(8, 4), sources=("lm_head",))) is None


@pytest.mark.parametrize("quantization", ["auto", "none"])
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(256, 544), r"of dtype F32, expected one of U8|weight of F32 \[256, 544\] has no blocks of Q8_0"),
        (torch.zeros(256, 272, dtype=torch.uint8), r"\[256, 272\], expected \[256, 544\]|\[256, 256\], expected \["),
        (torch.zeros(256, 31, dtype=torch.uint8), r"\[256, 31\], expected|of U8 \[256, 31\] has no blocks of Q8_0"),
    ],
)
def test_tensors_that_are_no_such_blocks_are_named(
    quantization: str, tensor: Tensor, words: str, tmp_path: Path
) -> None:
    packed, _ = checkpoint(tmp_path, {"down_proj": "Q8_0"})
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(load_file(packed / "model.safetensors") | {name: tensor}, packed / "model.safetensors")
    with pytest.raises(WeightsError, match=words) as caught:
        answers(packed, quantization=quantization)
    assert name in str(caught.value)


# The other stores


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_older_gpus_do_not_get_the_assembly(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert has_products(torch.device("cuda", 0)) is runs


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("rows", "lines", "products", "store"),
    [(1, 24, True, "Planes"), (3, 32, False, "Planes"), (3, 32, True, "Fragments"), (17, 32, True, "Fragments")],
)
def test_orders_for_triton_equal_the_blocks(rows: int, lines: int, products: bool, store: str) -> None:
    """A fused layer of types, of which neighbours are alike, one plain, and an embedding; in Triton's interpreter where
    there is no GPU. products: the option fuse_products."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds, parts = ("Q4_K", "Q4_K", "Q6_K", ""), tuple((part, lines) for part in "qkvg")
    blocks = [random_blocks(kind, lines, 256, seed) for seed, kind in enumerate(kinds[:3])]
    plain, x, bias = (
        torch.randn(lines, 256),
        torch.randn(rows, 256, device=device),
        torch.randn(4 * lines, device=device),
    )
    layer, dtype = layer_of(0, 1), torch.float32 if device == "cpu" else torch.bfloat16
    method = GgufMethod(kinds, dtype)
    method.create(layer, ShardSpec(shape=(4 * lines, 256), parts=parts))
    for (part, _), values in zip(parts, (*map(torch.from_numpy, blocks), plain), strict=True):
        method.load(layer, f"weight:{part}", layer.specs[f"weight:{part}"].shards(0, 1)[0], values)
    layer.to(device)
    weight = torch.cat([*map(expected, blocks, kinds), plain]).to(device)
    with interpreted():
        layer.ops = SimpleNamespace(name="triton", linear=F.linear, prepares_norms=products)  # type: ignore[assignment]
        method.finish(layer)
        assert {type(each).__name__ for each in method._stores.values()} == {store}
        assert len(list(layer.parameters())) == 3
        found = method.apply(layer, x.to(dtype), bias.to(dtype)) if device == "cpu" else None
        if found is not None:
            torch.testing.assert_close(found, F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
        embedding = layer_of(0, 1)
        method = GgufMethod(("Q6_K",), dtype)
        method.create(embedding, ShardSpec(shape=(lines, 256), split="padded"))
        method.load(embedding, "weight", embedding.specs["weight"].shards(0, 1)[0], torch.from_numpy(blocks[2]))
        embedding.to(device)
        embedding.ops = layer.ops
        method.finish(embedding)
        found = method.rows(embedding, torch.tensor([3, 0, 3], device=device))
    near = 1e-6 if device == "cpu" else 4e-3
    torch.testing.assert_close(found.float(), weight[2 * lines + torch.tensor([3, 0, 3])], atol=near, rtol=near)


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
def test_a_product_prepares_the_norm_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two products of fragments, of a few rows, a norm takes no launch."""
    device, dtype, near = ("cuda", torch.bfloat16, 0.03) if torch.cuda.is_available() else ("cpu", torch.float32, 1e-5)
    ahead, weight = Ahead(), torch.rand(256, device=device, dtype=dtype)

    def add(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return F.rms_norm(total, (256,), weight, 1e-6), total

    norm: Any = SimpleNamespace(weight=weight, eps=1e-6, add=add)
    monkeypatch.setattr(plugin, "next_norm_of", lambda *_: weight)
    made = []
    for kind, lines in (("Q5_0", 256), ("Q4_K", 64)):
        blocks, layer, method = random_blocks(kind, lines, 256), layer_of(0, 1), GgufMethod((kind,), dtype, ahead)
        method.create(layer, ShardSpec(shape=(lines, 256)))
        method.load(layer, "weight", layer.specs["weight"].shards(0, 1)[0], torch.from_numpy(blocks))
        layer.to(device)
        layer.ops = TritonOps()
        method.finish(layer)
        made.append((method, layer, expected(blocks, kind).to(device)))
    (first, one, up), (second, two, down) = made
    x, residual = (torch.randn(2, 256, device=device, dtype=dtype) for _ in range(2))
    with interpreted():
        total, left = first.apply_added(one, x, None, residual)
        assert ahead._sum is not None
        y, stream = second.apply_normed(two, norm, total, left, None, "silu")
    assert ahead._sum is None
    want = F.linear(x.float(), up) + residual.float()
    torch.testing.assert_close(stream.float(), want, atol=near, rtol=near)
    gates, ups = F.linear(F.rms_norm(want, (256,), weight.float(), 1e-6), down).chunk(2, dim=1)
    torch.testing.assert_close(y.float(), F.silu(gates) * ups, atol=near, rtol=near)
