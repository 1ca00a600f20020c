"""Keys of GGUF files: each is read, harmless at its value, refused or reported; defaults are llama.cpp's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf_zoo import HEAD_SIZE, HIDDEN, TinyGGUF, tokens
from test_gguf_sentencepiece import TRAINED
from test_gguf_sentencepiece import keys as sentencepiece_keys

from nanoengine.api import ModelSourceError
from nanoengine.plugins.model_sources.gguf_architectures import _NEUTRAL
from nanoengine.plugins.model_sources.gguf_convert import convert
from nanoengine.plugins.model_sources.gguf_metadata import Metadata
from nanoengine.plugins.model_sources.gguf_tokenizer import build_tokenizer
from nanoengine.setup.start.pooling import read_pooling_defaults

NOWHERE = 2**32 - 1  # what some converters write for a token that the model has not


def converted(tiny: TinyGGUF, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """config.json, generation_config.json, and the lines to the user."""
    folder, said = tmp_path / "folder", list[str]()
    folder.mkdir()
    convert(tiny.write(tmp_path / "tiny.gguf"), folder, said.append)
    config, generation = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    return config, generation, said


def skipped(said: list[str]) -> list[str]:
    lines = [line for line in said if "skipped keys" in line]
    return lines[0].removeprefix("tiny.gguf: skipped keys: ").split(", ") if lines else []


def changed(arch: str = "llama", /, **keys: Any) -> TinyGGUF:
    """`__` in a name stands for a dot, names without a family get it; None removes a key."""
    tiny = TinyGGUF(arch, "qwen2" if arch.startswith("qwen") else "smollm")
    for name, value in keys.items():
        name = name.replace("__", ".")
        name = name if name.startswith(("tokenizer.", "general.", "split.")) else f"{arch}.{name}"
        tiny.keys.pop(name, None)
        if value is not None:
            tiny.keys[name] = value
    return tiny


# Rotation

DEFAULT = {"rope_type": "default", "rope_theta": 500000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}
ROPES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, DEFAULT),
    ({"rope__freq_base": None}, {**DEFAULT, "rope_theta": 10000.0}),
    ({"rope__scaling__factor": 4.0}, LINEAR),
    ({"rope__scale_linear": 4.0}, LINEAR),  # the old name
    ({"rope__scaling__factor": 4.0, "rope__scale_linear": 2.0}, LINEAR),
    ({"rope__scaling__factor": 4.0, "rope__scaling__type": "linear"}, LINEAR),
    ({"rope__scaling__factor": 4.0, "rope__scaling__type": "none"}, DEFAULT),
    ({"rope__scaling__factor": 1.0}, DEFAULT),
    ({"rope__scaling__factor": 0.0, "rope__scaling__type": "linear"}, DEFAULT),
    ({"rope__scaling__type": "linear"}, DEFAULT),
    ({"rope__scaling__attn_factor": 1.0, "rope__scaling__finetuned": False}, DEFAULT),
    ({"rope__scaling__original_context_length": 128}, DEFAULT),
]


@pytest.mark.parametrize(("keys", "want"), ROPES, ids=[str(keys) for keys, _ in ROPES])
def test_rotation_is_what_llama_cpp_makes_of_the_keys(keys: dict[str, Any], want: Any, tmp_path: Path) -> None:
    assert converted(changed(**keys), tmp_path)[0]["rope_parameters"] == want


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_each_family_rotates_by_10000_and_linearly_if_no_key_says_otherwise(arch: str, tmp_path: Path) -> None:
    keys = {"rope__freq_base": None, "rope__scaling__type": None, "rope__scaling__factor": 4.0}
    found = converted(changed(arch, **keys), tmp_path)[0]["rope_parameters"]
    if arch == "gemma3":
        assert found["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
        found = found["full_attention"]
    assert found == {**LINEAR, "rope_theta": 10000.0}


def test_gemma_3_without_optional_keys(tmp_path: Path) -> None:
    names = ("attention.sliding_window_pattern", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.type")
    tiny = changed("gemma3", **dict.fromkeys(name.replace(".", "__") for name in names))
    assert converted(tiny, tmp_path)[0]["layer_types"] == ["sliding_attention"] * 2  # the sixth would be global


@pytest.mark.parametrize("window", [None, 0])
def test_gemma_3_without_a_window_sees_everything(window: int | None, tmp_path: Path) -> None:
    config, _, _ = converted(changed("gemma3", attention__sliding_window=window), tmp_path)
    assert config["layer_types"] == ["full_attention"] * 2
    assert "sliding_window" not in config


# Keys that are another model

REFUSED: dict[str, Any] = {
    "rope__freq_base": [0.0, -1.0, float("nan"), float("inf"), "high", True],
    "rope__scaling__factor": [-4.0, float("inf"), "4"],
    "rope__scaling__type": ["yarn", "longrope", "su", 3],
    "rope__scaling__attn_factor": [0.5, 0.0],
    "rope__scaling__yarn_attn_factor": [2.0],
    "rope__scaling__yarn_ext_factor": [1.0],
    "rope__dimension_count": [HEAD_SIZE // 2, 0],
    "rope__dimension_sections": [[1, 2, 3]],
    "attention__causal": [False],
    "attention__scale": [0.5, 1.0],
    "attention__clamp_kqv": [8.0],
    "attention__max_alibi_bias": [8.0],
    "attention__sliding_window": [8, [8, 0]],
    "attention__value_length": [16],
    "attention__key_length": [16],
    "attention__key_length_swa": [16],
    "attention__layer_norm_rms_epsilon": [0.0, -1e-5, float("nan"), "small"],
    "attention__head_count": [[4, 2], 0, 3, "4"],
    "attention__head_count_kv": [[2, 1]],
    "logit_scale": [0.5],
    "residual_scale": [0.5],
    "embedding_scale": [12.0],
    "attn_logit_softcapping": [50.0],
    "final_logit_softcapping": [30.0],
    "expert_count": [8],
    "nextn_predict_layers": [1],
    "use_parallel_residual": [True],
    "pooling_type": [5, "mean", [1]],
    "made_up": [0, 1, "x"],
    "block_count": [10**9, 0, [2, 3]],
    "embedding_length": [65, 2**31],
    "feed_forward_length": [[96, 48]],
    "context_length": [0, -1],
    "general__type": ["adapter", "mmproj", "vocab", 3],
    "general__quantization_version": [1],
    "general__sampling__temp": ["hot", float("nan")],
    "split__count": [2, 300, "3"],
    "tokenizer__ggml__pre": ["default", "gpt-2", "deepseek-llm", 7],
    "tokenizer__ggml__model": ["bert", "t5", "rwkv", "none", 3],
    "tokenizer__ggml__tokens": [[1, 2], "abc", [True]],
    "tokenizer__ggml__token_type": [[1, 2], "abc", [1.5] * 269],
    "tokenizer__ggml__merges": [[1, 2], "a b", ["q z"]],
    "tokenizer__ggml__bos_token_id": ["<s>", True, [1]],
    "tokenizer__ggml__eos_token_id": [9999, NOWHERE, "x"],
    "tokenizer__ggml__padding_token_id": ["<pad>"],
    "tokenizer__ggml__add_bos_token": [1, "yes"],
    "tokenizer__ggml__add_eos_token": ["no"],
    "tokenizer__chat_template": [3, ["x"]],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in REFUSED.items() for value in values],
    ids=lambda value: f"{value!r:.40}",
)
def test_a_key_that_is_another_model_or_of_another_type_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"^\S*tiny\.gguf"):
        converted(changed(**{key: value}), tmp_path)


NEUTRAL = [(key, value) for key, values in _NEUTRAL.items() for value in values]


@pytest.mark.parametrize(("key", "value"), NEUTRAL, ids=[f"{key}={value}" for key, value in NEUTRAL])
def test_a_key_that_is_harmless_at_its_value_changes_nothing(key: str, value: Any, tmp_path: Path) -> None:
    want, _, _ = converted(changed(), tmp_path)
    (tmp_path / "with").mkdir()
    got, _, said = converted(changed(**{key.replace(".", "__"): value}), tmp_path / "with")
    assert got == want
    assert skipped(said) == []


def test_lists_of_one_value_for_all_layers_are_that_value(tmp_path: Path) -> None:
    lists = {"attention__head_count": [4, 4], "attention__head_count_kv": [2, 2], "feed_forward_length": [96, 96]}
    config, _, _ = converted(changed(**lists), tmp_path)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (4, 2, 96)


def test_what_is_not_read_is_reported_by_name(tmp_path: Path) -> None:
    tiny = changed(general__name="Tiny", general__file_type=1, general__license="mit", split__count=1)
    unread = {
        "general.sampling.mirostat": 2, "general.sampling.penalty_last_n": 64, "quantize.imatrix.file": "x",
        "tokenizer.chat_template.tool_use": "{{ x }}", "tokenizer.ggml.made_up": 1, "qwen2.rope.freq_base": 5.0,
        "tokenizer.ggml.fim_pad_token_id": NOWHERE,
    }  # fmt: skip
    tiny.keys |= {**unread, "tokenizer.ggml.mask_token_id": 5}
    _, _, said = converted(tiny, tmp_path)
    assert skipped(said) == list(unread)


def test_of_an_ordinary_file_nothing_is_reported(tmp_path: Path) -> None:
    assert skipped(converted(changed(), tmp_path)[2]) == []


def test_a_vocabulary_without_weights_is_called_so(tmp_path: Path) -> None:
    tiny = changed()
    tiny.weights.clear()
    with pytest.raises(ModelSourceError, match="it has no tensors: it is a vocabulary without weights"):
        converted(tiny, tmp_path)


def test_frequencies_of_a_family_that_does_not_read_them_are_unknown(tmp_path: Path) -> None:
    tiny = changed("qwen3")
    tiny.weights["rope_freqs.weight"] = (np.full(HEAD_SIZE // 2, 2.0, np.float32), Q.F32)
    with pytest.raises(ModelSourceError, match=r"rope_freqs\.weight is unknown"):
        converted(tiny, tmp_path)


@pytest.mark.parametrize("factors", [np.zeros(16), np.full(16, np.nan), np.full(16, np.inf), np.full(16, 0.5),
                                     np.full(3, 2.0), np.full(16, 2.0)])  # fmt: skip
def test_frequencies_of_no_known_schedule_are_refused(factors: np.ndarray, tmp_path: Path) -> None:
    tiny = changed()
    tiny.weights["rope_freqs.weight"] = (factors.astype(np.float32), Q.F32)
    with pytest.raises(ModelSourceError, match="not Llama 3's schedule"):
        converted(tiny, tmp_path)


def test_frequencies_divided_by_one_change_nothing(tmp_path: Path) -> None:
    tiny = changed(rope__scaling__factor=4.0)
    tiny.weights["rope_freqs.weight"] = (np.ones(HEAD_SIZE // 2, np.float32), Q.F32)
    assert converted(tiny, tmp_path)[0]["rope_parameters"] == LINEAR


def test_frequencies_and_linear_scaling_together_are_refused(tmp_path: Path) -> None:
    tiny = changed(rope__scaling__factor=4.0)
    tiny.weights["rope_freqs.weight"] = (np.full(HEAD_SIZE // 2, 2.0, np.float32), Q.F32)
    with pytest.raises(ModelSourceError, match=r"both rope_freqs\.weight and rope scaling 'linear' by 4\.0"):
        converted(tiny, tmp_path)


def test_output_weight_is_the_head_also_of_families_that_tie(tmp_path: Path) -> None:
    tiny = changed("gemma3")
    head = np.random.default_rng(1).normal(0, 0.3, (len(tokens()), HIDDEN)).astype(np.float32)
    tiny.weights["output.weight"] = (head, Q.F32)
    config, _, _ = converted(tiny, tmp_path)
    assert config["tie_word_embeddings"] is False


# Tokens


@pytest.mark.parametrize("kind", ["padding", "unknown", "bos", "eot", "eom", "seperator", "mask", "fim_pre"])
def test_an_id_outside_the_vocabulary_that_is_not_used_is_reported_and_dropped(kind: str, tmp_path: Path) -> None:
    key = f"tokenizer.ggml.{kind}_token_id"
    config, generation, said = converted(changed(**{key.replace(".", "__"): NOWHERE}), tmp_path)
    assert skipped(said) == [key]
    assert NOWHERE not in [*config.values(), *generation.values()]
    assert generation["eos_token_id"] == 0


def test_bos_outside_the_vocabulary_that_is_used_is_refused(tmp_path: Path) -> None:
    tiny = changed(tokenizer__ggml__bos_token_id=NOWHERE, tokenizer__ggml__add_bos_token=True)
    with pytest.raises(ModelSourceError, match="bos_token_id is missing, or outside the vocabulary"):
        converted(tiny, tmp_path)


def test_turn_ends_stop_by_key_and_by_the_texts_that_llama_cpp_knows(tmp_path: Path) -> None:
    tiny = changed(tokenizer__ggml__eot_token_id=2)
    tiny.keys["tokenizer.ggml.tokens"] = ["<|end|>", "<end_of_turn>", *tokens()[2:]]
    generation = converted(tiny, tmp_path)[1]
    assert generation["eos_token_id"] == [0, 2, 1]
    (tmp_path / "plain").mkdir()
    tiny.keys["tokenizer.ggml.token_type"] = [3, 4, *tiny.keys["tokenizer.ggml.token_type"][2:]]
    assert converted(tiny, tmp_path / "plain")[1]["eos_token_id"] == [0, 2]  # as a user's own token it stops nothing


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        ({"temp": 0.6, "top_k": 20, "penalty_repeat": 1.1},
         {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}),
        ({"temp": 0.0, "top_p": 0.5}, {"do_sample": False, "top_p": 0.5}),
        ({"top_k": -1}, {"do_sample": True, "top_k": 0}),
    ],
)  # fmt: skip
def test_sampling_defaults(sampling: dict[str, Any], want: dict[str, Any], tmp_path: Path) -> None:
    tiny = changed()
    for name, value in sampling.items():
        tiny.keys[f"general.sampling.{name}"] = value
    generation = converted(tiny, tmp_path)[1]
    assert {k: v for k, v in generation.items() if not k.endswith("_token_id")} == want


# SentencePiece without the keys that later converters write


def built(kind: str, without: tuple[str, ...], **more: Any) -> Any:
    held = {key: value for key, value in {**sentencepiece_keys(kind), **more}.items() if not key.endswith(without)}
    return build_tokenizer(Metadata("tiny.gguf", held))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_sentencepiece_file_without_token_types_keeps_the_newline(kind: str) -> None:
    """All texts but those with a token that only its type marks as one to be taken whole."""
    trained, tokenizer = TRAINED[kind], built(kind, ("token_type",))
    marked = [t for t, number in zip(trained["tokens"], trained["types"], strict=True) if number == 4]
    texts = {text: ids for text, ids in trained["texts"].items() if not any(token in text for token in marked)}
    assert any("\n" in text for text in texts) or kind == "gemma"  # whose newlines are such tokens
    assert len(texts) > 5
    assert {text: tokenizer.encode(text, add_special_tokens=False).ids for text in texts} == texts
    assert {text: tokenizer.decode(ids) for text, ids in texts.items()} == {t: trained["decoded"][t] for t in texts}


def test_a_sentencepiece_file_without_ids_has_those_of_the_library() -> None:
    trained = TRAINED["llama"]
    assert (trained["unk"], trained["bos"], trained["eos"]) == (0, 1, 2)
    tokenizer = built("llama", ("_token_id",))
    assert tokenizer.encode("the").ids == [1, *tokenizer.encode("the", add_special_tokens=False).ids]
    assert tokenizer.model.unk_token == trained["tokens"][0]


def test_a_byte_level_file_without_token_types_knows_its_named_specials(tmp_path: Path) -> None:
    tiny = changed(tokenizer__ggml__token_type=None)
    tokenizer = build_tokenizer(Metadata("tiny.gguf", tiny.keys))
    assert tokenizer.encode("<|start|>he<|end|>").tokens == ["<|start|>", "he", "<|end|>"]
    assert tokenizer.decode(tokenizer.encode("<|start|>he<|end|>").ids) == "he"


@pytest.mark.parametrize("text", ["$A", "$B:1", "a:b", "$1", "x y", ""])
def test_bos_is_added_whatever_its_text_is(text: str) -> None:
    """The library's templates would read some texts as their own parts."""
    tiny = changed(tokenizer__ggml__add_bos_token=True, tokenizer__ggml__add_eos_token=True)
    tiny.keys["tokenizer.ggml.tokens"] = ["<|end|>", text, *tokens()[2:]]
    if not text:
        with pytest.raises(ModelSourceError, match="it requires bos in"):
            build_tokenizer(Metadata("tiny.gguf", tiny.keys))
        return
    tokenizer = build_tokenizer(Metadata("tiny.gguf", tiny.keys))
    inner = tokenizer.encode("he", add_special_tokens=False).ids
    assert tokenizer.encode("he").ids == [1, *inner, 0]
    assert tokenizer.encode("he", "he").ids == [1, *inner, 0, 1, *inner, 0]


def test_a_token_without_text_is_not_found_everywhere() -> None:
    tiny = changed()
    tiny.keys["tokenizer.ggml.tokens"] = [*tokens()[:2], "", *tokens()[3:]]
    encoded = build_tokenizer(Metadata("tiny.gguf", tiny.keys)).encode("he ll")
    assert encoded.tokens == ["he", "\u0120", "ll"]


def test_many_or_odd_keys_that_are_skipped_are_shown_in_one_line(tmp_path: Path) -> None:
    tiny = changed()
    tiny.keys |= {"x.\x1b[31m\n": 1, **{f"x.{i}": 1 for i in range(30)}}
    line = next(line for line in converted(tiny, tmp_path)[2] if "skipped keys" in line)
    assert line.startswith("tiny.gguf: skipped keys: 'x.\\x1b[31m\\n', x.0, ")
    assert line.endswith(", x.18 and 11 more")


@pytest.mark.parametrize("scores", [[float("nan")] * 3, ["a"], 3, [1, 2]])
def test_scores_of_another_kind_are_refused(scores: Any) -> None:
    with pytest.raises(ModelSourceError, match=r"tokenizer\.ggml\.scores must"):
        built("llama", (), **{"tokenizer.ggml.scores": scores})


def test_tokens_too_long_to_be_merged_in_time_are_refused() -> None:
    held = sentencepiece_keys("llama")
    held["tokenizer.ggml.tokens"] = [*held["tokenizer.ggml.tokens"][:-1], "a" * 20_000]
    with pytest.raises(ModelSourceError, match="too long: one has 20000 characters"):
        build_tokenizer(Metadata("tiny.gguf", held))


def test_harmless_keys_are_keys_of_the_format_and_are_not_read() -> None:
    from nanoengine.plugins.model_sources import gguf_architectures as ours

    keys = gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.LLM
    names = {
        value.removeprefix("{arch}.") for group in keys for value in vars(group).values() if "{arch}" in str(value)
    }
    assert ours._NEUTRAL.keys() - {"attention.clamp_kqv", "rope.scaling.alpha"} <= names
    assert not ours._NEUTRAL.keys() & ours._KNOWN_KEYS


@pytest.mark.parametrize(("number", "want"), [(0, "last"), (1, "mean"), (2, None), (3, "last"), (4, None)])
def test_how_it_pools_is_what_llama_cpp_does(number: int, want: str | None, tmp_path: Path) -> None:
    converted(changed("qwen3", pooling_type=number), tmp_path)
    found = read_pooling_defaults(tmp_path / "folder", {}, 8)
    assert found.normalize
    if want is None:
        assert "is not supported" in str(found.unsupported)
    else:
        assert (found.pooling, found.unsupported) == (want, None)
