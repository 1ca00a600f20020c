"""Parameters of the built-in processors: names, defaults and meaning as in vLLM. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nanoengine.api import ColumnSpec, ParamsContext, ParamsError, ProcessorParams, StandardOp

_GREEDY_BELOW = 1e-5
"""A temperature below this is greedy, as in vLLM: logits divided by it would not fit in float32."""
_TOO_LARGE = 1e30
"""Values of columns must be below this, so that in float32 they are not infinite and their inverse is not 0."""


@dataclass(frozen=True)
class TemperatureParams(ProcessorParams):
    """temperature: 0 takes the likeliest token; higher is more random."""

    temperature: float = 1.0

    columns: ClassVar[Mapping[str, ColumnSpec]] = {
        "temperature": ColumnSpec(dtype="float32", default=1.0, op=StandardOp.TEMPERATURE)
    }

    def __post_init__(self) -> None:
        ok = 0 <= self.temperature < _TOO_LARGE
        _require(ok, "temperature", self.temperature, "a number from 0 (greedy) up, below 1e30")

    def pack(self, ctx: ParamsContext) -> Mapping[str, Any]:
        return {"temperature": 0.0 if self.temperature < _GREEDY_BELOW else self.temperature}


@dataclass(frozen=True)
class TopKParams(ProcessorParams):
    """top_k: only the k likeliest tokens; 0 or -1: all."""

    top_k: int = 0

    columns: ClassVar[Mapping[str, ColumnSpec]] = {"top_k": ColumnSpec(dtype="int32", default=0, op=StandardOp.TOP_K)}

    def __post_init__(self) -> None:
        _require(self.top_k >= -1, "top_k", self.top_k, "at least 1, or 0 or -1 for all tokens")

    def active(self) -> bool:
        return self.top_k > 0

    def pack(self, ctx: ParamsContext) -> Mapping[str, Any]:
        return {"top_k": self.top_k if 0 < self.top_k < ctx.vocab_size else 0}


@dataclass(frozen=True)
class TopPParams(ProcessorParams):
    """top_p: the likeliest tokens whose probabilities add up to this value, with the one that reaches it; 1: all."""

    top_p: float = 1.0

    columns: ClassVar[Mapping[str, ColumnSpec]] = {
        "top_p": ColumnSpec(dtype="float32", default=1.0, op=StandardOp.TOP_P)
    }

    def __post_init__(self) -> None:
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")


@dataclass(frozen=True)
class MinPParams(ProcessorParams):
    """min_p: only tokens with at least this share of the highest probability; 0: all."""

    min_p: float = 0.0

    columns: ClassVar[Mapping[str, ColumnSpec]] = {
        "min_p": ColumnSpec(dtype="float32", default=0.0, op=StandardOp.MIN_P)
    }

    def __post_init__(self) -> None:
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")


@dataclass(frozen=True)
class PenaltyParams(ProcessorParams):
    """Penalties on tokens that occurred before.

    repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in the prompt or output.
    presence_penalty: subtracted from the logits of tokens in the output. frequency_penalty: subtracted from
    the logits of tokens in the output, once for each occurrence.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    columns: ClassVar[Mapping[str, ColumnSpec]] = {
        "repetition_penalty": ColumnSpec(dtype="float32", default=1.0),
        "presence_penalty": ColumnSpec(dtype="float32", default=0.0),
        "frequency_penalty": ColumnSpec(dtype="float32", default=0.0),
    }

    def __post_init__(self) -> None:
        repetition, rule = self.repetition_penalty, "above 0 (1 changes nothing), from 1e-30 to 1e30"
        _require(1 / _TOO_LARGE < repetition < _TOO_LARGE, "repetition_penalty", repetition, rule)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2 <= value <= 2, name, value, "from -2 to 2")


@dataclass(frozen=True)
class LogitBiasParams(ProcessorParams):
    """logit_bias: {token id: number that is added to its logit}; -inf removes the token."""

    logit_bias: Mapping[int, float] | None = None

    columns: ClassVar[Mapping[str, ColumnSpec]] = {
        "ids": ColumnSpec(dtype="int32", ragged=True),
        "bias": ColumnSpec(dtype="float32", ragged=True),
    }

    def __post_init__(self) -> None:
        for token_id, bias in (self.logit_bias or {}).items():
            _require(bias < _TOO_LARGE, f"logit_bias[{token_id}]", bias, "a number below infinity (1e30)")

    def active(self) -> bool:
        return bool(self.logit_bias)

    def pack(self, ctx: ParamsContext) -> Mapping[str, Any]:
        bias = self.logit_bias or {}
        _check_ids("logit_bias", bias, ctx)
        return {"ids": list(bias), "bias": list(bias.values())}


@dataclass(frozen=True)
class AllowedTokenIdsParams(ProcessorParams):
    """allowed_token_ids: no other tokens are drawn."""

    allowed_token_ids: tuple[int, ...] | None = None

    columns: ClassVar[Mapping[str, ColumnSpec]] = {"ids": ColumnSpec(dtype="int32", ragged=True)}

    def __post_init__(self) -> None:
        allowed = self.allowed_token_ids
        _require(allowed is None or len(allowed) > 0, "allowed_token_ids", allowed, "a list with at least one id")

    def pack(self, ctx: ParamsContext) -> Mapping[str, Any]:
        allowed = self.allowed_token_ids or ()
        _check_ids("allowed_token_ids", allowed, ctx)
        return {"ids": sorted(set(allowed))}


@dataclass(frozen=True)
class BadWordsParams(ProcessorParams):
    """bad_words: words that do not appear in the output: a token that would complete one is not drawn.

    A word is found in each form that the tokenizer gives it: with and without a space before it, at the start of a text
    and inside it, with any number of tokens. Other ways to split its letters into tokens are not found.
    """

    bad_words: tuple[str, ...] | None = None

    # The sequences of a row follow each other. The columns are: the tokens; for each token, how many tokens of its
    # sequence come after it; and the number of its sequence.
    columns: ClassVar[Mapping[str, ColumnSpec]] = {
        "tokens": ColumnSpec(dtype="int32", ragged=True),
        "following": ColumnSpec(dtype="int32", ragged=True),
        "sequence": ColumnSpec(dtype="int32", ragged=True),
    }

    def __post_init__(self) -> None:
        for word in self.bad_words or ():
            _require(bool(word.strip()), "bad_words", word, "words that are not blank")

    def active(self) -> bool:
        return bool(self.bad_words)

    def pack(self, ctx: ParamsContext) -> Mapping[str, Any]:
        words = dict.fromkeys(self.bad_words or ())
        sequences = list(dict.fromkeys(tuple(ids) for word in words for ids in _spellings(word, ctx)))
        _check_ids("bad_words", (token for ids in sequences for token in ids), ctx)
        return {
            "tokens": [token for ids in sequences for token in ids],
            "following": [len(ids) - 1 - i for ids in sequences for i in range(len(ids))],
            "sequence": [number for number, ids in enumerate(sequences) for _ in ids],
        }


def _spellings(word: str, ctx: ParamsContext) -> list[list[int]]:
    """Token sequences of a bad word, without those that end with another of them: the shorter one removes both."""
    bare = word.lstrip()
    texts = (bare, f" {bare}")
    found = [ids for text in texts for ids in (ctx.encode(text), _inside(text, ctx)) if ids]
    if not found:
        raise ParamsError(f"bad_words: the tokenizer makes no tokens of {word!r}")
    different = list(dict.fromkeys(map(tuple, found)))
    return [list(ids) for ids in different if not any(ids != end and ids[-len(end) :] == end for end in different)]


def _inside(text: str, ctx: ParamsContext) -> list[int]:
    """Tokens of `text` after another character, where the tokenizer adds no space; [] if they cannot be separated."""
    for before in "\n1(":
        try:
            ids, first = ctx.encode(before + text), ctx.encode(before)
        except ParamsError:  # some tokenizers have no token for the character
            continue
        if ids[: len(first)] == first:
            return ids[len(first) :]
    return []


def _require(ok: bool, name: str, value: Any, rule: str) -> None:
    if not ok:
        raise ParamsError(f"{name} must be {rule}, not {value!r}")


def _check_ids(name: str, ids: Iterable[int], ctx: ParamsContext) -> None:
    outside = sorted({i for i in ids if not 0 <= i < ctx.vocab_size})
    if outside:
        shown = ", ".join(map(str, outside[:8])) + (", ..." if len(outside) > 8 else "")
        raise ParamsError(f"{name}: no such token id: {shown}; this model's ids are 0 to {ctx.vocab_size - 1}")
