"""A model folder's own code is never run, whatever its files ask for and whatever standard input answers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from text_zoo import byte_level

from nanoengine.api.errors import ModelError
from nanoengine.text import load_tokenizer

EVIL = """
from pathlib import Path
Path(__file__).with_name("RAN").write_text("the folder's code ran")
Path({mark!r}).write_text("the folder's code ran")
from transformers import GPT2Tokenizer, GPT2Config, GPT2Model
class Evil(GPT2Tokenizer): pass
class EvilConfig(GPT2Config): pass
class EvilModel(GPT2Model): pass
"""
AUTO = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor")}
TOKENIZER = {"AutoTokenizer": ["evil.Evil", None]}


def write(folder: Path, files: dict[str, Any], mark: Path) -> None:
    (folder / "evil.py").write_text(EVIL.replace("{mark!r}", repr(str(mark))))
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


OLD = {"vocab.json": {"a": 0, "b": 1, "<|endoftext|>": 2}, "merges.txt": "#version: 0.2\n"}
CASES: dict[str, dict[str, Any]] = {
    "auto_map": {"tokenizer_config.json": {"auto_map": TOKENIZER, "tokenizer_class": "Evil"}},
    "auto_map_both": {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}},
    "auto_map_as_a_list": {"tokenizer_config.json": {"auto_map": ["evil.Evil", None], "tokenizer_class": "Evil"}},
    "auto_map_and_a_known_class": {
        "tokenizer_config.json": {"auto_map": TOKENIZER, "tokenizer_class": "GPT2Tokenizer"}
    },
    "config_auto_map": {"config.json": {"model_type": "evil", "auto_map": {**AUTO, **TOKENIZER}}},
    "config_auto_map_known_type": {"config.json": {"model_type": "gpt2", "auto_map": {**AUTO, **TOKENIZER}}},
    "a_model_as_the_class": {
        "tokenizer_config.json": {"tokenizer_class": "AutoModel"},
        "config.json": {"model_type": "evil", "auto_map": AUTO},
    },
    "auto_tokenizer_as_the_class": {
        "tokenizer_config.json": {"tokenizer_class": "AutoTokenizer", "auto_map": TOKENIZER},
    },
    "a_processor_as_the_class_of_the_config": {
        "config.json": {"model_type": "evil", "tokenizer_class": "AutoProcessor", "auto_map": AUTO},
        "preprocessor_config.json": {"auto_map": AUTO, "processor_class": "Evil"},
        "processor_config.json": {"auto_map": AUTO, "processor_class": "Evil"},
    },
}


@pytest.mark.parametrize("with_json", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_code_of_the_folder_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, with_json: bool
) -> None:
    folder, mark = tmp_path / "model", tmp_path / "RAN"
    folder.mkdir()
    write(folder, {**OLD, **CASES[case]}, mark)
    if with_json:
        byte_level().save(str(folder / "tokenizer.json"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 5))
    tokenizer, refusal = None, ""
    try:
        tokenizer = load_tokenizer(folder)
    except ModelError as error:
        refusal = str(error)
    if tokenizer is not None:
        assert tokenizer.encode("ab", add_special_tokens=False)
    else:
        assert not with_json, refusal
        if "tokenizer_config.json" in CASES[case]:
            assert "which is never run" in refusal or "is not a tokenizer of transformers" in refusal
    assert not mark.exists()
    assert sys.stdin.read() == "y\n" * 5, "standard input was asked"


def test_without_the_answer_the_code_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: what the test above turns on."""
    from transformers import AutoTokenizer

    mark = tmp_path / "RAN"
    write(tmp_path, {**OLD, **CASES["auto_map"]}, mark)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert mark.exists()
