"""The text of one sample while it is generated: what may be shown, and when a stop string ends it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nanoengine.core.text.stops import StopMatch, StopMatcher

if TYPE_CHECKING:
    from nanoengine.core.sampling_params import ResolvedParams
    from nanoengine.core.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Token ids in, text out; a push costs O(new tokens).

    `text` only ever grows, and what was shown once stands in the final text: an unfinished UTF-8 character is held
    back until it is complete or the sample ends, and so is an end of the text that may become a stop string (unless
    stop strings are kept). When the sample ended without a stop, the text equals
    `tokenizer.decode(ids, skip_special_tokens)`.

    Stop strings follow vLLM: they are looked for after every token, over token borders; the one that completes
    first wins, of several the one named first. The text ends before it, or right after it with
    `include_stop_str_in_output`. One that is complete within the text of the first `min_tokens` tokens does not
    count.

    Args:
        tokenizer: what `load_tokenizer` gave.
        stop: stop strings, none empty.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string, and the text of a stop token.
        min_tokens: tokens before which no stop string counts.
    """

    __slots__ = ("_include", "_length", "_matcher", "_min_end", "_min_tokens", "_num_tokens", "_parts", "_shown",
                 "_stream")  # fmt: skip

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._stream = tokenizer.stream(skip_special_tokens)
        self._matcher = StopMatcher(stop) if stop else None
        self._include = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._min_end = 0  # characters that the first min_tokens tokens gave
        self._num_tokens = 0
        self._parts: list[str] = []  # the certain text, joined when asked for
        self._length = 0  # characters in it
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
            match = self._append(self._stream.push(token_id))
            if match is not None:
                return match.stop
        return None

    def finish(self, stop_token: int | None = None) -> str | None:
        """Ends the sample: everything held back is decided and shown. Returns a stop string found only now, or None.

        Args:
            stop_token: the EOS or stop token that ended it, which was not pushed. As in vLLM it has no text, special
                or not, except with `include_stop_str_in_output` (and then a special one only if those are shown).
        """
        rest = ""
        if stop_token is not None:
            self._num_tokens += 1
            rest = self._stream.push(stop_token) if self._include else ""
        match = self._append(rest + self._stream.finish())
        if match is not None:
            return match.stop
        self._shown = self._length
        return None

    def _append(self, new: str) -> StopMatch | None:
        if new:
            self._parts.append(new)
            self._length += len(new)
        if self._matcher is None:
            self._shown = self._length
            return None
        # Pending tokens count for stopping (a newline of a byte-fallback vocabulary ends the sample at once).
        tail = self._stream.tail()
        if self._num_tokens <= self._min_tokens:
            self._min_end = self._length + len(tail)
        match = self._matcher.feed(new, self._min_end)
        if match is None and tail:
            match = self._matcher.peek(tail, self._min_end)
        if match is None:
            self._shown = self._length - (0 if self._include else self._matcher.held)
        else:
            self._parts.append(tail)
            self._shown = match.end if self._include else match.start
        return match
