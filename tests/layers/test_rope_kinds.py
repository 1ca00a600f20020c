"""Each kind of rotation against transformers' own functions, and what of config.json is read, refused, impossible."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanoengine.api import ModelError
from nanoengine.layers.decoder import read_decoder
from nanoengine.layers.hf_config import Fields
from nanoengine.layers.rope import Rope, RopeConfig, RotaryEmbedding, read_rope
from nanoengine.layers.rope_kinds import KINDS

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256, "num_hidden_layers": 2}
LONG = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64}

# name -> (rope_parameters, other fields, engine's longest request)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "linear": ({"rope_type": "linear", "factor": 2.5}, {}, 256),
    "dynamic, short": ({"rope_type": "dynamic", "factor": 3.0}, {}, 100),
    "dynamic, long": ({"rope_type": "dynamic", "factor": 3.0}, {}, 700),
    "yarn": (YARN, {}, 256),
    "yarn, its borders": ({**YARN, "beta_fast": 20, "beta_slow": 4.0, "truncate": False}, {}, 256),
    "yarn, zeros": ({**YARN, "beta_fast": 0, "mscale": 0, "mscale_all_dim": 0.0}, {}, 256),
    "yarn, one scale": ({**YARN, "mscale": 0.8}, {}, 256),
    "yarn, two scales": ({**YARN, "mscale": 0.8, "mscale_all_dim": 1.2}, {}, 256),
    "yarn, its magnitude": ({**YARN, "attention_factor": 0.83}, {}, 256),
    "yarn, no factor": ({**YARN, "factor": None}, {}, 256),
    "yarn, factor 1": ({**YARN, "factor": 1.0}, {}, 256),
    "yarn, one border": ({**YARN, ORIGINAL: 2, "rope_theta": 1e4}, {}, 256),
    "longrope, short": ({"rope_type": "longrope", ORIGINAL: 64, **LONG}, {}, 64),
    "longrope, long": ({"rope_type": "longrope", ORIGINAL: 64, **LONG}, {}, 65),
    "longrope, its factor": ({"rope_type": "longrope", ORIGINAL: 64, "factor": 7.0, **LONG}, {}, 65),
    "longrope, its magnitude": ({"rope_type": "longrope", ORIGINAL: 64, "attention_factor": 1.4, **LONG}, {}, 65),
    "longrope, no longer": ({"rope_type": "longrope", ORIGINAL: 256, **LONG}, {}, 256),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 64},
        {},
        256,
    ),
}
PARTIAL = {
    "yarn": CASES["yarn"],
    "linear": CASES["linear"],
    "dynamic, long": CASES["dynamic, long"],
    "longrope, long": (
        {"rope_type": "longrope", ORIGINAL: 64, **{name: values[:4] for name, values in LONG.items()}},
        {},
        65,
    ),
}


def theirs(model_type: str, hf: dict[str, Any], kind: str, longest: int) -> tuple[torch.Tensor, float]:
    config = AutoConfig.for_model(model_type, **copy.deepcopy(hf))
    found, magnitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=longest)
    return found, magnitude


def assert_same(got: Rope, want: tuple[torch.Tensor, float]) -> None:
    assert got.width == 2 * len(want[0])
    torch.testing.assert_close(torch.tensor(got.frequencies), want[0], rtol=2e-6, atol=0)
    assert got.magnitude == pytest.approx(want[1], rel=1e-9)


@pytest.mark.parametrize("theta", [300.0, 1e6])
@pytest.mark.parametrize("case", CASES)
def test_a_kind_is_transformers(case: str, theta: float) -> None:
    rope, fields, longest = CASES[case]
    hf = {**SIZES, **fields, "rope_parameters": {"rope_theta": theta, **rope}}
    got = read_rope(hf).rope(16, longest)
    assert_same(got, theirs("llama", hf, rope["rope_type"], longest))
    if "long" not in case and "factor 1" not in case and "short" not in case:
        plain = RopeConfig(theta=theta).rope(16)
        assert got.frequencies != plain.frequencies or got.magnitude != 1.0


@pytest.mark.parametrize("case", PARTIAL)
def test_a_kind_of_a_part_of_the_head_is_transformers(case: str) -> None:
    rope, fields, longest = PARTIAL[case]
    inside = {**rope, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    hf = {**SIZES, **fields, "rope_parameters": inside}
    got = read_rope(hf, partial=1.0).rope(16, longest)
    assert got.width == 8
    assert_same(got, theirs("llama", hf, rope["rope_type"], longest))
    outside = {**SIZES, "rope_scaling": {**rope, "rope_theta": 1e4}, "partial_rotary_factor": 0.5}
    assert read_rope(outside, partial=1.0).rope(16, longest) == got
    assert read_rope({**SIZES, "rope_scaling": rope}, partial=0.5).rope(16, longest) == got  # the family's default


def test_every_kind_of_transformers_is_known_or_refused_by_name() -> None:
    tried = {rope["rope_type"] for rope, _, _ in CASES.values()}
    assert tried == KINDS.keys() - {"default"}
    assert ROPE_INIT_FUNCTIONS.keys() - KINDS.keys() == {"proportional"}
    with pytest.raises(ModelError, match=r"rope_type must be one of default, linear, dynamic, .*'proportional'"):
        read_rope({**SIZES, "rope_parameters": {"rope_type": "proportional"}})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_type": "yarn"}, r"lacks rope_parameters\.factor"),
    ({**YARN, "factor": 0.5}, "factor must be at least 1, not 0.5"),
    ({**YARN, "beta_fast": 2.0, "beta_slow": 3.0}, "beta_fast must be at least beta_slow"),
    ({**YARN, "beta_fast": "32"}, "beta_fast must be a positive number"),
    ({**YARN, "mscale": False}, "mscale must be a positive number"),
    ({**YARN, "truncate": 1}, "truncate must be true or false"),
    ({**YARN, "low_freq_factor": 1.0}, "low_freq_factor = 1.0 is not a key of rope_type yarn"),
    ({**YARN, "factor": 1e30}, "factor must be smaller"),
    ({"rope_type": "dynamic"}, "lacks .*factor"),
    ({"rope_type": "dynamic", "factor": 0.9}, "factor must be at least 1"),
    ({"rope_type": "longrope", **LONG, "short_factor": "x"}, "short_factor must be a list of positive numbers"),
    ({"rope_type": "longrope", **LONG, "long_factor": [1.0, None]}, "long_factor must not be null"),
    ({"rope_type": "longrope", "long_factor": [1.0]}, r"lacks rope_parameters\.short_factor"),
    ({"rope_type": "su", **LONG}, "rope_type must be one of"),
]


@pytest.mark.parametrize(("rope", "words"), REFUSED)
def test_what_cannot_be_is_refused_with_its_name(rope: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        read_rope({**SIZES, "rope_parameters": rope})


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    (
        {"rope_type": "longrope", ORIGINAL: 64, **LONG, "short_factor": [1.0] * 7},
        "short_factor of rope_type longrope has 7",
    ),
    ({"rope_type": "longrope", ORIGINAL: 1, **LONG}, "the numbers of rope_type longrope have no result"),
    ({**YARN, "rope_theta": 1.0}, "the numbers of rope_type yarn have no result"),
    ({"rope_type": "linear", "factor": 1e-38, "rope_theta": 1e-5}, "give rotations that are not finite"),
]


@pytest.mark.parametrize(("rope", "words"), IMPOSSIBLE)
def test_numbers_that_have_no_rotation_are_refused(rope: dict[str, Any], words: str) -> None:
    config = read_rope({**SIZES, "rope_parameters": rope})
    with pytest.raises(ModelError, match=words):
        config.rope(16, 64 if "short_factor" in words else 256)


@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        (RopeConfig(theta=1e4), 7, "even head size, not 7"),
        (RopeConfig(theta=1e4, partial=0.3), 10, "even head size, not 10, of which 3 are rotated"),
        (RopeConfig(theta=1e4, partial=0.01), 10, "of which 0 are rotated"),
        (Rope(frequencies=(1.0,) * 9), 16, "18 elements needs"),
    ],
)
def test_a_head_that_cannot_be_rotated_so_is_refused(config: Any, size: int, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        RotaryEmbedding(config, size, torch.device("cpu"))


def test_a_rotation_of_ones_own_is_a_value() -> None:
    """Frequencies, magnitude, rotated width and pairing, without any config.json."""
    rope = Rope(frequencies=(0.5, 0.25), magnitude=2.0, interleaved=True)
    angles = RotaryEmbedding(rope, 6, torch.device("cpu"))(torch.tensor([3]))
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]])
    c, s = torch.tensor([1.5, 0.75]).cos() * 2, torch.tensor([1.5, 0.75]).sin() * 2
    want = [c[0] - 2 * s[0], 2 * c[0] + s[0], 3 * c[1] - 4 * s[1], 4 * c[1] + 3 * s[1], 5.0, 6.0]
    torch.testing.assert_close(angles.rotate(x).flatten(), torch.tensor([float(each) for each in want]))
    still = RotaryEmbedding(Rope(frequencies=()), 6, torch.device("cpu"))(torch.tensor([3]))
    assert torch.equal(still.rotate(x), x)


LIMITS = [
    ({"rope_type": "default"}, 256, None),
    ({"rope_type": "linear", "factor": 4.0}, 256, None),
    ({"rope_type": "dynamic", "factor": 4.0}, 1024, 256),
    (YARN, 256, None),
    ({**YARN, "factor": 16.0}, 1024, None),
    ({"rope_type": "longrope", ORIGINAL: 64, **LONG}, 256, None),
]


@pytest.mark.parametrize(("rope", "limit", "usual"), LIMITS)
def test_a_scaled_rotation_has_more_positions(rope: dict[str, Any], limit: int, usual: int | None) -> None:
    fields = {"vocab_size": 9, "intermediate_size": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    hf = {**SIZES, **fields, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e4, **rope}}
    config = read_decoder(Fields(hf))
    assert (config.max_model_len, config.default_max_model_len) == (limit, usual)


def test_a_familys_own_rotation_is_that_of_files_without_one() -> None:
    """As in transformers, a file's own takes its place as a whole; null is no rotation of the file's."""
    defaults = {"rope_theta": 150000.0, "rope_parameters": {**YARN, "truncate": False}}

    def read(**file: Any) -> RopeConfig:
        return read_rope(Fields({**SIZES, **file}, defaults=defaults))

    usual = read()
    assert (usual.kind, usual.theta, usual.original_max_position, usual.truncate) == ("yarn", 150000.0, 64, False)
    assert read(rope_scaling=None, rope_parameters=None) == usual
    assert read(rope_theta=300.0) == replace(usual, theta=300.0)
    assert read(rope_scaling={**YARN, "factor": 8.0}) == replace(usual, factor=8.0, truncate=True)
    assert read(rope_parameters={"rope_type": "default"}) == RopeConfig(theta=150000.0)
    whole = read_decoder(Fields({**SIZES, "vocab_size": 9, "intermediate_size": 8, "hidden_act": "silu",
                                 "rms_norm_eps": 1e-5, "tie_word_embeddings": False}, defaults=defaults))  # fmt: skip
    assert whole.rope == usual
