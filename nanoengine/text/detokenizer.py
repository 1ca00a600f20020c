"""The text of a sample while it is generated: what can be shown already, and when a stop string ends the sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nanoengine.text.decoding import TokenStream
from nanoengine.text.stops import StopMatch, StopMatcher

if TYPE_CHECKING:
    from nanoengine.params.resolver import ResolvedParams
    from nanoengine.text.tokenizer import Tokenizer


class _Text:
    """A stream of decoded text, and the search for stop strings in it.

    The search includes pending tokens: a newline of a byte-fallback vocabulary ends the sample at once.

    Attributes:
        length: number of characters that are certain.
        tail: the text that would follow if the sample ended here; computed only if there are stop strings.
    """

    __slots__ = ("_matcher", "_min_end", "_stream", "length", "tail")

    def __init__(self, stream: TokenStream, stops: Sequence[str]) -> None:
        self._stream = stream
        self._matcher = StopMatcher(stops) if stops else None
        self._min_end = 0  # a stop string that ends within so many characters does not count
        self.length, self.tail = 0, ""

    @property
    def end(self) -> int:
        return self.length + len(self.tail)

    @property
    def held(self) -> int:
        """The number of last certain characters that may be the beginning of a stop string."""
        return self._matcher.held if self._matcher is not None else 0

    def push(self, token_id: int, early: bool) -> tuple[str, StopMatch | None]:
        """The text that became certain, and the first stop string in it or in the tail. `early`: none counts."""
        stream, matcher = self._stream, self._matcher
        new = stream.push(token_id)
        if matcher is None or early:
            return new, self._feed(new, "" if matcher is None else stream.tail(), early)
        tail = stream.tail()  # the rest is `_feed`, without its call
        self.length, self.tail = self.length + len(new), tail
        match = matcher.feed(new, self._min_end)
        return new, matcher.peek(tail, self._min_end) if tail and match is None else match

    def extend(self, token_ids: Iterable[int]) -> str:
        """The text that became certain, where there are no stop strings."""
        new = self._stream.extend(token_ids)
        self.length += len(new)
        return new

    def finish(self, stop_token: int | None = None, early: bool = False) -> tuple[str, StopMatch | None]:
        """The rest of the text, including that of `stop_token`, and the first stop string in it."""
        new = (self._stream.push(stop_token) if stop_token is not None else "") + self._stream.finish()
        return new, self._feed(new, "", early)

    def rest(self) -> str:
        """The text after the certain text, if a stop string ends the sample here."""
        self.tail = self._stream.finish()
        return self.tail

    def _feed(self, new: str, tail: str, early: bool) -> StopMatch | None:
        self.length, self.tail = self.length + len(new), tail
        if self._matcher is None:
            return None
        if early:
            self._min_end = self.end
        match = self._matcher.feed(new, self._min_end)
        return self._matcher.peek(tail, self._min_end) if match is None and tail else match


class _WithSpecials:
    """The text including special tokens, to find stop strings that contain one although the output skips them.

    A position in it is converted to a position in the output by the number of visible characters after it.
    """

    __slots__ = ("_longest", "_places", "_tokenizer", "text")

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self.text = _Text(tokenizer.stream(skip_special_tokens=False), stops)
        self._longest = max(map(len, stops))
        self._places: list[tuple[int, int]] = []  # start and end of the last special tokens, in characters

    def push(self, token_id: int, early: bool) -> StopMatch | None:
        new, match = self.text.push(token_id, early)
        special = self._tokenizer.special_text(token_id)
        if special is not None and (new + self.text.tail).endswith(special):
            end = self.text.end
            self._places = [place for place in self._places if place[1] > end - 2 * self._longest]
            self._places.append((end - len(special), end))
        return match

    @property
    def held(self) -> int:
        """The number of visible characters at the end that may be the beginning of a stop string."""
        return self.behind(self.text.length - self.text.held) if self.text.held else 0

    def behind(self, place: int) -> int:
        """The number of visible characters after `place`."""
        return self.text.end - place - sum(max(0, end - max(start, place)) for start, end in self._places)


class IncrementalDetokenizer:
    """Turns the token ids of one sample into text. A push costs O(new tokens).

    `text` only grows; text that was shown is never removed. So two things are held back: an incomplete UTF-8 character,
    until it is complete or the sample ends; and an end of the text that may be the beginning of a stop string (unless
    stop strings are kept). If the sample ends without a stop string, the text is
    `tokenizer.decode(ids, skip_special_tokens)`.

    Stop strings are as in vLLM: they are searched after every token, also across tokens. The stop string that is
    complete first ends the sample; if there are several, the first in `stop`. The text ends before it, or directly
    after it with `include_stop_str_in_output`. A stop string that is complete in the text of the first `min_tokens`
    tokens does not count. One that contains a special token is found even if the text leaves special tokens out.

    Args:
        tokenizer: what `load_tokenizer` returned.
        stop: stop strings; none is empty.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string, and the text of a stop token.
        min_tokens: tokens before which no stop string counts.
    """

    __slots__ = ("_include", "_min_tokens", "_num_tokens", "_parts", "_shown", "_specials", "_stops", "_taken", "_text")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        special = [each for each in stop if skip_special_tokens and tokenizer.has_special(each)]
        self._text = _Text(tokenizer.stream(skip_special_tokens), [each for each in stop if each not in special])
        self._specials = _WithSpecials(tokenizer, special) if special else None
        self._stops = tuple(stop)
        self._include = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._parts: list[str] = []  # the certain text that was not taken, joined when it is read
        self._taken = 0  # number of characters before it
        self._shown = 0  # number of characters that can be shown, with those that were taken

    @classmethod
    def from_params(cls, tokenizer: Tokenizer | None, params: ResolvedParams) -> IncrementalDetokenizer | None:
        """A detokenizer for a sample with these parameters; None if it has no text."""
        if tokenizer is None or not params.detokenize:
            return None
        return cls(
            tokenizer,
            stop=params.stop,
            skip_special_tokens=params.skip_special_tokens,
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    @property
    def text(self) -> str:
        """The text that can be shown so far, without what was taken."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0][: self._shown - self._taken] if self._parts else ""

    def take(self) -> str:
        """Returns `text` and forgets it, so the cost does not grow with the sample."""
        text, parts = self.text, self._parts
        if text:
            parts[0] = parts[0][len(text) :]
            self._taken += len(text)
        return text

    @property
    def num_tokens(self) -> int:
        """Number of tokens read. If a stop string was found, the last one is the token that completed it."""
        return self._num_tokens

    def push(self, token_ids: Sequence[int]) -> str | None:
        """Appends tokens. Returns the stop string that ended the sample, or None.

        Tokens after the one that completed a stop string are not read. After a stop string the text is final, and
        `push` and `finish` must not be called again.
        """
        if not self._stops:  # most often: many tokens at once take a fraction of the time
            self._num_tokens += len(token_ids)
            return self._take(self._text.extend(token_ids), None, None)
        for token_id in token_ids:
            self._num_tokens += 1
            early = self._num_tokens <= self._min_tokens
            new, match = self._text.push(token_id, early)
            special = self._specials.push(token_id, early) if self._specials is not None else None
            stop = self._take(new, match, special)
            if stop is not None:
                return stop
        return None

    def read(self, token_ids: Sequence[int], reason: str | None) -> str | None:
        """Appends tokens, and ends the sample if there is a finish_reason; with "stop" the last one is the EOS or stop
        token. Returns the stop string that ended the sample, or None; None for what an "abort" shows at the end."""
        if reason is None:
            return self.push(token_ids)
        by_token = reason == "stop"
        matched = self.push(token_ids[:-1] if by_token else token_ids)
        if matched is None:
            matched = self.finish(token_ids[-1] if by_token else None)
            return None if reason == "abort" else matched  # that it would have ended here is not said
        return matched

    def finish(self, stop_token: int | None = None) -> str | None:
        """Ends the sample and shows the text that was held back. Returns a stop string that is found now, or None.

        Args:
            stop_token: the EOS or stop token that ended the sample and was not pushed. As in vLLM, its text is left
                out, except with `include_stop_str_in_output` (a special token only if special tokens are shown).
        """
        self._num_tokens += stop_token is not None
        early = self._num_tokens <= self._min_tokens
        new, match = self._text.finish(stop_token if self._include else None, early)
        special = self._specials.text.finish(early=early)[1] if self._specials is not None else None
        stop = self._take(new, match, special)
        if stop is None:
            self._shown = self._text.length
        return stop

    def _take(self, new: str, match: StopMatch | None, special: StopMatch | None) -> str | None:
        """Appends certain text; returns the stop string that ends the sample, of those found at this token, or None."""
        if new:
            self._parts.append(new)
        if special is not None and self._is_first(special, match):
            self._end_at_special(special)
            return special.stop
        if match is not None:
            self._parts.append(self._text.tail)
            self._shown = match.end if self._include else match.start
            return match.stop
        held = 0 if self._include else self._text.held
        if self._specials is not None:
            held = max(held, self._specials.held)
        self._shown = max(self._shown, self._text.length - held)
        return None

    def _is_first(self, special: StopMatch, match: StopMatch | None) -> bool:
        if match is None:
            return True
        assert self._specials is not None
        left, others = self._specials.behind(special.end), self._text.end - match.end
        return left > others or (left == others and self._stops.index(special.stop) < self._stops.index(match.stop))

    def _end_at_special(self, special: StopMatch) -> None:
        """Ends the text before the stop string; with `include_stop_str_in_output`, appends the stop string."""
        assert self._specials is not None
        text = "".join(self._parts) + self._text.rest()
        self._specials.text.rest()
        text = text[: len(text) - self._specials.behind(special.start)]
        self._parts = [text + special.stop if self._include else text]
        self._shown = self._taken + len(self._parts[0])
