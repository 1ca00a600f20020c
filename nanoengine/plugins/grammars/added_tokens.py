"""Corrects masks of llguidance that have a special or added token, an id without a token, or a space, where other text
must come.

Where only one text can follow, llguidance allows the first token that the tokenizer makes of it. Of "<s>" that is often
a token of that name, which is no text, and which llguidance then refuses; of U+2581, with which SentencePiece writes a
space, it is that space. And a grammar in Lark's notation can name
ids: `<[*]>` has those of the padded vocabulary, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from nanoengine.api.grammars import only_id

_SPACE = "\u2581"
_LONGEST = 64  # characters of a text that must follow; an added token is shorter


class AddedTokens:
    """The ids of a tokenizer that are no text."""

    def __init__(self, tokenizer: LLTokenizer, end_ids: Iterable[int]) -> None:
        """`end_ids`: one or more; masks have them wherever the output is complete, or the matcher has failed."""
        self._tokenizer, ends = tokenizer, _bits(end_ids, tokenizer.vocab_size)
        special = [i for i in range(tokenizer.vocab_size) if tokenizer.is_special_token(i)]
        padded = [i for i in special if tokenizer.decode_bytes([i]) == b"<[%d]>" % i]  # llguidance's name for them
        bits = _bits(special, tokenizer.vocab_size)
        self._words = (bits | ends).nonzero()[0]
        self._special, self._padded = bits[self._words], _bits(padded, tokenizer.vocab_size)[self._words]
        self._inside, self._any = self._special & ~ends[self._words], self._special | ends[self._words]
        self._is_space = tokenizer.decode_bytes(tokenizer.tokenize_str(_SPACE)) != _SPACE.encode()

    def may_be_space(self, grammar: str) -> bool:
        """Whether this text of a grammar may have U+2581, and the tokenizer makes a space of it: then `correct` is to
        look at each mask."""
        return self._is_space and (_SPACE in grammar or f"{ord(_SPACE):x}" in grammar)

    def correct(self, matcher: LLMatcher, mask: npt.NDArray[np.int32], *, each: bool = False) -> None:
        """Changes the mask, int32 [ceil(vocab_size / 32)], that llguidance has computed for this matcher."""
        if each and not matcher.is_error():
            self._correct(matcher, mask)
            return
        found = mask[self._words] & self._special
        if found.any() and not (matcher.is_accepting() and not (found & self._inside).any()):  # most often not
            self._correct(matcher, mask)

    def _correct(self, matcher: LLMatcher, mask: npt.NDArray[np.int32]) -> None:
        mask[self._words] &= ~self._padded
        only = only_id(mask)
        if only is None or matcher.is_accepting():
            return
        if matcher.try_consume_tokens([only]):
            matcher.rollback(1)
            return
        spelled = self._beginnings(matcher.compute_ff_bytes().decode(errors="ignore"))
        mask[:] = _bits(spelled or [only], self._tokenizer.vocab_size)

    def correct_each(self, matchers: Sequence[LLMatcher], masks: npt.NDArray[np.int32]) -> list[int]:
        """`correct` of several matchers; masks: int32 [N, ceil(vocab_size / 32)]. Returns the rows that have one of
        these tokens, or an end: the others have not failed, and their output is not complete."""
        found = masks.take(self._words, axis=1) & self._any
        if not found.any():
            return []
        rows: list[int] = np.flatnonzero(found.any(axis=1)).tolist()
        for row in rows:
            special, matcher = found[row] & self._special, matchers[row]
            if (
                special.any()
                and not matcher.is_error()
                and ((special & self._inside).any() or not matcher.is_accepting())
            ):
                self._correct(matcher, masks[row])
        return rows

    def _beginnings(self, text: str) -> list[int]:
        """Tokens that are text, and with which this one begins: also the first byte of a character without a token."""
        each = [self._tokenizer.greedy_tokenize(text[:end]) for end in range(1, min(len(text), _LONGEST) + 1)]
        return [ids[0] for end, ids in enumerate(each, 1) if len(ids) == 1 or end == 1]


def _bits(ids: Iterable[int], vocab_size: int) -> npt.NDArray[np.int32]:
    found = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    found[list(ids)] = 1
    return np.packbits(found, bitorder="little").view(np.int32)
