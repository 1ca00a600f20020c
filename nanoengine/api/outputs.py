"""What a user gets of a request: its text, tokens, log-probs and times so far."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any

from nanoengine.api.deltas import FinishReason
from nanoengine.api.errors import RequestError

_ITEMS, _CHARACTERS = 8, 400  # most that the `repr` of an output shows of a list and of a text


class ShortRepr:
    """Base of a dataclass with a `repr` to be read: long texts and lists are cut, fields with their defaults left out.

    The fields have the whole values.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        cut = reprlib.Repr()
        cut.maxtuple = cut.maxlist = cut.maxdict = _ITEMS
        cut.maxstring, cut.maxother = _CHARACTERS, 10 * _CHARACTERS
        given = ((f.name, getattr(self, f.name)) for f in fields(self) if not _is_default(self, f))  # type: ignore[arg-type]
        shown = (
            f"{name}={cut.repr(value) if not hasattr(value, 'shape') else f'<array {value.shape}>'}"
            for name, value in given
        )
        return f"{type(self).__name__}({', '.join(shown)})"


def _is_default(output: object, field_: Field[Any]) -> bool:
    value = getattr(output, field_.name)
    return value is field_.default or (isinstance(value, int) and value == field_.default)


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was, under the raw logits.

    Attributes:
        logprob: natural logarithm of its probability.
        rank: 1 for the likeliest token.
        decoded_token: the token's own text.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RequestMetrics(ShortRepr):
    """Times of a request, in seconds on the monotonic clock; None until they happen.

    Attributes:
        arrival: when the request was added.
        first_scheduled: when its first step was scheduled.
        first_token: when its first token was there.
        finished: when its last sample ended.
        num_generated: tokens of all samples, without those that they began with.
        longest: tokens of the sample that has the most.
    """

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_generated: int = 0
    longest: int = 0

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def itl(self) -> float | None:
        """Mean seconds between the tokens of the longest sample; None until the end, and if it has one token."""
        if self.first_token is None or self.finished is None or self.longest < 2:
            return None
        return (self.finished - self.first_token) / (self.longest - 1)


class _CopiedWhenRead:
    """Base of a frozen dataclass with fields that are copied when first read, as most never are: `copy_when_read`."""

    __slots__ = ("_growing",)
    _growing: dict[str, tuple[list[Any], int]]  # field -> the list to copy, and how many of its entries

    if not TYPE_CHECKING:  # a type checker must see no names but the fields

        def __getattr__(self, name: str) -> Any:
            """Python calls this for a name that it does not find, such as a slot without a value."""
            if name == "_growing" or name not in getattr(self, "_growing", ()):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            entries, count = self._growing[name]
            value = tuple(entries[:count])
            object.__setattr__(self, name, value)
            return value


def copy_when_read(output: _CopiedWhenRead, fields: Mapping[str, list[Any]]) -> None:
    """Let each field be the tuple of its list's present entries, copied when the field is first read.

    Until then more entries may be appended; those that are there must stay.
    """
    growing = {}
    for name, entries in fields.items():
        object.__delattr__(output, name)
        growing[name] = entries, len(entries)
    object.__setattr__(output, "_growing", growing)


def mutable_twin(frozen: type[Any]) -> type[Any]:
    """A class with the fields of a frozen dataclass with slots that is not frozen.

    What it makes becomes frozen when `frozen` is assigned to its `__class__`. That takes less than half of the time of
    `frozen`'s own constructor, which sets each field past the lock: for an output of each token of many streams.
    """
    named = [(f.name, f.type, field() if f.default is MISSING else field(default=f.default)) for f in fields(frozen)]
    return make_dataclass(frozen.__name__, named, bases=frozen.__bases__, slots=True, kw_only=True)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CompletionOutput(_CopiedWhenRead, ShortRepr):
    """One sample of a request.

    Attributes:
        index: the number of the sample, from 0 to n - 1.
        text: all so far; the first `num_given_chars` characters are of the tokens that the request began with
            (`generated_token_ids`).
        token_ids: all so far; the first `num_given_tokens` are those that the request began with.
        finish_reason: "stop", "length" or "abort"; None while it runs.
        stop_reason: the stop string or stop token id that ended it; None for EOS.
        cumulative_logprob: sum of the log-probs of the tokens that were drawn; None if none were requested.
        logprobs: for each token, token id -> `Logprob` of it and of the likeliest ones; None for a given token.
        num_given_tokens: how many of `token_ids` were given with the request.
        num_given_chars: how many characters of `text` were given with the request.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    num_given_tokens: int = 0
    num_given_chars: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RequestOutput(ShortRepr):
    """What a request has so far: cumulative, not a delta. If it was refused or failed: `error`, and no `outputs`.

    Attributes:
        request_id: the request's id.
        prompt: its text; None if it was given as token ids.
        prompt_token_ids: the tokens of the prompt.
        outputs: the samples, `n` of them.
        finished: whether all samples have ended.
        metrics: its times.
        prompt_logprobs: for each token of the prompt, token id -> `Logprob`; None for the first one.
        num_cached_tokens: tokens of the prompt that the prefix cache had.
        seed: that of the parameters, or else one that the engine made. None if the request was refused.
        error: why it was refused or failed; its `__cause__` is what a model or plugin raised.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    num_cached_tokens: int = 0
    seed: int | None = None
    error: RequestError | None = None
