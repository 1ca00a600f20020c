"""SentencePiece vocabularies of GGUF files: the ids are those that the sentencepiece library itself gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf_zoo import HIDDEN, TinyGGUF
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from nanoengine.api import ModelSourceError
from nanoengine.plugins.model_sources import gguf_sentencepiece
from nanoengine.plugins.model_sources.gguf_convert import convert
from nanoengine.plugins.model_sources.gguf_metadata import Metadata
from nanoengine.plugins.model_sources.gguf_tokenizer import build_tokenizer

TRAINED = json.loads(Path(__file__).with_name("sentencepiece.json").read_text("utf-8"))
KINDS = pytest.mark.parametrize("kind", ["llama", "gemma"])  # with a space in front of every text, and without


def keys(kind: str) -> dict[str, Any]:
    trained = TRAINED[kind]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": trained["tokens"],
        "tokenizer.ggml.scores": trained["scores"],
        "tokenizer.ggml.token_type": trained["types"],
        "tokenizer.ggml.bos_token_id": trained["bos"],
        "tokenizer.ggml.eos_token_id": trained["eos"],
        "tokenizer.ggml.unknown_token_id": trained["unk"],
        "tokenizer.ggml.add_space_prefix": trained["add_space_prefix"],
    }


def built(kind: str, **more: Any) -> Tokenizer:
    return build_tokenizer(Metadata("tiny.gguf", {**keys(kind), **more}))


def wrong(kind: str) -> list[str]:
    """Texts whose ids, or what they decode to, are not the library's."""
    tokenizer, trained = built(kind), TRAINED[kind]
    return [
        text
        for text, ids in trained["texts"].items()
        if tokenizer.encode(text, add_special_tokens=False).ids != ids
        or tokenizer.decode(ids) != trained["decoded"][text]
    ]


@KINDS
def test_ids_and_texts_are_the_library_s(kind: str) -> None:
    assert len(TRAINED[kind]["texts"]) > 10
    assert wrong(kind) == []


@KINDS
def test_mutant_with_merges_in_order_of_ids_is_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gguf_sentencepiece._merges
    monkeypatch.setattr(gguf_sentencepiece, "_merges", lambda *given: real(*given)[::-1])
    assert wrong(kind)


def test_user_defined_tokens_are_taken_whole_and_control_tokens_are_special() -> None:
    tokenizer = built("gemma")
    encoded = tokenizer.encode("the<tag>     \n\n<start_of_turn>of", add_special_tokens=False)
    assert encoded.tokens == ["the", "<tag>", "▁▁▁▁", "▁", "\n\n", "<start_of_turn>", "of"]
    assert tokenizer.decode(encoded.ids) == "the<tag>     \n\nof"


@KINDS
def test_bos_in_front_unless_the_file_says_otherwise(kind: str) -> None:
    assert built(kind).encode("the").ids[0] == TRAINED[kind]["bos"]
    assert built(kind, **{"tokenizer.ggml.add_bos_token": False}).encode("the").ids[0] != TRAINED[kind]["bos"]


@pytest.mark.parametrize(("arch", "kind"), [("llama", "llama"), ("gemma3", "gemma")])
def test_transformers_keeps_it_so(arch: str, kind: str, tmp_path: Path) -> None:
    tiny = TinyGGUF(arch)
    tiny.keys = {key: value for key, value in tiny.keys.items() if not key.startswith("tokenizer.")} | keys(kind)
    count = len(TRAINED[kind]["tokens"])
    tiny.weights["token_embd.weight"] = (np.ones((count, HIDDEN), np.float32), Q.F32)
    convert(tiny.write(tmp_path / "tiny.gguf"), tmp_path, lambda text: None)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in TRAINED[kind]["texts"].items():
        assert loaded.encode(text, add_special_tokens=False) == ids
        assert loaded.decode(ids) == TRAINED[kind]["decoded"][text]
    assert loaded.unk_token == TRAINED[kind]["tokens"][TRAINED[kind]["unk"]]


def test_scores_must_fit() -> None:
    with pytest.raises(ModelSourceError, match=r"tokenizer\.ggml\.scores must have one score for each token"):
        built("llama", **{"tokenizer.ggml.scores": [0.0]})
    with pytest.raises(ModelSourceError, match=r"tokenizer\.ggml\.scores is missing"):
        build_tokenizer(Metadata("x", {key: value for key, value in keys("llama").items() if "scores" not in key}))
