"""Folders that are read without transformers: the same tokenizer, and only where it is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from text_zoo import ZOO
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from nanoengine.testing.checkpoints import write_byte_tokenizer
from nanoengine.text import Tokenizer, load_tokenizer
from nanoengine.text.plain_folder import plain_tokenizer

TEXTS = ["", "hello the end", "<s>a</s>", " added tok<pad> ü", "日本 \U0001f600 1234", "a\nb"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
EOS = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
PLAIN: dict[str, dict[str, Any]] = {
    "named": NAMED,
    "null": {**NAMED, "pad_token": None, "additional_special_tokens": None},
    "fields": {"eos_token": EOS, "bos_token": "<s>"},
    "none named": {},
    "extra": {**NAMED, "additional_special_tokens": ["<s>", "</s>"]},
    "extra, newer": {**NAMED, "extra_special_tokens": [EOS], "additional_special_tokens": ["not there"]},
    "no bos of the class": {**NAMED, "add_bos_token": False, "add_eos_token": True, "tokenizer_class": "GPT2Tokenizer"},
    "blanks": {**NAMED, "clean_up_tokenization_spaces": True, "add_prefix_space": True, "model_max_length": 5},
    "template": {**NAMED, "chat_template": TEMPLATE, "padding_side": "left"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "another token": {**NAMED, "pad_token": "<pad>"},
    "not special": {"eos_token": " added tok"},
    "not an added one": {"eos_token": "a"},
    "extra of another": {**NAMED, "extra_special_tokens": ["<more>"]},
    "extra by name": {**NAMED, "extra_special_tokens": {"image_token": "<s>"}},
    "its own name": {**NAMED, "image_token": "<s>"},
    "templates": {**NAMED, "chat_template": [{"name": "default", "template": "a"}]},
    "split": {**NAMED, "split_special_tokens": True},
    "control": {**NAMED, "chat_control_tokens": ["ü"]},
    "unknown": {**NAMED, "fix_mistral_regex": True},
}


def backend(bos: bool) -> Backend:
    made = Backend.from_str(ZOO["byte_level"][0].to_str())
    if bos:
        given = [("<s>", made.token_to_id("<s>"))]
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=given)
    return made


def write(path: Path, config: dict[str, Any], *, bos: bool = False) -> Path:
    backend(bos).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def both(path: Path) -> tuple[Tokenizer, Tokenizer]:
    """As the engine reads it, and as transformers does."""
    found = load_tokenizer(path)
    assert found is not None
    return found, Tokenizer(PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True))


def equal(path: Path) -> bool:
    ours, theirs = both(path)
    chat = [{"role": "user", "content": "hello"}]
    for text in TEXTS:
        for added in (True, False):
            assert ours.encode(text, added) == theirs.encode(text, added)
    ids = [*range(ours.num_ids)]
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip)
    if theirs.has_chat_template:
        assert ours.chat(chat, sanitize_control_tokens=True) == theirs.chat(chat, sanitize_control_tokens=True)
    assert ours.chat(chat, chat_template="{{ eos_token }}") == theirs.chat(chat, chat_template="{{ eos_token }}")
    assert ours.hf.special_tokens_map == theirs.hf.special_tokens_map
    assert ours.named_special_texts == theirs.named_special_texts == theirs.hf.all_special_tokens
    return (ours.to_json(), ours.description(), ours.eos_token_id, ours.template_text, ours.special_texts) == (
        theirs.to_json(), theirs.description(), theirs.eos_token_id, theirs.template_text, theirs.special_texts
    )  # fmt: skip


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_what_is_read_without_transformers_is_what_it_reads(tmp_path: Path, name: str, bos: bool) -> None:
    write(tmp_path, PLAIN[name], bos=bos)
    assert plain_tokenizer(tmp_path) is not None
    assert equal(tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_what_transformers_would_change_is_left_to_it(tmp_path: Path, name: str) -> None:
    write(tmp_path, OTHERS[name])
    assert plain_tokenizer(tmp_path) is None
    assert equal(tmp_path)


def test_added_tokens_that_the_file_lists_must_be_the_same(tmp_path: Path) -> None:
    """Then older files beside it say nothing; else they do."""
    added = backend(False).get_added_tokens_decoder()
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    listed = {str(i): {name: getattr(token, name) for name in fields} for i, token in added.items()}
    write(tmp_path, {**NAMED, "added_tokens_decoder": listed})
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<s>"}')
    assert plain_tokenizer(tmp_path) is not None
    assert equal(tmp_path)
    first = next(iter(listed.values()))
    first["lstrip"] = not first["lstrip"]
    write(tmp_path, {**NAMED, "added_tokens_decoder": listed})
    assert plain_tokenizer(tmp_path) is None
    write(tmp_path, NAMED)
    assert plain_tokenizer(tmp_path) is None
    assert both(tmp_path)[0].eos_token_id == both(tmp_path)[1].eos_token_id == backend(False).token_to_id("<s>")


def test_a_file_of_its_own_with_the_template(tmp_path: Path) -> None:
    write(tmp_path, {**NAMED, "chat_template": "not this one"})
    (tmp_path / "chat_template.jinja").write_bytes(f"{TEMPLATE}\r\n".encode())
    assert plain_tokenizer(tmp_path) is not None
    assert equal(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    assert plain_tokenizer(tmp_path) is None


def test_a_folder_of_the_byte_tokenizer_needs_no_transformers(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    assert plain_tokenizer(tmp_path) is not None
    assert equal(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert plain_tokenizer(tmp_path) is not None
    assert equal(tmp_path)


def test_padding_and_files_that_are_wrong_are_left_to_transformers(tmp_path: Path) -> None:
    write(tmp_path, NAMED)
    padded = backend(False)
    padded.enable_padding(pad_token="</s>")
    padded.save(str(tmp_path / "tokenizer.json"))
    assert plain_tokenizer(tmp_path) is None
    assert equal(tmp_path)
    for name, text in (("tokenizer.json", "{}"), ("tokenizer_config.json", "["), ("tokenizer_config.json", "[]")):
        write(tmp_path, NAMED)
        (tmp_path / name).write_text(text)
        assert plain_tokenizer(tmp_path) is None


def test_the_check_of_equal_tokenizers_sees_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: without the check of tokens."""
    write(tmp_path, OTHERS["another token"])
    made = Backend.from_file(str(tmp_path / "tokenizer.json"))
    made.add_special_tokens([AddedToken("<other>", special=True)])
    monkeypatch.setattr("nanoengine.text.tokenizer.plain_tokenizer", lambda _: None)
    monkeypatch.setattr("nanoengine.text.tokenizer._load", lambda *_, **__: PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", bos_token="<s>", pad_token="<other>"
    ))  # fmt: skip
    with pytest.raises(AssertionError):
        assert equal(tmp_path)
