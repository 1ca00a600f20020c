"""The quickstart model's own tokenizer: how it splits, its template, and incremental text over its vocabulary.

The expected tokens are what the model was trained on: digits one by one, then GPT-2's splitting of each piece between
them. Round trips alone would not do: with the wrong pre-tokenizer they all pass.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nanoengine.text import IncrementalDetokenizer, Tokenizer, load_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    loaded = load_tokenizer(smollm2_path)
    assert loaded is not None
    return loaded


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("x =  3", ["x", " =", "  ", "3"]),
        ("\n\n1.", ["\n\n", "1", "."]),
        ("12 345", ["1", "2", " ", "3", "4", "5"]),
        ("The capital of France is Paris.", ["The", " capital", " of", " France", " is", " Paris", "."]),
        ("  def f(x):\n\treturn x", [" ", " def", " f", "(", "x", "):", "\n", "\t", "return", " x"]),
    ],
)
def test_splits_as_the_model_was_trained(tokenizer: Tokenizer, text: str, tokens: list[str]) -> None:
    ids = tokenizer.encode(text)
    assert [tokenizer.token_text(i) for i in ids] == tokens
    assert tokenizer.decode(ids) == text
    assert tokenizer.hf.encode(text) == ids


def test_vocabulary_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert tokenizer.all_special_ids == set(range(17))
    assert (tokenizer.hf.bos_token_id, tokenizer.hf.eos_token_id, tokenizer.hf.pad_token_id) == (1, 2, 2)
    assert tokenizer.encode("<|im_start|>Hi<|im_end|>") == [1, 26843, 2]


def test_chat_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat(messages) == text
    assert tokenizer.apply_chat_template(messages) == tokenizer.encode(text)
    alone = tokenizer.render_chat(messages[1:])
    assert alone.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_incremental_text_is_exact_over_the_whole_vocabulary(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    every = rng.sample(range(tokenizer.vocab_size), tokenizer.vocab_size)
    for start in range(0, len(every), 64):
        ids = every[start : start + 64]
        detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
        for token_id in ids:
            detokenizer.push([token_id])
        detokenizer.finish()
        assert detokenizer.text == tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", ["naïve café — 東京 \U0001f468\u200d\U0001f469 e\u0301", "\u200b\u00a0\r\n\t"])
def test_round_trip_character_by_character(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    for token_id in tokenizer.encode(text):
        detokenizer.push([token_id])
        assert text.startswith(detokenizer.text)
    detokenizer.finish()
    assert detokenizer.text == text
