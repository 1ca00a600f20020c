"""MXFP4 files of GPT-OSS: dequantised while loading, bit for bit as transformers does, on each rank its own part."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import families, tiny
from parity.compare import Mismatch, compare
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssForCausalLM, Mxfp4Config, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nanoengine import SamplingParams
from nanoengine.api import ModelError, WeightsError
from nanoengine.api.parallel import ShapesOnly, SingleRank
from nanoengine.plugins.models.gpt_oss import GptOss
from nanoengine.setup.start import mxfp4, weights
from nanoengine.setup.start.build_model import build_model
from nanoengine.setup.start.checkpoint import INDEX_FILE, SINGLE_FILE
from nanoengine.setup.start.mxfp4 import MXFP4, Mxfp4Tensor
from nanoengine.setup.start.quantization import packed_format
from nanoengine.setup.start.upload import Uploads
from nanoengine.setup.start.weights import LoadReport, load_weights

# The object of openai/gpt-oss-20b's config.json.
GIVEN = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
# A rank's part of the width cuts groups of 32 values.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_experts_per_tok": 2}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
ASKED = tiny.prompts(6, shared=21, longest=24)
CPU = torch.device("cpu")


def codes(*shape: int, least: int = 0, most: int = 255, seed: int = 0) -> Tensor:
    """Random bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(least, most + 1, shape, generator=generator).to(torch.uint8)


def packed(folder: Path, *, split: bool = False) -> Path:
    """A tiny checkpoint whose experts are MXFP4. `split`: blocks and scales are in different files."""
    families.write(folder, "gpt_oss", **SIZES)
    held = load_file(folder / SINGLE_FILE)
    for name in [name for name in held if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = held.pop(name).shape
        held[f"{name}_blocks"] = codes(experts, outputs, inputs // 32, 16, seed=len(held))
        held[f"{name}_scales"] = codes(experts, outputs, inputs // 32, least=121, most=124, seed=len(held))
    (folder / SINGLE_FILE).unlink()
    parts = {True: "a.safetensors", False: "b.safetensors"} if split else dict.fromkeys((True, False), SINGLE_FILE)
    files = {name: parts[name.endswith("_blocks")] for name in held}
    for file in set(files.values()):
        save_file({name: held[name] for name in held if files[name] == file}, folder / file, {"format": "pt"})
    if split:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return changed(folder, quantization_config=GIVEN)


def changed(folder: Path, **fields: Any) -> Path:
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, **fields}))
    return folder


def reference(folder: Path) -> PreTrainedModel:
    """transformers' model of the same files."""
    return GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", quantization_config=Mxfp4Config(dequantize=True)
    ).eval()


def load(folder: Path, rank: int = 0, size: int = 1, *, whole: bool = False) -> tuple[Any, LoadReport]:
    """`whole`: ranks have whole experts."""
    hf = json.loads((folder / "config.json").read_text())
    tp = ShapesOnly(size) if size > 1 else SingleRank()
    tp.rank = rank  # type: ignore[misc]
    built = build_model(GptOss, hf, tp=tp, dtype=torch.float32, device=CPU, expert_parallel=whole)
    return built.model, load_weights(built.model, built.config, folder, tp, packed_format(hf))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("mxfp4"))


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Bit for bit; any NaN is one."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    bits = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    a, b = (torch.where(x.isnan(), torch.zeros_like(x), x).contiguous().view(bits) for x in (ours, theirs))
    return torch.equal(a, b) and torch.equal(ours.isnan(), theirs.isnan())


BLOCKS, SCALES = codes(3, 64, 5, 16, seed=1), codes(3, 64, 5, seed=2)
SCALES.view(-1)[300:556] = torch.arange(256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    """With all 256 exponents; the largest overflow, one is no exponent, and float16 rounds."""
    assert len(SCALES.unique()) == 256
    assert len(BLOCKS.unique()) == 256
    ours = Mxfp4Tensor(BLOCKS, SCALES)
    values = ours[...]
    assert [*values.shape] == [*ours.get_shape()] == [3, 160, 64]
    assert _same(values.to(dtype), convert_moe_packed_tensors(BLOCKS, SCALES, dtype=dtype))


MUTANTS: dict[str, Callable[[], Tensor]] = {
    "halves of a byte swapped": lambda: Mxfp4Tensor((BLOCKS << 4) | (BLOCKS >> 4), SCALES)[...],
    "exponents one off": lambda: Mxfp4Tensor(BLOCKS, (SCALES.int() + 1).clamp(max=255).to(torch.uint8))[...],
    "not transposed": lambda: Mxfp4Tensor(BLOCKS, SCALES)[...].reshape(3, 64, 160).mT,
    "scales of the next group": lambda: Mxfp4Tensor(BLOCKS, SCALES.roll(1, -1))[...],
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_has_other_values(mutant: str) -> None:
    got = MUTANTS[mutant]()
    assert not _same(got.contiguous(), convert_moe_packed_tensors(BLOCKS, SCALES, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "index",
    [
        (slice(1, 3), slice(0, 160), slice(10, 20)),
        (slice(0, 3), slice(33, 95), slice(0, 64)),
        (slice(0, 1), slice(5, 6), slice(63, 64)),
        slice(2, 3),
    ],
)
def test_a_slice_reads_its_own_groups_only(index: Any) -> None:
    ours = Mxfp4Tensor(BLOCKS, SCALES)
    assert _same(ours[index].contiguous(), ours[...][index].contiguous())
    pieces, _ = ours.read(index)
    values = ours[...][index].numel()
    assert sum(each.nbytes for each in pieces) <= 17 * (values // 32 + 2 * values // (ours[...][index].shape[1]))


@pytest.mark.parametrize(("size", "whole"), [(1, False), (2, False), (4, False), (4, True)])
def test_each_rank_loads_what_it_loads_of_dequantised_files(
    size: int, whole: bool, folder: Path, tmp_path: Path
) -> None:
    """And reads not more than its part of the packed tensors, widened to groups."""
    held = load_file(folder / SINGLE_FILE)
    for name in [name.removesuffix("_blocks") for name in held if name.endswith("_blocks")]:
        pair = held.pop(f"{name}_blocks"), held.pop(f"{name}_scales")
        held[name] = convert_moe_packed_tensors(*pair, dtype=torch.float32)
    save_file(held, tmp_path / SINGLE_FILE, {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    changed(tmp_path, quantization_config=None)
    for rank in range(size):
        (want, plain), (got, report) = (load(each, rank, size, whole=whole) for each in (tmp_path, folder))
        for (name, a), b in zip(got.named_parameters(), want.parameters(), strict=True):
            assert torch.equal(a, b), name
        assert report.num_tensors == plain.num_tensors
        assert report.num_bytes < 0.6 * plain.num_bytes


def test_through_the_buffers_of_a_gpu_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want, _ = load(folder)
    made = list[Any]()

    def way_to(device: torch.device) -> Any:
        made.append(Uploads(device, buffer_bytes=512, num_buffers=3))

        class Way:
            def __enter__(self) -> Any:
                return made[-1].__enter__().put

            def __exit__(self, *error: Any) -> None:
                made[-1].__exit__(*error)

        return Way()

    monkeypatch.setattr(weights, "_way_to", way_to)
    got, _ = load(folder)
    assert made
    for (name, a), b in zip(got.named_parameters(), want.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name


@pytest.mark.parametrize(("ranks", "split"), [(1, True), (2, False)])
def test_the_engine_agrees_with_transformers_and_says_what_was_dequantised(
    ranks: int, split: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = packed(tmp_path, split=split)
    with (
        caplog.at_level(logging.INFO, "nanoengine"),
        tiny.llm(folder, max_num_batched_tokens=24, tensor_parallel_size=ranks) as llm,
    ):
        outputs = llm.generate(ASKED, GREEDY, use_tqdm=False)
        cached = llm.generate(ASKED, GREEDY, use_tqdm=False)
        assert llm.stats().prefix_hit_tokens > 0
        found = llm.start_report
    model = reference(folder)
    for each in (outputs, cached):
        assert compare(model, each, GREEDY).positions == 12 * len(ASKED)
    values = 2 * 8 * 3 * 64 * 96  # layers, experts, gate and up and down
    assert found.dequantised is not None
    assert (found.dequantised.method, found.dequantised.tensors) == ("mxfp4", 4)
    assert (found.dequantised.stored, found.dequantised.made) == (values * 17 // 32, 4 * values)
    said = "4 mxfp4 tensors dequantised, 0.2 MB in the files, 1.2 MB in the model"
    assert said in found.line()
    assert said in found.table()
    assert said in caplog.text


def test_other_values_show(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: halves of bytes are swapped here."""
    original = mxfp4.dequantised
    monkeypatch.setattr(mxfp4, "dequantised", lambda blocks, scales: original((blocks << 4) | (blocks >> 4), scales))
    with tiny.llm(folder) as llm:
        outputs = llm.generate(ASKED, GREEDY, use_tqdm=False)
    with pytest.raises(Mismatch):
        compare(reference(folder), outputs, GREEDY)


def test_plain_files_say_nothing(tmp_path: Path) -> None:
    with tiny.llm(families.write(tmp_path, "gpt_oss", **SIZES)) as llm:
        assert llm.start_report.dequantised is None
        assert "dequantised" not in llm.start_report.line() + llm.start_report.table()


# What is refused


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quant_method": "awq"}, r"quant_method 'awq'.*dequantised while loading are mxfp4, gguf.*GGUF"),
        ({"quant_method": ["mxfp4"]}, r"quant_method \['mxfp4'\]"),
        ({}, r"quant_method None"),
        ("mxfp4", r"quant_method 'mxfp4'"),
        ({"quant_method": "mxfp4", "group_size": 16}, r"mxfp4 has group_size, which may mean other values"),
    ],
)
def test_other_formats_stay_refused(given: Any, words: str, folder: Path) -> None:
    hf = json.loads((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=rf"config\.json: quantization_config .*{words}"):
        build_model(GptOss, {**hf, "quantization_config": given}, tp=SingleRank(), dtype=torch.float32, device="meta")


def test_pieces_that_do_not_belong_together_are_named(folder: Path) -> None:
    held = load_file(folder / SINGLE_FILE)
    name = "model.layers.1.mlp.experts.down_proj"
    hf = json.loads((folder / "config.json").read_text())
    built = build_model(GptOss, hf, tp=SingleRank(), dtype=torch.float32, device=CPU)

    def load_from(tensors: dict[str, Tensor]) -> None:
        load_weights(built.model, built.config, tensors.items(), SingleRank(), MXFP4)

    load_from(held)
    without = {each: tensor for each, tensor in held.items() if each != f"{name}_scales"}
    with pytest.raises(WeightsError, match=r"1 missing: .*layers\.1\.mlp.*down_proj.*1 unexpected: .*down_proj_blocks"):
        load_from(without)
    with pytest.raises(
        WeightsError, match=r"down_proj: blocks torch.uint8 .* are no experts in MXFP4: uint8 \[experts"
    ):
        load_from({**held, f"{name}_scales": held[f"{name}_scales"][..., :1].contiguous()})
    with pytest.raises(WeightsError, match=r"scales torch.bfloat16"):
        load_from({**held, f"{name}_scales": held[f"{name}_scales"].to(torch.bfloat16)})
