"""The text of one sample while it is generated: what may be shown, and when a stop string ends it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nanoengine.text.decoding import TokenStream
from nanoengine.text.stops import StopMatch, StopMatcher

if TYPE_CHECKING:
    from nanoengine.params.sampling_params import ResolvedParams
    from nanoengine.text.tokenizer import Tokenizer


class _Text:
    """One way to decode the sample, and the stop strings that are looked for in it.

    Pending tokens count for stopping: a newline of a byte-fallback vocabulary ends the sample at once.

    Attributes:
        length: characters that are certain. tail: what would follow if the sample ended here; kept where there are
            stop strings.
    """

    __slots__ = ("_matcher", "_min_end", "_stream", "length", "tail")

    def __init__(self, stream: TokenStream, stops: Sequence[str]) -> None:
        self._stream = stream
        self._matcher = StopMatcher(stops) if stops else None
        self._min_end = 0  # characters in which no stop string counts
        self.length, self.tail = 0, ""

    @property
    def end(self) -> int:
        return self.length + len(self.tail)

    @property
    def held(self) -> int:
        """How many of the last certain characters may become a stop string."""
        return self._matcher.held if self._matcher is not None else 0

    def push(self, token_id: int, early: bool) -> tuple[str, StopMatch | None]:
        """The text that became certain, and the first stop string in it or in the tail. `early`: none counts yet."""
        new = self._stream.push(token_id)
        return new, self._feed(new, self._stream.tail() if self._matcher is not None else "", early)

    def finish(self, stop_token: int | None = None, early: bool = False) -> tuple[str, StopMatch | None]:
        """The rest of the text, that of `stop_token` included, and the first stop string in it."""
        new = (self._stream.push(stop_token) if stop_token is not None else "") + self._stream.finish()
        return new, self._feed(new, "", early)

    def rest(self) -> str:
        """The text behind what is certain, where the sample ends here after a stop string."""
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
    """The text with its special tokens written out, for stop strings that hold one where the output leaves them out.

    A place in it is known to the output's text by how many visible characters are behind it.
    """

    __slots__ = ("_longest", "_places", "_tokenizer", "text")

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self.text = _Text(tokenizer.stream(skip_special_tokens=False), stops)
        self._longest = max(map(len, stops))
        self._places: list[tuple[int, int]] = []  # of the last special tokens: start and end, in characters

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
        """How many visible characters at the end may become a stop string."""
        return self.behind(self.text.length - self.text.held) if self.text.held else 0

    def behind(self, place: int) -> int:
        """Visible characters behind it."""
        return self.text.end - place - sum(max(0, end - max(start, place)) for start, end in self._places)


class IncrementalDetokenizer:
    """Token ids in, text out; a push costs O(new tokens).

    `text` only ever grows, and what was shown once is in the final text: an unfinished UTF-8 character is held
    back until it is complete or the sample ends, and so is an end of the text that may become a stop string (unless
    stop strings are kept). When the sample ended without a stop, the text equals
    `tokenizer.decode(ids, skip_special_tokens)`.

    Stop strings follow vLLM: they are looked for after every token, over token borders; the one that completes
    first wins, of several the one named first. The text ends before it, or right after it with
    `include_stop_str_in_output`. One that is complete within the text of the first `min_tokens` tokens does not
    count. One that holds a special token, written out, is found though special tokens are left out of the text.

    Args:
        tokenizer: what `load_tokenizer` gave.
        stop: stop strings, none empty.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string, and the text of a stop token.
        min_tokens: tokens before which no stop string counts.
    """

    __slots__ = ("_include", "_min_tokens", "_num_tokens", "_parts", "_shown", "_specials", "_stops", "_text")

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
        self._parts: list[str] = []  # the certain text, joined when asked for
        self._shown = 0  # characters of it that may be shown

    @classmethod
    def from_params(cls, tokenizer: Tokenizer, params: ResolvedParams) -> IncrementalDetokenizer:
        """As a request's parameters say; the caller sees to `detokenize=False` (then there is no text at all)."""
        return cls(
            tokenizer,
            stop=params.stop,
            skip_special_tokens=params.skip_special_tokens,
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    @property
    def text(self) -> str:
        """All text so far that is safe to show."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0][: self._shown] if self._parts else ""

    @property
    def num_tokens(self) -> int:
        """Tokens taken. After a stop string was found, up to and with the one that completed it."""
        return self._num_tokens

    def push(self, token_ids: Iterable[int]) -> str | None:
        """Appends tokens, in order; returns the stop string that ended the sample, or None.

        Tokens after the one that completed a stop string are not read. After a stop string, the text is final and
        neither `push` nor `finish` is called again.
        """
        for token_id in token_ids:
            self._num_tokens += 1
            early = self._num_tokens <= self._min_tokens
            new, match = self._text.push(token_id, early)
            special = self._specials.push(token_id, early) if self._specials is not None else None
            stop = self._take(new, match, special)
            if stop is not None:
                return stop
        return None

    def finish(self, stop_token: int | None = None) -> str | None:
        """Ends the sample: everything held back is decided and shown. Returns a stop string found only now, or None.

        Args:
            stop_token: the EOS or stop token that ended it, which was not pushed. As in vLLM it has no text, special
                or not, except with `include_stop_str_in_output` (and then a special one only if those are shown).
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
        """Takes certain text in, and what was found at the same token."""
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
        """The text up to the stop string; with `include_stop_str_in_output` the stop string is written out behind."""
        assert self._specials is not None
        text = "".join(self._parts) + self._text.rest()
        self._specials.text.rest()
        text = text[: len(text) - self._specials.behind(special.start)]
        self._parts = [text + special.stop if self._include else text]
        self._shown = len(self._parts[0])
