"""What generation_config.json says: taken over where it is of the right type, else refused by the file's name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from nanoengine.api.errors import ModelError
from nanoengine.setup.start.generation import GenerationDefaults, read_generation_defaults, read_json
from nanoengine.setup.start.generation_keys import HARMLESS, MEANING

LEGAL = ("temperature", "top_k")
PROCESSORS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logit_bias")


def test_defaults_of_installed_processors_under_our_names(tmp_path: Path) -> None:
    given = {"temperature": 1, "top_k": 5, "top_p": "of no processor here", "max_new_tokens": 7, "eos_token_id": [2, 3]}
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    found = read_generation_defaults(tmp_path, {}, LEGAL, 4)
    assert found.sampling == {"temperature": 1.0, "top_k": 5, "max_tokens": 7}
    assert found.eos_ids == {2, 3, 4}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", "hot", "temperature must be a number, not 'hot'"),
        ("temperature", True, "temperature must be a number, not True"),
        ("top_k", 2.5, "top_k must be an integer, not 2.5"),
        ("max_new_tokens", "many", "max_new_tokens must be an integer, not 'many'"),
        ("eos_token_id", "end", "eos_token_id"),
    ],
)
def test_a_wrong_type_names_the_file(tmp_path: Path, name: str, value: Any, words: str) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({name: value}))
    with pytest.raises(ModelError) as caught:
        read_generation_defaults(tmp_path, {}, LEGAL, None)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def defaults(folder: Path, given: dict[str, Any], **options: Any) -> GenerationDefaults:
    """Of a file with these keys, for an engine of 100 tokens and 64 positions with every processor."""
    (folder / "generation_config.json").write_text(json.dumps(given))
    return read_generation_defaults(folder, {}, PROCESSORS, 4, **{"vocab_size": 100, "max_model_len": 64, **options})


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({"stop_strings": "END"}, {"stop": "END"}),
        ({"stop_strings": ["END", "###"]}, {"stop": ["END", "###"]}),
        ({"min_new_tokens": 5}, {"min_tokens": 5, "max_tokens": 16}),
        ({"min_new_tokens": 50}, {"min_tokens": 50, "max_tokens": 50}),
        ({"min_new_tokens": 9, "max_new_tokens": 7}, {"min_tokens": 7, "max_tokens": 7}),
        ({"suppress_tokens": [3, 9, 3, 100, -1]}, {"logit_bias": {3: -math.inf, 9: -math.inf}}),
        ({"bad_words_ids": [[8], [4]]}, {"logit_bias": {8: -math.inf}}),  # never the end of the output, as there
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.6}),
        ({"repetition_penalty": 1.05, "top_k": 0}, {"repetition_penalty": 1.05, "top_k": 0}),
        ({"do_sample": True, "min_p": 0.1}, {"min_p": 0.1}),  # without transformers' top_k of 50
    ],
)
def test_what_the_samplers_can_do_is_done(given: dict[str, Any], sampling: dict[str, Any], tmp_path: Path) -> None:
    found = defaults(tmp_path, given)
    assert (found.sampling, found.unsupported) == (sampling, ())


def test_sampling_without_do_sample_is_done_and_reported_once(tmp_path: Path) -> None:
    """As vLLM does it; transformers' own default is not to sample."""
    given = {"temperature": 0.6, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.1}
    found = defaults(tmp_path, given)
    assert found.sampling == given
    (line,) = found.unsupported
    assert "generation_config.json: temperature = 0.6, top_p = 0.9 without do_sample: requests are sampled" in line
    for said in (True, False):
        assert defaults(tmp_path, {**given, "do_sample": said}).unsupported == ()
    assert defaults(tmp_path, {"temperature": 1.0, "top_k": 0}).unsupported == ()


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "top_k": 7}', encoding="utf-8-sig")
    assert read_generation_defaults(tmp_path, {}, PROCESSORS, None).sampling == {"top_k": 7}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 4),
        ("no_repeat_ngram_size", 3),
        ("typical_p", 0.9),
        ("eta_cutoff", 3e-4),
        ("epsilon_cutoff", 3e-4),
        ("top_h", 0.4),
        ("min_length", 10),
        ("max_length", 63),
        ("max_time", 1.5),
        ("begin_suppress_tokens", [1]),
        ("forced_bos_token_id", 7),
        ("forced_eos_token_id", 7),
        ("forced_decoder_ids", [[1, 7]]),
        ("exponential_decay_length_penalty", [9, 1.1]),
        ("encoder_repetition_penalty", 0.9),
        ("encoder_no_repeat_ngram_size", 2),
        ("sequence_bias", [[[1], 2.0]]),
        ("bad_words_ids", [[5, 6]]),
        ("guidance_scale", 1.5),
        ("penalty_alpha", 0.6),
        ("num_return_sequences", 2),
        ("watermarking_config", {"bias": 2.0}),
        ("token_healing", True),
        ("dola_layers", "high"),
        ("force_words_ids", [[1]]),
        ("constraints", ["something"]),
        ("unheard_of", 1),
    ],
)
def test_what_would_change_tokens_is_reported_once_by_name(key: str, value: Any, tmp_path: Path) -> None:
    """With the file, the value, and what it means."""
    found = defaults(tmp_path, {key: value, "use_cache": False, "pad_token_id": 3, "top_k": None})
    assert found.sampling == {}
    (line,) = found.unsupported
    assert f"generation_config.json: {key} = " in line
    assert line.endswith(MEANING.get(key, "the key is not known"))


def test_every_key_of_transformers_is_known(tmp_path: Path) -> None:
    names = set(vars(GenerationConfig()))
    assert len(names) > 60
    served = {"do_sample", "eos_token_id", "max_new_tokens"}
    assert names - HARMLESS.keys() - MEANING.keys() - served - {"_commit_hash", "_original_object_hash"} == set()
    off = {name: values[0] for name, values in HARMLESS.items() if values}
    assert defaults(tmp_path, {**off, **dict.fromkeys(names)}).unsupported == ()
    assert defaults(tmp_path, {"max_length": 64}).unsupported == ()  # no request can be longer


def test_a_default_of_a_processor_that_is_not_there_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"top_p": 0.8, "min_p": 0.0, "suppress_tokens": [1], "stop_strings": ["END"]}))
    found = read_generation_defaults(tmp_path, {}, LEGAL, None, has_tokenizer=False)
    assert found.sampling == {}
    assert [line.split(": ")[1].partition(" =")[0] for line in found.unsupported] == [
        "top_p",
        "suppress_tokens",
        "stop_strings",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' more than once"),
        ('{"a": 1, "a": 1}', "the key 'a' more than once"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "cannot read"),
        ("[" * 200_000, "cannot read"),
        ('{"a": 1' + "0" * 5000 + "}", "cannot read"),
        ('{"a": "' + "x" * 2**24 + '"}', "larger than 16 MiB"),
        ("[1]", "contains list, not an object"),
        ('{"a": }', "cannot read"),
    ],
)
def test_json_that_is_no_configuration(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ModelError, match=words) as caught:
        read_json(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 500
