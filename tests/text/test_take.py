"""What is taken of a sample's text piece by piece is the text that it would have as a whole."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from nanoengine.testing.byte_tokenizer import END, byte_tokenizer
from nanoengine.text import IncrementalDetokenizer, Tokenizer

TEXT = 'Grüße 😀 {"a": "yes"} and no, then STOP and more' + END + "!"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()))


@pytest.mark.parametrize("stop", [(), ("STOP",), ("STOP", 'yes"} x'), (END,)])
@pytest.mark.parametrize("include", [False, True])
def test_the_taken_pieces_are_the_text(tokenizer: Tokenizer, stop: tuple[str, ...], include: bool) -> None:
    ids, rng = tokenizer.encode(TEXT), random.Random(7)

    def detokenizer() -> IncrementalDetokenizer:
        return IncrementalDetokenizer(tokenizer, stop=stop, include_stop_str_in_output=include)

    whole = detokenizer()
    found = whole.read(ids, "length")
    for _ in range(20):
        split, at, pieces, matched = detokenizer(), 0, [], None
        while at < len(ids) and matched is None:
            count = rng.randint(1, 4)
            end = at + count >= len(ids)
            matched = split.read(ids[at : at + count], "length" if end else None)
            pieces.append(split.take())
            at += count
        assert ("".join(pieces), matched, split.num_tokens) == (whole.text, found, whole.num_tokens)
        assert split.take() == split.text == ""
        assert len([piece for piece in pieces if piece]) > 1
