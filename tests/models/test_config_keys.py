"""No key of config.json that changes the model is skipped: defaults, bounds, and what becomes of each key."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_harness import model_class
from parity import families
from transformers import (
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanoengine.api import ModelConfig, ModelError
from nanoengine.layers.config_keys import ANY, HARMLESS, REFUSED, Recorded, unread_keys
from nanoengine.layers.hf_config import Fields
from nanoengine.layers.rope_kinds import inverse_frequencies
from nanoengine.testing.checkpoints import (
    tiny_gemma2,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
    tiny_qwen2,
    tiny_qwen3,
)

FAMILIES: dict[str, tuple[type[PreTrainedConfig], Any]] = {
    "llama": (LlamaConfig, tiny_llama),
    "mistral": (MistralConfig, tiny_mistral),
    "qwen2": (Qwen2Config, tiny_qwen2),
    "qwen3": (Qwen3Config, tiny_qwen3),
    "gemma2": (Gemma2Config, tiny_gemma2),
    "gemma3": (Gemma3TextConfig, tiny_gemma3),
    **{
        cls.model_type: (cls, partial(families.write, family=cls.model_type))
        for cls in (
            CohereConfig,
            GemmaConfig,
            Glm4Config,
            GlmConfig,
            GPT2Config,
            GPTNeoXConfig,
            GraniteConfig,
            Olmo2Config,
            OlmoeConfig,
            Phi3Config,
            PhiConfig,
            SmolLM3Config,
            Starcoder2Config,
        )
    },
    "deepseek_v2": (DeepseekV2Config, partial(families.write, family="deepseek-v2, as V2.5")),
    "deepseek_v3": (DeepseekV3Config, partial(families.write, family="deepseek-v3")),
}
# without a default with which transformers' model could run
NEEDED = {"deepseek_v2": {"num_experts_per_tok": 6}}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A small config.json of each family."""
    found = {}
    for family, (_, make) in FAMILIES.items():
        path: Path = make(tmp_path_factory.mktemp(family))
        found[family] = json.loads((path / "config.json").read_text())
    return found


def read(hf: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
    """The model's config, and what it left unread."""
    recorded = Recorded(hf)
    return model_class(hf).read_config(recorded), unread_keys(recorded)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    module = {"glm": "glm4"}.get(family, family)
    ours: dict[str, Any] = import_module(f"nanoengine.plugins.models.{module}").DEFAULTS
    theirs = {field.name: field.default for field in dataclasses.fields(FAMILIES[family][0])}
    assert ours == {name: theirs[name] for name in ours}
    assert len(ours) >= 10


@pytest.mark.parametrize("family", FAMILIES)
def test_no_size_is_required(family: str, configs: dict[str, dict[str, Any]]) -> None:
    cls = FAMILIES[family][0]
    given = {"architectures": configs[family]["architectures"], "model_type": cls.model_type}
    config, _ = read({**given, **NEEDED.get(family, {})})
    want = cls()
    assert (config.vocab_size, config.hidden_size) == (want.vocab_size, want.hidden_size)
    assert config.max_model_len == want.max_position_embeddings


def refusal(hf: Mapping[str, Any]) -> str:
    """What the model's refusal says; "" where it takes the config."""
    try:
        read(hf)
    except ModelError as error:
        return str(error)
    return ""


def _another(value: Any) -> Any:
    """A value that is not this one, of its kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 2
    return {"unheard of": 1} if value is None or isinstance(value, Mapping) else "unheard of"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_familys_class_is_read_or_harmless_or_refused(
    family: str, configs: dict[str, dict[str, Any]]
) -> None:
    """A key that transformers gives a meaning is never merely reported."""
    for field in dataclasses.fields(FAMILIES[family][0]):
        if field.name in ("architectures", "model_type"):
            continue
        hf = {**configs[family], field.name: _another(configs[family].get(field.name, field.default))}
        assert field.name in refusal(hf) or read(hf)[1] == [], field.name


def test_with_images_too(configs: dict[str, dict[str, Any]]) -> None:
    hf = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": configs["gemma3"],
        "vision_config": {"hidden_size": 1152, "layer": {"deep": 1}},
    }
    assert read(hf)[1] == []
    for field in dataclasses.fields(Gemma3Config):
        if field.name not in ("architectures", "text_config"):
            changed = {**hf, field.name: _another(field.default)}
            assert field.name in refusal(changed) or read(changed)[1] == [], field.name
    assert read({**hf, "text_config": {**configs["gemma3"], "unheard_of": 1}})[1] == ["text_config.unheard_of = 1"]
    with pytest.raises(ModelError, match=r"text_config\.final_logit_softcapping"):
        read({**hf, "text_config": {**configs["gemma3"], "final_logit_softcapping": 9.0}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "awq"}),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        ("per_layer_config", {"1": {"hidden_act": "gelu"}}),
        ("layer_types", "full_attention"),
        ("layer_types", ["sliding_attention"] * 3),
        ("sliding_window", 4),
        ("attention_chunk_size", 4),
        ("attribute_map", {"rms_norm_eps": "initializer_range"}),
        ("is_causal", False),
        ("kv_sharing_modes", ["compute", "compute", "reuse"]),
        ("transformers_weights", "other.safetensors"),
        ("partial_rotary_factor", 0.5),
        ("model_type", "mistral"),
        ("hidden_act", ["silu"]),
        ("rope_scaling", "linear"),
        ("rope_scaling", {"factor": 4.0}),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {"rope_type": "linear", "factor": 4.0, "beta_fast": 32}),
        ("rope_scaling", {"rope_type": "linear", "factor": float("nan")}),
        ("rope_scaling", {"rope_type": "linear", "type": "llama3", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "proportional", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0}),
        ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
        ("rope_theta", None),
        ("rope_theta", True),
    ],
)
def test_what_would_be_another_model_is_refused_by_name(
    key: str, value: Any, configs: dict[str, dict[str, Any]]
) -> None:
    family = "mistral" if value == "full_attention" else "llama"
    with pytest.raises(ModelError, match=key if key != "rope_scaling" else "rope_"):
        read({**configs[family], key: value})


def test_values_at_which_these_keys_change_nothing_are_silent(configs: dict[str, dict[str, Any]]) -> None:
    same = {
        "layer_types": ["full_attention"] * 3,
        "sliding_window": 4,  # of no layer
        "attention_chunk_size": None,
        "attribute_map": {},
        "is_causal": True,
        "transformers_weights": "model.safetensors",
    }
    assert read({**configs["llama"], **same}) == read(configs["llama"])


def without_ropes(hf: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    return {**{name: value for name, value in hf.items() if not name.startswith("rope")}, **others}


def assert_rotations_are_transformers(hf: dict[str, Any], kind: str = "") -> None:
    """The frequencies; `kind`: of layers, in a family with two rotations."""
    config, reported = read(hf)
    assert reported == []
    theirs = next(cls for cls, _ in FAMILIES.values() if cls.model_type == hf["model_type"])(**copy.deepcopy(hf))
    rope = config.local_rope if kind == "sliding_attention" else config.rope  # type: ignore[attr-defined]
    parameters = theirs.rope_parameters[kind] if kind else theirs.rope_parameters
    size = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    if parameters["rope_type"] == "default":
        width = int(size * parameters.get("partial_rotary_factor", 1.0))
        want = parameters["rope_theta"] ** -(torch.arange(0, width, 2) / width)
    else:
        want, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, "cpu", **({"layer_type": kind} if kind else {}))
    assert torch.allclose(inverse_frequencies(rope, size, torch.device("cpu")), want, rtol=1e-6)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OUTER = "original_max_position_embeddings"


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope", [LLAMA3, {**LLAMA3, OUTER: 16}, {"rope_type": "linear", "factor": 4.0}, {}])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])  # it rotates nothing
def test_an_original_length_beside_the_rotation_is_read_as_in_transformers(
    family: str, rope: dict[str, Any], place: str, configs: dict[str, dict[str, Any]]
) -> None:
    if family == "phi3" and rope:  # its class knows longrope alone
        with pytest.raises(ModelError, match="rope_type must be one of default, longrope, su, yarn"):
            read(without_ropes(configs[family], **{place: rope, OUTER: 16}))
        return
    if family != "gemma3":
        assert_rotations_are_transformers(without_ropes(configs[family], **{place: rope, OUTER: 16}))
        return
    given = {"full_attention": rope, "sliding_attention": {}} if place == "rope_parameters" else rope
    for kind in ("full_attention", "sliding_attention"):  # its class does not read the outer one
        assert_rotations_are_transformers(without_ropes(configs[family], **{place: given, OUTER: 32}), kind)


def test_two_original_lengths_that_differ_are_refused(configs: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ModelError, match=f"{OUTER} 32 contradicts 16 of rope_scaling"):
        read(without_ropes(configs["llama"], rope_scaling={**LLAMA3, OUTER: 16}, **{OUTER: 32}))


@pytest.mark.parametrize("names", ["type rope_type", "rope_type type", "type type", "rope_type rope_type"])
def test_two_places_that_agree_by_either_name_of_the_type_are_taken(
    names: str, configs: dict[str, dict[str, Any]]
) -> None:
    one, other = ({name: "linear", "factor": 3.0, "rope_theta": 100.0} for name in names.split())
    assert_rotations_are_transformers(without_ropes(configs["llama"], rope_parameters=one, rope_scaling=other))
    nested = {"full_attention": one, "sliding_attention": {}}
    gemma3 = without_ropes(configs["gemma3"], rope_parameters=nested, rope_scaling=other)
    assert_rotations_are_transformers(gemma3, "full_attention")


def test_an_older_type_that_gemma3s_class_does_not_read_is_refused(configs: dict[str, dict[str, Any]]) -> None:
    old = {"type": "linear", "factor": 8.0}
    for absent in ({}, {"rope_parameters": None}):
        with pytest.raises(ModelError, match=r"rope_scaling\.type = 'linear' is not supported"):
            read(without_ropes(configs["gemma3"], rope_scaling=old, **absent))
    read(without_ropes(configs["gemma3"], rope_scaling={"type": "default"}))
    full = {"rope_parameters": {"full_attention": old, "sliding_attention": {}}}
    assert_rotations_are_transformers(without_ropes(configs["gemma3"], **full), "full_attention")
    spelled = without_ropes(configs["gemma3"], rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert_rotations_are_transformers(spelled, "full_attention")


def test_what_transformers_takes_is_taken(configs: dict[str, dict[str, Any]]) -> None:
    """A window in every layer, the default pattern, other activations, and an inner tie that does not count."""

    def windows(family: str, **changes: Any) -> list[bool]:
        hf = {**configs[family], **changes}
        return [window is not None for window in read(hf)[0].windows]  # type: ignore[attr-defined]

    assert windows("qwen2", max_window_layers=-1, use_sliding_window=True, sliding_window=5) == [True] * 3
    pattern = {"layer_types": None, "sliding_window_pattern": None, "_sliding_window_pattern": 2}
    hf = {name: value for name, value in configs["gemma3"].items() if name not in pattern}
    want = [kind == "sliding_attention" for kind in Gemma3TextConfig(**hf).layer_types]
    got = read({**hf, "_sliding_window_pattern": 2})
    assert ([window is not None for window in got[0].windows], got[1]) == (want, [])  # type: ignore[attr-defined]
    for family in ("gemma2", "gemma3"):
        for given, ours in (("silu", "silu"), ("gelu_new", "gelu_tanh")):
            config, _ = read({**configs[family], "hidden_activation": given})
            assert config.activation == ours  # type: ignore[attr-defined]
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {}}
    for tied in (True, False):
        text = {**configs["gemma3"], "tie_word_embeddings": not tied}
        config, reported = read({**outer, "text_config": text, "tie_word_embeddings": tied})
        assert (config.tied, reported) == (tied, [])  # type: ignore[attr-defined]


def test_a_base_that_transformers_would_lose_is_refused(configs: dict[str, dict[str, Any]]) -> None:
    """rope_scaling takes the place of rope_parameters, and the base goes with it."""
    ropes = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }
    with pytest.raises(ModelError, match=r"rope_parameters.rope_theta 500.0 contradicts 10000.0 of rope_scaling"):
        read({**configs["llama"], **ropes})


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"hidden_size": 10**12}, "hidden_size must be at most"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most"),
        ({"vocab_size": 10**11}, "vocab_size must be at most"),
        ({"max_position_embeddings": 2**60}, "max_position_embeddings must be at most"),
        ({"head_dim": 10**7}, "head_dim must be at most"),
        ({"intermediate_size": 10**4000}, "intermediate_size must be at most"),
        (
            {"hidden_size": 2**18, "intermediate_size": 2**20, "num_hidden_layers": 1000, "num_attention_heads": 64},
            "parameters; at most",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer"),
        ({"hidden_size": 48.0}, "hidden_size must be a positive integer"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a positive number"),
        ({"vocab_size": None}, "vocab_size must not be null"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
    ],
)
def test_sizes_are_bounded_before_anything_is_built(
    sizes: dict[str, Any], words: str, configs: dict[str, dict[str, Any]]
) -> None:
    with pytest.raises(ModelError, match=words):
        read({**configs["llama"], **sizes})


def test_an_unknown_key_is_reported_with_its_value(configs: dict[str, dict[str, Any]]) -> None:
    unknown = {"residual_multiplier": 0.5, "use_mrope": True, "nothing": None, "use_cache": 7, "notes": {"a": [1] * 99}}
    reported = read({**configs["llama"], **unknown})[1]
    assert reported[:2] == ["residual_multiplier = 0.5", "use_mrope = true"]
    assert reported[2].startswith("notes = {'a': [1, 1,")
    assert len(reported) == 3
    assert len(reported[2]) < 80


def test_a_plugin_that_knows_nothing_of_it_is_served() -> None:
    """Whatever way it reads, and as often as it likes; what it copies it has read."""
    hf = {"a": 1, "b": {"c": 2, "d": 3}, "e": 4, "f": [5], "use_cache": True}
    recorded = Recorded(hf)
    assert recorded == hf
    assert isinstance(recorded, dict)
    assert json.loads(json.dumps(Recorded(hf))) == hf
    assert (recorded["a"], recorded.get("b", {}).get("c"), "e" in recorded) == (1, 2, True)
    assert unread_keys(recorded) == ["b.d = 3", "f = [5]"]
    assert unread_keys(Recorded({})) == []
    copied = Recorded(hf)
    assert {**copied} == hf
    assert unread_keys(copied) == ["b.c = 2", "b.d = 3"]
    fields = Fields(Recorded(hf), defaults={"g": 6})
    assert (fields.int("g"), fields.int("a"), fields.nested("b").int("c"), fields.int("h", 7)) == (6, 1, 2, 7)
    assert unread_keys(fields.data) == ["b.d = 3", "e = 4", "f = [5]"]  # type: ignore[arg-type]


def test_the_tables_do_not_overlap() -> None:
    assert not HARMLESS.keys() & REFUSED.keys()
    assert all(values is ANY or isinstance(values, tuple) for values in HARMLESS.values())


YARN = {"factor": 4.0, OUTER: 32768}
YARN_FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "as the cards of Qwen3 say": ({"rope_scaling": {"rope_type": "yarn", **YARN}}, 131072),
    "as those of Qwen2.5 say": ({"rope_scaling": {"type": "yarn", **YARN}}, 131072),
    "both names of the type": ({"rope_scaling": {"type": "yarn", "rope_type": "yarn", **YARN}}, 131072),
    "transformers 5": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}}, 131072),
    "the original length beside it": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, OUTER: 32768}, 131072),
    "its length in the file": (
        {"rope_scaling": {"rope_type": "yarn", **YARN, "attention_factor": None}, "max_position_embeddings": 131072},
        131072,
    ),
    "half as far": ({"rope_scaling": {"rope_type": "yarn", **YARN, "factor": 2.0}}, 65536),
}


@pytest.mark.parametrize("form", YARN_FORMS)
def test_qwen3_with_yarn_in_the_forms_in_use(form: str) -> None:
    """Qwen3-8B's own fields; the engine's longest request is what the rotation was scaled to."""
    fields, longest = YARN_FORMS[form]
    size = {"head_dim": 128, "max_position_embeddings": 40960}
    base = {} if "rope_parameters" in fields else {"rope_theta": 1000000, "rope_scaling": None}
    hf = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **size, **base, **fields}
    assert read(hf)[0].max_model_len == longest
    assert_rotations_are_transformers(hf)
    rope = read(hf)[0].rope  # type: ignore[attr-defined]
    assert (rope.kind, rope.original_max_position, rope.theta) == ("yarn", 32768, 1e6)


def test_pythias_own_names_of_the_rotation_are_read() -> None:
    """As in the hub's files, which say neither `rope_theta` nor `partial_rotary_factor`."""
    hf = {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
        "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 20000, "rotary_pct": 0.5, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
    }  # fmt: skip
    config, reported = read(hf)
    assert reported == []
    assert (config.rope.theta, config.rope.partial, config.activation) == (20000, 0.5, "gelu")  # type: ignore[attr-defined]
    assert_rotations_are_transformers(hf)
    with pytest.raises(ModelError, match=r"rotary_pct 0\.5 contradicts partial_rotary_factor 0\.25"):
        read({**hf, "partial_rotary_factor": 0.25})
    with pytest.raises(ModelError, match="rotary_pct must be a positive number, not 'half'"):
        read({**hf, "rotary_pct": "half"})


def test_keys_of_starcoder2s_files_that_its_class_lacks_are_silent_at_their_value() -> None:
    same = {"attention_softmax_in_fp32": True, "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True}
    types = {"mlp_type": "default", "norm_type": "layer_norm"}
    hf = {"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2"}
    assert read({**hf, **same, **types, "layer_norm_epsilon": 0.1}) == (read(hf)[0], [])
    assert read({**hf, **dict.fromkeys(same, False)})[1] == [f"{name} = false" for name in same]
    for name in types:
        with pytest.raises(ModelError, match=f"{name} = 'gated' is not supported"):
            read({**hf, name: "gated"})


def test_gpt2s_own_names_are_read_and_named() -> None:
    """The keys of the hub's file."""
    hf = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
    }  # fmt: skip
    config, reported = read(hf)
    assert reported == []
    assert (config.hidden_size, config.num_layers, config.intermediate_size) == (768, 12, 3072)  # type: ignore[attr-defined]
    assert read({**hf, "hidden_size": 768})[0] == config  # transformers' name for it
    assert read({**{k: v for k, v in hf.items() if k != "n_embd"}, "hidden_size": 96})[0].hidden_size == 96
    for wrong, words in [
        ({"hidden_size": 96}, "n_embd 768 contradicts hidden_size 96"),
        ({"n_embd": 770}, "n_embd must be a multiple of n_head 12, not 770"),
        ({"n_layer": 0}, "n_layer must be a positive integer, not 0"),
        ({"n_layer": None}, "n_layer must not be null"),
        ({"n_embd": 2**20 * 12}, "n_embd must be at most 262144"),
        ({"activation_function": "gelu_10"}, "activation_function must be one of silu"),
    ]:
        with pytest.raises(ModelError, match=words):
            read({**hf, **wrong})
