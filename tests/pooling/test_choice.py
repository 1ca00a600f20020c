"""How a model pools by its files, and what a caller may ask for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoengine.api.embeddings import cosine
from nanoengine.api.errors import ParamsError
from nanoengine.params.pooling import PoolingChoice, PoolingDefaults, choose_pooling, pairs
from nanoengine.service.client import EngineInfo
from nanoengine.service.frames import info_from_json, info_to_json
from nanoengine.setup.start.pooling import read_pooling_defaults

SIZE = 8
MODULES = ("Transformer", "Pooling", "Normalize")
FLAGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def flags(*modes: str) -> dict[str, Any]:
    """A Pooling module's config.json with these switches on."""
    given = {f"pooling_mode_{name}": name in modes for name in FLAGS}
    return {"word_embedding_dimension": SIZE, **given, "include_prompt": True}


def read(
    folder: Path, pooling: Any, kinds: tuple[str, ...] = MODULES, hf: dict[str, Any] | None = None
) -> PoolingDefaults:
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(pooling if type(pooling) is str else json.dumps(pooling))
    return read_pooling_defaults(folder, hf or {}, SIZE)


def test_without_such_files_it_is_the_last_token_of_length_1(tmp_path: Path) -> None:
    assert read_pooling_defaults(tmp_path, {}, SIZE) == PoolingDefaults(size=SIZE, pooling="last", normalize=True)


@pytest.mark.parametrize(
    ("pooling", "kinds", "want"),
    [
        (flags("mean_tokens"), MODULES, ("mean", True)),
        (flags("lasttoken"), MODULES, ("last", True)),
        (flags("mean_tokens"), MODULES[:2], ("mean", False)),
        ({"embedding_dimension": SIZE, "pooling_mode": "mean"}, MODULES, ("mean", True)),
        ({"embedding_dimension": SIZE, "pooling_mode": "lasttoken"}, MODULES, ("last", True)),
        (flags("mean_tokens"), MODULES[:1], ("last", False)),
    ],
)
def test_sentence_transformers_modules_say_how(pooling: Any, kinds: Any, want: Any, tmp_path: Path) -> None:
    found = read(tmp_path, pooling, kinds)
    assert (found.pooling, found.normalize, found.unsupported) == (*want, None)


def test_a_pooling_file_alone_counts_too(tmp_path: Path) -> None:
    read(tmp_path, flags("mean_tokens"))
    (tmp_path / "modules.json").unlink()
    assert read_pooling_defaults(tmp_path, {}, SIZE).pooling == "mean"


@pytest.mark.parametrize(
    ("pooling", "kinds", "said"),
    [
        (flags("cls_token"), MODULES, "1_Pooling/config.json: pooling cls is not supported"),
        (flags("mean_tokens", "max_tokens"), MODULES, "pooling max with mean is not supported"),
        ({"pooling_mode": "weightedmean"}, MODULES, "pooling weightedmean is not supported"),
        ({}, MODULES, "pooling none is not supported"),
        (flags("mean_tokens"), (*MODULES, "Dense"), "modules.json: the module Dense is not supported"),
        ("[", MODULES, "cannot read"),
    ],
)
def test_what_is_not_supported_must_be_named_by_the_request(
    pooling: Any, kinds: Any, said: str, tmp_path: Path
) -> None:
    found = read(tmp_path, pooling, kinds)
    with pytest.raises(ParamsError) as raised:
        choose_pooling(found)
    assert said in str(raised.value)
    assert "give pooling: 'mean' or 'last'" in str(raised.value)
    assert choose_pooling(found, "mean") == PoolingChoice("mean", True, None)


@pytest.mark.parametrize("text", ["{", "[1]", '[{"path": "x"}]', '{"a": 1}'])
def test_modules_that_cannot_be_read_stop_no_start(text: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(text)
    assert "cannot read" in str(read_pooling_defaults(tmp_path, {}, SIZE).unsupported)


@pytest.mark.parametrize(
    ("hf", "want"),
    [
        ({}, None),
        ({"is_matryoshka": True}, ()),
        ({"is_matryoshka": False}, None),
        ({"matryoshka_dimensions": [4, 2]}, (2, 4)),
    ],
)
def test_dimensions_are_those_that_the_model_was_trained_for(hf: Any, want: Any, tmp_path: Path) -> None:
    assert read_pooling_defaults(tmp_path, hf, SIZE).dimensions == want


def test_wrong_dimensions_of_a_model_are_reported(tmp_path: Path) -> None:
    found = read_pooling_defaults(tmp_path, {"matryoshka_dimensions": [0, 16]}, SIZE)
    assert "matryoshka_dimensions must be numbers from 1 to 8" in str(found.unsupported)


NONE, ANY, SOME = None, (), (2, 4)


@pytest.mark.parametrize(
    ("trained", "asked", "said"),
    [
        (NONE, 4, "dimensions is 4, and this model's embeddings have 8"),
        (ANY, 9, "dimensions must be from 1 to 8, not 9"),
        (ANY, 0, "dimensions must be from 1 to 8, not 0"),
        (SOME, 3, "this model was trained for 2, 4"),
        (SOME, True, "dimensions must be an integer, not True"),
        (ANY, "4", "dimensions must be an integer, not '4'"),
    ],
)
def test_other_dimensions_are_refused(trained: Any, asked: Any, said: str) -> None:
    with pytest.raises(ParamsError) as raised:
        choose_pooling(PoolingDefaults(size=SIZE, dimensions=trained), dimensions=asked)
    assert said in str(raised.value)


@pytest.mark.parametrize(("trained", "asked"), [(NONE, 8), (ANY, 3), (SOME, 2), (SOME, 8)])
def test_a_shortened_vector_has_length_1_again(trained: Any, asked: int) -> None:
    choice = choose_pooling(PoolingDefaults(size=SIZE, dimensions=trained), dimensions=asked)
    vector = np.arange(1, 9, dtype=np.float32)
    out = choice.finish(vector)
    assert out.shape == (asked,)
    assert out.dtype == np.float32
    assert np.allclose(out, vector[:asked] / np.linalg.norm(vector[:asked]))
    assert vector[0] == 1, "the given vector was written"
    with pytest.raises(ValueError, match="read-only"):
        out[0] = 1


def test_without_normalising_it_is_the_vector_itself() -> None:
    vector = np.arange(1, 9, dtype=np.float32)
    assert PoolingChoice("mean", normalize=False).finish(vector).tolist() == vector.tolist()


def test_a_vector_of_zeros_has_no_direction() -> None:
    zeros = np.zeros(SIZE, np.float32)
    assert PoolingChoice("mean").finish(zeros).tolist() == zeros.tolist()
    assert cosine(zeros, np.ones(SIZE, np.float32)) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pooling": "men"}, "pooling must be 'mean' or 'last', not 'men'"),
        ({"pooling": 3}, "pooling must be 'mean' or 'last', not 3"),
        ({"normalize": "yes"}, "normalize must be True or False, not 'yes'"),
    ],
)
def test_wrong_parameters_are_refused_by_name(given: Any, said: str) -> None:
    with pytest.raises(ParamsError) as raised:
        choose_pooling(PoolingDefaults(size=SIZE), **given)
    assert said in str(raised.value)


def test_pairs_are_one_with_each_or_each_with_its_own() -> None:
    names = ("text_1", "text_2")
    assert pairs("a", "xy", names) == [("a", "x"), ("a", "y")]
    assert pairs("ab", "xy", names) == [("a", "x"), ("b", "y")]
    with pytest.raises(ParamsError, match="text_1 has 2 entries and text_2 has 3: give one and any number, or as many"):
        pairs("ab", "xyz", names)
    with pytest.raises(ParamsError, match="text_2 is empty"):
        pairs("ab", "", names)


def test_the_cosine_is_that_of_the_angle() -> None:
    a, b = np.array([2, 0], np.float32), np.array([3, 3], np.float32)
    assert cosine(a, b) == pytest.approx(2**-0.5)
    assert cosine(a, -a) == -1


@pytest.mark.parametrize("dimensions", [None, (), (2, 4)])
def test_the_defaults_go_to_another_process(dimensions: Any) -> None:
    pooling = PoolingDefaults(size=SIZE, pooling="mean", dimensions=dimensions, unsupported="the module Dense")
    info = EngineInfo(model="m", tokenizer=None, vocab_size=8, max_model_len=16, pooling=pooling)
    assert info_from_json(json.loads(json.dumps(info_to_json(info)))) == info
    none = replace(info, pooling=None)
    assert info_from_json(json.loads(json.dumps(info_to_json(none)))) == none
