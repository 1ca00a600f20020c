"""Which files of a folder are the checkpoint: indexes that are stale or lie, pointers, headers that lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import load, parameter, rewrite
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nanoengine import LLM
from nanoengine.api import ModelError, WeightsError
from nanoengine.setup.start.checkpoint import INDEX_FILE, SINGLE_FILE, find_checkpoint
from nanoengine.testing.checkpoints import tiny_gemma3, tiny_llama
from nanoengine.text.tokenizer import load_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9144\n"


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


def another(tensor: Tensor, how: str) -> Tensor:
    return {
        "values": lambda: tensor * 3,
        "one bit": lambda: torch.nextafter(tensor, tensor + 1),
        "the shape": lambda: tensor.reshape(-1),
        "the dtype": lambda: tensor.to(torch.float64),
        "nothing": lambda: tensor.clone(),
    }[how]()


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("how", ["values", "one bit", "the shape", "the dtype", "nothing"])
def test_two_files_that_hold_different_tensors_of_one_name_are_refused_with_both(
    how: str, indexed: bool, tmp_path: Path
) -> None:
    path = sharded(tmp_path)
    index = index_of(path)
    name = next(name for name, file in index.items() if file == SHARDS[0])
    held = load_file(path / SHARDS[2])
    save_file({**held, name: another(load_file(path / SHARDS[0])[name], how)}, path / SHARDS[2])
    if not indexed:
        del index[name]
        write_index(path, index)
    if how == "nothing":
        assert_loads_as_whole(path, tmp_path)
        return
    with pytest.raises(
        WeightsError, match=f"{SHARDS[0]} and {SHARDS[2]} in .* both have {name}, with different values"
    ):
        load(path)


def test_copies_of_a_tensor_with_a_nan_are_equal(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    held = {name: load_file(path / name) for name in SHARDS[:2]}
    for name, tensors in held.items():
        save_file({**tensors, "model.twice": torch.tensor([float("nan")])}, path / name)
    assert find_checkpoint(path).tensors["model.twice"] == SHARDS[0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("headless", [True, False])
def test_tables_of_rotations_that_older_files_hold_are_skipped(family: str, headless: bool, tmp_path: Path) -> None:
    path = {"llama": tiny_llama, "gemma3": tiny_gemma3}[family](tmp_path)
    tables = [f"{rotary}.{table}" for rotary in ("rotary_emb", "rotary_emb_local", "layers.0.self_attn.rotary_emb")
              for table in ("inv_freq", "original_inv_freq", "full_attention_inv_freq")]  # fmt: skip
    tables += [f"layers.1.self_attn.rotary_emb.{table}_cached" for table in ("cos", "sin")]
    above = "" if headless else "model."

    def change(held: dict[str, Tensor]) -> None:
        renamed = {above + name.removeprefix("model."): held.pop(name) for name in list(held) if "model." in name}
        held.update({**renamed, **{above + name: torch.ones(4) for name in tables}})

    rewrite(path, change)
    _, report = load(path)
    assert set(report.skipped) == {above + name for name in tables}


def test_an_index_that_names_what_no_file_holds_is_called_stale(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    held = load_file(path / SHARDS[1])
    name, _ = held.popitem()
    save_file(held, path / SHARDS[1])
    with pytest.raises(WeightsError, match=f"1 missing: {name}; {INDEX_FILE} names 1 that are in no file"):
        load(path)


def test_files_that_an_index_names_and_that_are_absent_are_listed_beside_those_that_are_there(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    write_index(path, {name: file.replace("model-", "new-") for name, file in index_of(path).items()})
    with pytest.raises(WeightsError) as caught:
        load(path)
    assert "names new-00001-of-00003.safetensors, new-00002-of-00003.safetensors, new-0000" in str(caught.value)
    assert f"are missing (3 of 3 files); the folder has {', '.join(SHARDS)}" in str(caught.value)


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
    with pytest.raises(WeightsError, match="is not a safetensors index"):
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
    with pytest.raises(WeightsError, match=r"model\.norm\.weight of dtype [A-Z0-9_]+, expected one of F64, F32"):
        load(path)


def test_an_unexpected_tensor_of_no_elements_is_still_unexpected(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    rewrite(path, lambda held: held.update({"empty": torch.zeros(0, 3)}))
    with pytest.raises(WeightsError, match="1 unexpected: empty"):
        load(path)
