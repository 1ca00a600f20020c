"""A bad word is forbidden in every form that its tokenizer gives it: at the start, in a line, with a space, without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers

from nanoengine.api.errors import ParamsError
from nanoengine.plugins.samplers.params import BadWordsParams

TEXT = ["the cat sat (cat) on a mat", "sad unhappy cats happy", "\n", "un"] * 3


def bpe(pre: Any = None, normalizer: Any = None) -> Backend:
    """Trained on words; without `pre`, as SentencePiece files are, its pre-tokenizer is for the training alone."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre or pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split("▁", "merged_with_next")]
    )
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(pre, pre_tokenizers.ByteLevel) else []
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>", "<end>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXT, trainer)
    if pre is None:
        backend.pre_tokenizer = None
    return backend


_LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
BACKENDS = {
    "gpt2": bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "add_prefix_space": bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama": bpe(normalizer=_LLAMA),
    "gemma": bpe(normalizer=normalizers.Replace(" ", "▁")),
    "metaspace_first": bpe(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace_always": bpe(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace_never": bpe(pre_tokenizers.Metaspace(prepend_scheme="never")),
}


@dataclass
class Context:
    backend: Backend
    max_model_len: int = 64

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)


def forbidden(backend: Backend, *words: str) -> list[list[int]]:
    packed = BadWordsParams(bad_words=words).pack(Context(backend))
    sequences: dict[int, list[int]] = {}
    for token, number in zip(packed["tokens"], packed["sequence"], strict=True):
        sequences.setdefault(number, []).append(token)
    return list(sequences.values())


@pytest.mark.parametrize("given", ["{}", " {}"])
@pytest.mark.parametrize("word", ["cat", "unhappy", "mat", "happy cat"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_bad_word_is_forbidden_with_and_without_the_space_before_it(name: str, word: str, given: str) -> None:
    backend = BACKENDS[name]
    found = forbidden(backend, given.format(word))
    for text in (word, f" {word}", f"sat {word}", f"\n{word}", f"\n {word}"):
        ids = Context(backend).encode(text)
        assert any(ids[-len(sequence) :] == sequence for sequence in found), (text, ids, found)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
def test_the_forms_differ_in_length(name: str) -> None:
    """What the test above turns on: one token with the space, several without."""
    assert {len(sequence) for sequence in forbidden(BACKENDS[name], "unhappy")} > {1}


@pytest.mark.parametrize("name", BACKENDS)
def test_words_that_only_resemble_it_are_not_forbidden(name: str) -> None:
    found = forbidden(BACKENDS[name], "cat")
    for text in ("sat", "mat", "happy", "sad", "ca", "c"):
        ids = Context(BACKENDS[name]).encode(text)
        assert not any(ids[-len(sequence) :] == sequence for sequence in found)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_special_token_may_be_a_bad_word(name: str) -> None:
    assert forbidden(BACKENDS[name], "<end>") == [[BACKENDS[name].token_to_id("<end>")]]


def test_a_word_that_has_no_token_is_refused() -> None:
    backend = Backend(models.BPE(vocab={"c": 0}, merges=[]))
    with pytest.raises(ParamsError, match=r"makes no tokens of 'dog'"):
        forbidden(backend, "dog")
