"""Weights are what the files hold: heads beside tied embeddings, names with other prefixes, indexes, pointers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_harness import PagedModel, model_class
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nanoengine import LLM
from nanoengine.api import ModelError, WeightsError
from nanoengine.core.execution import weights
from nanoengine.core.execution.build import BuiltModel, build_model
from nanoengine.core.execution.parallel import SingleRank
from nanoengine.core.execution.weights import LoadReport, load_weights
from nanoengine.core.setup.checkpoint import INDEX_FILE, SINGLE_FILE, find_checkpoint
from nanoengine.core.text.tokenizer import load_tokenizer
from nanoengine.testing.checkpoints import (
    tiny_gemma2,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
    tiny_qwen2,
    tiny_qwen3,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9144\n"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[BuiltModel, LoadReport]:
    hf = json.loads((path / "config.json").read_text())
    built = build_model(model_class(hf), hf, tp=SingleRank(), dtype=dtype, device="cpu")
    return built, load_weights(built.model, built.config, path, SingleRank())


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    """`change` is applied to the tensors of model.safetensors, by name; returns them."""
    held = load_file(path / SINGLE_FILE)
    change(held)
    save_file(held, path / SINGLE_FILE, {"format": "pt"})
    return held


def log_probs(path: Path) -> Tensor:
    """[T, V] of a few tokens."""
    return PagedModel(path).step({"a": list(range(3, 20))})["a"].log_softmax(-1)


def reference(path: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits[0].log_softmax(-1)


def parameter(built: BuiltModel, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    return built.model.get_submodule(owner).get_parameter(last)


# A head beside a tied embedding

TIED = [
    pytest.param(tiny_llama, {"tie_word_embeddings": True}, id="llama"),
    pytest.param(tiny_qwen3, {"tie_word_embeddings": True}, id="qwen3"),
    pytest.param(tiny_gemma2, {}, id="gemma2"),
    pytest.param(tiny_gemma3, {}, id="gemma3"),
]


def other_head(held: dict[str, Tensor]) -> None:
    held[HEAD] = held[EMBEDDING].flip(0) * 3 + 0.25


@pytest.mark.parametrize(("make", "fields"), TIED)
def test_a_tied_config_uses_the_head_of_the_file_if_it_is_another_one(
    make: Any, fields: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(tmp_path, **fields)
    tied = log_probs(path)
    assert not caplog.records
    held = rewrite(path, other_head)
    built, report = load(path)
    assert report.untied == (HEAD,)
    assert f"the config ties {HEAD}, but {path} has values of its own for it" in caplog.text
    assert torch.equal(parameter(built, HEAD), held[HEAD])
    assert torch.equal(parameter(built, EMBEDDING), held[EMBEDDING])
    got = log_probs(path)
    assert (got - tied).abs().max() > 0.5
    assert (got - reference(path)).abs().max() < 5e-4


def without_source(held: dict[str, Tensor]) -> None:
    held[HEAD] = held.pop(EMBEDDING)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda held: held.update({HEAD: held[EMBEDDING].clone()}), id="the same"),
        pytest.param(lambda held: held.update({HEAD: held[EMBEDDING].double()}), id="the same in float64"),
        pytest.param(without_source, id="the head alone"),
    ],
)
def test_a_tied_config_stays_tied_if_the_file_has_one_value(change: Any, tmp_path: Path) -> None:
    path = tiny_qwen3(tmp_path, tie_word_embeddings=True)
    want = log_probs(path)
    rewrite(path, change)
    built, report = load(path)
    assert parameter(built, HEAD) is parameter(built, EMBEDDING)
    assert report.untied == ()
    assert torch.equal(log_probs(path), want)


def test_a_head_that_differs_in_its_last_row_only_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_COMPARED", 100)  # two rows at a time
    path = tiny_qwen3(tmp_path, tie_word_embeddings=True)

    def change(held: dict[str, Tensor]) -> None:
        held[HEAD] = held[EMBEDDING].clone()
        held[HEAD][-1, -1] += 1

    rewrite(path, change)
    assert load(path)[1].untied == (HEAD,)


def test_values_that_are_not_finite_are_loaded_as_they_are(tmp_path: Path) -> None:
    path = tiny_qwen3(tmp_path, tie_word_embeddings=True)

    def change(held: dict[str, Tensor]) -> None:
        held[EMBEDDING][5, 7] = float("nan")
        held[HEAD] = held[EMBEDDING].clone()

    held = rewrite(path, change)
    built, _ = load(path)
    assert parameter(built, HEAD).equal(held[HEAD]) is False  # NaN is not equal to itself
    assert parameter(built, HEAD)[5, 7].isnan()
    assert parameter(built, HEAD).nan_to_num().equal(held[HEAD].nan_to_num())


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_or_embedding_that_is_nowhere_is_missing(tied: bool, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, tie_word_embeddings=tied)
    gone = EMBEDDING if tied else HEAD
    rewrite(path, lambda held: held.pop(gone))
    with pytest.raises(WeightsError, match=f"1 missing: {gone}"):
        load(path)


@pytest.mark.parametrize("wrong", [torch.zeros(7, 48), torch.zeros((), dtype=torch.float32), torch.zeros(0, 48)])
def test_a_head_of_another_shape_is_misshapen_and_not_skipped(wrong: Tensor, tmp_path: Path) -> None:
    path = tiny_qwen3(tmp_path, tie_word_embeddings=True)
    rewrite(path, lambda held: held.update({HEAD: wrong}))
    with pytest.raises(WeightsError, match=rf"1 misshapen: lm_head\.weight \[{', '.join(map(str, wrong.shape))}\]"):
        load(path)


# Names

FAMILIES = [tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3, tiny_gemma2, tiny_gemma3]
PREFIXES = {
    "the model without its head": lambda name: name.removeprefix("model."),
    "images, before transformers 5": lambda name: f"language_model.{name}",
    "images, transformers 5": lambda name: name.replace("model.", "model.language_model.", 1),
    "images, without the head": lambda name: name.replace("model.", "language_model.", 1),
}


def renamed(path: Path, rename: Callable[[str], str], **more: Tensor) -> dict[str, Tensor]:
    held = {rename(name): tensor for name, tensor in load_file(path / SINGLE_FILE).items()}
    save_file({**held, **more}, path / SINGLE_FILE, {"format": "pt"})
    return held


@pytest.mark.parametrize("rename", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_each_family_loads_under_the_prefixes_in_use(make: Any, rename: Callable[[str], str], tmp_path: Path) -> None:
    path = make(tmp_path)
    want, _ = load(path)
    held = renamed(path, rename)
    assert "model.norm.weight" not in held
    got, _ = load(path)
    for (name, a), b in zip(got.model.named_parameters(), want.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def with_images(path: Path) -> Path:
    hf = json.loads((path / "config.json").read_text())
    tied = hf["tie_word_embeddings"]
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": hf, "tie_word_embeddings": tied}
    (path / "config.json").write_text(json.dumps(nested))
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("above", ["", "model."])
def test_gemma_3_with_images_loads_under_each_prefix(above: str, tied: bool, tmp_path: Path) -> None:
    """Both places of the text model and of what is skipped; anything else that is not the text model's is an error."""
    plain = tiny_gemma3(tmp_path, tie_word_embeddings=tied)
    want, _ = load(plain)
    path = with_images(plain)
    others = {f"{above}{part}.x.weight": torch.ones(1) for part in ("vision_tower", "multi_modal_projector")}
    rename = PREFIXES["images, transformers 5" if above else "images, before transformers 5"]
    held = renamed(path, rename, **others)
    got, report = load(path)
    assert set(report.skipped) == others.keys()
    for a, b in zip(got.model.parameters(), want.model.parameters(), strict=True):
        assert torch.equal(a, b)
    save_file({**held, **others, f"{above}audio_tower.x": torch.ones(1)}, path / SINGLE_FILE)
    with pytest.raises(WeightsError, match=f"1 unexpected: {above}audio_tower"):
        load(path)


def test_one_name_under_two_prefixes_is_an_error(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    rewrite(path, lambda held: held.update({"norm.weight": torch.ones(48)}))
    with pytest.raises(WeightsError, match=r"norm\.weight beside model\.norm\.weight, which both are model\.norm"):
        load(path)


# Indexes

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def index_of(path: Path) -> dict[str, str]:
    return dict(json.loads((path / INDEX_FILE).read_text())["weight_map"])


def write_index(path: Path, index: dict[str, Any]) -> None:
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def sharded(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "sharded", files=3)


def assert_loads_as_whole(path: Path, tmp_path: Path) -> None:
    want, _ = load(tiny_llama(tmp_path / "whole"))
    got, _ = load(path)
    for a, b in zip(got.model.parameters(), want.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_whole_file_beside_a_stale_index_is_read(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model")
    write_index(path, dict.fromkeys(load_file(path / SINGLE_FILE), SHARDS[0]))
    assert_loads_as_whole(path, tmp_path)


@pytest.mark.parametrize("single", [POINTER, None], ids=["a pointer", "a part of it"])
def test_shards_are_read_where_the_single_file_is_not_whole(single: bytes | None, tmp_path: Path) -> None:
    path = sharded(tmp_path)
    if single is None:
        save_file({"model.norm.weight": torch.zeros(48)}, path / SINGLE_FILE)
    else:
        (path / SINGLE_FILE).write_bytes(single)
    assert_loads_as_whole(path, tmp_path)


def test_a_whole_file_goes_before_shards_as_in_transformers(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    tensors = {name: tensor for shard in SHARDS for name, tensor in load_file(path / shard).items()}
    tensors["model.norm.weight"] = torch.full((48,), 7.0)
    save_file(tensors, path / SINGLE_FILE, {"format": "pt"})
    built, _ = load(path)
    assert torch.equal(parameter(built, "model.norm.weight"), tensors["model.norm.weight"])
    theirs = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(theirs.model.norm.weight, tensors["model.norm.weight"])


def test_a_tensor_in_another_file_than_the_index_says_is_read_from_there(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    index = index_of(path)
    other = {SHARDS[0]: SHARDS[1], SHARDS[1]: SHARDS[2], SHARDS[2]: SHARDS[0]}
    write_index(path, {name: other[file] for name, file in index.items()})
    assert_loads_as_whole(path, tmp_path)


def test_a_tensor_that_the_index_leaves_out_is_read(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    write_index(path, {name: file for name, file in index_of(path).items() if name != "model.norm.weight"})
    assert_loads_as_whole(path, tmp_path)


def test_of_two_files_with_a_tensor_the_index_decides_or_it_is_an_error(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    index = index_of(path)
    name = next(name for name, file in index.items() if file == SHARDS[0])
    held = load_file(path / SHARDS[2])
    save_file({**held, name: torch.zeros(3)}, path / SHARDS[2])
    assert_loads_as_whole(path, tmp_path)
    del index[name]
    write_index(path, index)
    with pytest.raises(WeightsError, match=f"both {SHARDS[0]} and {SHARDS[2]} in .* hold {name}"):
        load(path)


def test_an_index_that_names_what_no_file_holds_is_called_stale(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    held = load_file(path / SHARDS[1])
    name, _ = held.popitem()
    save_file(held, path / SHARDS[1])
    with pytest.raises(WeightsError, match=f"1 missing: {name}; {INDEX_FILE} names 1 that no file holds"):
        load(path)


def test_files_that_an_index_names_and_that_are_absent_are_listed_beside_those_that_are_there(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    write_index(path, {name: file.replace("model-", "new-") for name, file in index_of(path).items()})
    with pytest.raises(WeightsError) as caught:
        load(path)
    assert "names new-00001-of-00003.safetensors, new-00002-of-00003.safetensors, new-0000" in str(caught.value)
    assert f"are not there (3 of 3 files); the folder holds {', '.join(SHARDS)}" in str(caught.value)


def test_shards_without_an_index_are_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (path / INDEX_FILE).unlink()
    with pytest.raises(WeightsError, match=f"only {SHARDS[0]}, .*: the index that says .* is missing"):
        load(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "\x00",
        "[" * 100_000,
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": "abc"}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ' + "9" * 10_000 + "}}",
    ],
    ids=lambda text: f"{text[:24]!r}-{len(text)}",
)  # fmt: skip
def test_what_is_no_index_is_called_so(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(WeightsError, match="is no safetensors index"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("outside", ["absolute", "../outside.safetensors", "a/../../outside.safetensors",
                                     "..\\outside.safetensors", "C:\\outside.safetensors", "/linked", "linked/x",
                                     "x\0y"])  # fmt: skip
def test_no_path_of_an_index_leaves_the_folder(outside: str, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model")
    (tmp_path / "outside.safetensors").write_bytes((path / SINGLE_FILE).read_bytes())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes((path / SINGLE_FILE).read_bytes())
    (path / "linked").symlink_to(tmp_path / "elsewhere")
    (path / "a").mkdir()
    name = str(tmp_path / "outside.safetensors") if outside == "absolute" else outside
    write_index(path, dict.fromkeys(load_file(path / SINGLE_FILE), name))
    (path / SINGLE_FILE).unlink()
    with pytest.raises(WeightsError, match="which is outside the folder"):
        load(path)


def test_links_to_files_as_in_the_hub_cache_and_folders_inside_work(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (path / "part").mkdir()
    index = index_of(path)
    for shard in SHARDS[:2]:
        os.rename(path / shard, blobs / shard[:11])
        (path / shard).symlink_to(Path("..") / "blobs" / shard[:11])
    os.rename(path / SHARDS[2], path / "part" / SHARDS[2])
    write_index(path, {name: file.replace(SHARDS[2], f"part/{SHARDS[2]}") for name, file in index.items()})
    assert_loads_as_whole(path, tmp_path)


# Files that are not what their name says


@pytest.mark.parametrize("name", [SINGLE_FILE, SHARDS[1], INDEX_FILE])
def test_a_git_lfs_pointer_is_called_one(name: str, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path) if name == SINGLE_FILE else sharded(tmp_path)
    (path / name).write_bytes(POINTER)
    with pytest.raises(WeightsError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
        load(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_called_one_whatever_reads_it(name: str, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, with_tokenizer=True, end="<|im_end|>")
    (path / name).write_bytes(POINTER)
    with pytest.raises(ModelError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
        LLM(path, device="cpu")


def test_a_pointer_that_is_not_read_does_no_harm(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, with_tokenizer=True)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "tokenizer.model"):
        (path / name).write_bytes(POINTER)
    load(path)
    assert load_tokenizer(path) is not None


def header(length: int, text: bytes) -> bytes:
    return length.to_bytes(8, "little") + text


LIES = {
    "a length beyond the file": header(1 << 40, b"{}"),
    "the largest length": header((1 << 64) - 1, b"{}"),
    "length zero": header(0, b""),
    "offsets beyond the file": header(0, b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'),
    "a shape of another size": header(0, b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}') + b"1234",
    "a shape that overflows": header(0, b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 4294967296], '
                                        b'"data_offsets": [0, 0]}}'),
    "an unknown dtype": header(0, b'{"a": {"dtype": "Q4", "shape": [0], "data_offsets": [0, 0]}}'),
    "no JSON": header(0, b"{{{{"),
    "deep JSON": header(0, b"[" * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("data", LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_an_error_that_names_the_file(data: bytes, tmp_path: Path) -> None:
    if data[:8] == bytes(8) and len(data) > 8:
        text = data[8:].split(b"1234")[0]
        data = len(text).to_bytes(8, "little") + data[8:]
    (tmp_path / SINGLE_FILE).write_bytes(data)
    with pytest.raises(WeightsError, match=rf"{SINGLE_FILE} cannot be read, it may be incomplete"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool, torch.uint8])
def test_a_dtype_that_is_no_float_is_named(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    rewrite(path, lambda held: held.update({"model.norm.weight": torch.ones(48).to(dtype)}))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight of dtype [A-Z0-9_]+, wanted one of F64, F32"):
        load(path)


def test_an_unexpected_tensor_of_no_elements_is_still_unexpected(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    rewrite(path, lambda held: held.update({"empty": torch.zeros(0, 3)}))
    with pytest.raises(WeightsError, match="1 unexpected: empty"):
        load(path)
