"""structured_outputs: parameters, and what a sample's grammar allows after its tokens. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from nanoengine.api import (
    ColumnSpec,
    Grammar,
    HostState,
    Matcher,
    ParamsContext,
    ParamsError,
    ProcessorParams,
    StandardOp,
    TokenizerMissing,
)
from nanoengine.api.errors import RequestError
from nanoengine.api.grammars import only_id
from nanoengine.api.structured_outputs import StructuredOutputsParams

_MOST_FORCED = 16  # tokens that are looked for at once
Mask = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class GrammarParams(ProcessorParams):
    """structured_outputs: what the output must match. At its end only the model's end tokens are allowed."""

    structured_outputs: StructuredOutputsParams | None = None

    columns: ClassVar[Mapping[str, ColumnSpec]] = {
        "allowed": ColumnSpec(dtype="int32", default=-1, op=StandardOp.BITMASK)
    }
    _grammar: ClassVar[Grammar | None] = None  # an instance's own, once it is prepared

    def pack(self, ctx: ParamsContext) -> Mapping[str, Any]:
        if not ctx.end_ids:
            raise ParamsError(
                "structured_outputs: this model has no end token, so an output could not end: give it an eos_token_id "
                "in generation_config.json"
            )
        _need_tokenizer(ctx)
        self._reasoning(ctx)  # its check takes a while the first time: not in a step
        return super().pack(ctx)

    def prepare(self, ctx: ParamsContext) -> Callable[[], Any] | None:
        if self._grammar is not None:
            return None
        given = self.structured_outputs
        assert given is not None
        constraint = given.constraint()
        return lambda: object.__setattr__(self, "_grammar", ctx.grammar(constraint))

    def start(self, prompt_token_ids: Sequence[int], ctx: ParamsContext) -> HostState:
        given = self.structured_outputs
        assert given is not None
        grammar = self._grammar or ctx.grammar(given.constraint())
        token = self._reasoning(ctx)
        begun = token is None or _ended(prompt_token_ids, token, self._opening(ctx), ctx.end_ids)
        return GrammarState(grammar.matcher(), ctx, None if begun else token)

    def _reasoning(self, ctx: ParamsContext) -> int | None:
        """The id of the token after which the grammar begins."""
        given = self.structured_outputs
        wanted = given.reasoning if given is not None and given.reasoning is not None else ctx.reasoning
        if wanted is None:
            return None
        ids = [wanted] if isinstance(wanted, int) else ctx.encode(wanted)
        if len(ids) != 1:
            raise ParamsError(
                f"structured_outputs.reasoning must be one token of the model, and {wanted!r} is {len(ids)}: {ids}"
            )
        if not 0 <= ids[0] < min(ctx.num_tokens, ctx.vocab_size):
            raise ParamsError(f"structured_outputs.reasoning: no such token id: {ids[0]}")
        if ids[0] in ctx.end_ids:
            raise ParamsError(
                f"structured_outputs.reasoning: {wanted!r} ends the output, so the constraint would not begin"
            )
        return ids[0]

    def _opening(self, ctx: ParamsContext) -> int | None:
        """The id of "<think>" for "</think>", if it is one token: a prompt that ends inside of it has not closed it."""
        given = self.structured_outputs
        wanted = given.reasoning if given is not None and given.reasoning is not None else ctx.reasoning
        if not isinstance(wanted, str) or "/" not in wanted:
            return None
        ids = ctx.encode(wanted.replace("/", "", 1))
        return ids[0] if len(ids) == 1 else None


def _need_tokenizer(ctx: ParamsContext) -> None:
    try:
        ctx.encode("a")
    except TokenizerMissing:
        raise TokenizerMissing(
            "structured_outputs needs the texts of the tokens, and this engine has no tokenizer: give a model folder "
            "with tokenizer.json, without skip_tokenizer_init"
        ) from None


def _ended(prompt: Sequence[int], token: int, opening: int | None, end_ids: Collection[int]) -> bool:
    """Whether the prompt's last turn has the end of its reasoning: what begins after the last end token."""
    for each in reversed(prompt):
        if each == token:
            return True
        if each == opening or each in end_ids:
            return False
    return False


class GrammarState(HostState):
    """One sample's matcher. Before the end of its reasoning all tokens are allowed but those that end the output."""

    def __init__(self, matcher: Matcher, ctx: ParamsContext, reasoning: int | None) -> None:
        """`reasoning`: the token after which the grammar begins; None: it has begun."""
        self._matcher, self._reasoning, self._ended = matcher, reasoning, False
        self._ends, self._width = ctx.end_ids, -(-ctx.vocab_size // 32)
        self._end_bits = [(end // 32, np.uint32(1 << end % 32)) for end in ctx.end_ids]
        self._num_ids = 0 if reasoning is None else min(ctx.num_tokens, ctx.vocab_size)
        self._num_fed = self._consumed = 0  # tokens of the output; some that the matcher has consumed since
        self._next: tuple[Mask, int] | None = None  # masks, and the row behind what was fed; None: not computed yet

    def feed(self, token_ids: Sequence[int]) -> None:
        self._next = None
        if self._in_grammar and self._ends.isdisjoint(token_ids):  # most often
            taken = self._matcher.consume(token_ids)
            self._num_fed, token_ids = self._num_fed + taken, token_ids[taken:]
        for token in token_ids:
            if not self._take(token):
                raise self._refusal(token)
            self._num_fed += 1

    def columns(self, drafts: Sequence[int]) -> Mapping[str, Any]:
        if not drafts:  # most often
            return {"allowed": self._mask_of_next()[None].view(np.int32)}
        out = np.zeros((1 + len(drafts), self._width), np.uint32)
        out[0] = self._mask_of_next()
        before = self._reasoning, self._ended, self._consumed
        try:
            for i, draft in enumerate(drafts):
                if not out[i, draft // 32] >> draft % 32 & 1 or not self._take(draft):
                    out[i + 1 :] = out[0]  # of draws that cannot count
                    break
                self._mask(out[i + 1])
        finally:
            self._matcher.rollback(self._consumed - before[2])
            self._reasoning, self._ended, self._consumed = before
        return {"allowed": out.view(np.int32)}

    def forced(self) -> Sequence[int]:
        mask = self._mask_of_next()
        if not self._in_grammar or only_id(mask.view(np.int32)) is None:
            return ()
        return self._matcher.forced(_MOST_FORCED, self._width)

    def _take(self, token: int) -> bool:
        """Advance over a token. Returns whether it is allowed."""
        if self._reasoning is not None:
            self._reasoning = None if token == self._reasoning else self._reasoning
            return True
        if token in self._ends:
            self._ended = self._ended or self._matcher.is_accepting
            return self._ended
        if not self._ended and self._matcher.consume([token]) == 1:
            self._consumed += 1
            return True
        self._ended = self._ended or (token in self.stop_ids and self._matcher.is_accepting)
        return self._ended and token in self.stop_ids

    @classmethod
    def columns_together(
        cls, states: Sequence[Self], token_ids: Sequence[Sequence[int]], out: Mapping[str, npt.NDArray[Any]]
    ) -> Mapping[int, BaseException] | None:
        """All matchers advance in one call."""
        masks, failed = out["allowed"].view(np.uint32), dict[int, BaseException]()
        inside, tokens, outside = cls._fed(states, token_ids, failed)
        ending = cls._advance(states, inside, tokens, masks, failed) if inside else []
        for i in outside:
            states[i]._mask_outside(masks[i])
            if states[i]._ended:
                ending.append(i)
        for i, state in enumerate(states):
            state._next = masks, i
        for word, bit in states[0]._end_bits:
            masks[:, word] &= ~bit
            if ending:
                masks[ending, word] |= bit
        for i in ending:
            states[i]._set_stops(masks[i])
        return failed

    @classmethod
    def _fed(
        cls, states: Sequence[Self], token_ids: Sequence[Sequence[int]], failed: dict[int, BaseException]
    ) -> tuple[list[int], list[int | None], list[int]]:
        """Feeds the states, but for tokens that matchers are to consume. Returns the places where matchers say what may
        come next, these tokens, and the other places. Those that fail are added to `failed`."""
        inside, tokens, outside = list[int](), list[int | None](), list[int]()
        for i, (state, new) in enumerate(zip(states, token_ids, strict=True)):
            if len(new) == 1 and state._reasoning is None and not state._ended:  # most often
                token = new[0]
                if token not in state._ends and token not in state.stop_ids:
                    state._num_fed += 1
                    inside.append(i)
                    tokens.append(token)
                    continue
            try:
                if new:
                    state.feed(new)
            except RequestError as failure:
                failed[i] = failure
                continue
            if state._in_grammar:
                inside.append(i)
                tokens.append(None)
            else:
                outside.append(i)
        return inside, tokens, outside

    @classmethod
    def _advance(
        cls,
        states: Sequence[Self],
        inside: Sequence[int],
        tokens: Sequence[int | None],
        masks: Mask,
        failed: dict[int, BaseException],
    ) -> list[int]:
        """The matchers of the states at these places consume a token each, where it is not None, and write their masks.
        Returns the places where the output may end. Those that fail are added to `failed`."""
        matchers, every = [states[i]._matcher for i in inside], len(inside) == len(states)
        if len(kinds := {*map(type, matchers)}) > 1:  # a backend may have several classes of matchers
            ending = list[int]()
            for kind in kinds:
                own = [at for at, matcher in enumerate(matchers) if type(matcher) is kind]
                ending += cls._advance(states, [inside[at] for at in own], [tokens[at] for at in own], masks, failed)
            return ending
        rows = masks if every else np.empty((len(inside), masks.shape[1]), np.uint32)
        found = type(matchers[0]).advance(matchers, tokens, rows.view(np.int32))
        for at, error in found.failed.items():
            state, token = states[inside[at]], tokens[at]
            state._num_fed -= token is not None
            failed[inside[at]] = error or state._refusal(token)
        if not every:
            masks[inside] = rows
        return [inside[at] for at in found.complete]

    def _refusal(self, token: int | None) -> RequestError:
        text = f"token {self._num_fed} of the output, id {token}, is not allowed by the grammar"
        return RequestError("grammar_failed", text)

    @property
    def _in_grammar(self) -> bool:
        """Whether its matcher says what may come next."""
        return self._reasoning is None and not self._ended

    def _mask_of_next(self) -> Mask:
        if self._next is None:
            masks = np.empty((1, self._width), np.uint32)
            self._mask(masks[0])
            self._next = masks, 0
        masks, row = self._next
        mask: Mask = masks[row]
        return mask

    def _mask(self, row: Mask) -> None:
        """Write what may come next."""
        if self._in_grammar:
            self._matcher.mask(row.view(np.int32))
        else:
            self._mask_outside(row)
        self._set_ends(row)

    def _mask_outside(self, row: Mask) -> None:
        """Before the end of the reasoning each token, behind the end of the output none."""
        row.fill(0)
        if self._reasoning is not None:
            row[: self._num_ids // 32] = 0xFFFFFFFF
            if self._num_ids % 32:
                row[self._num_ids // 32] = (1 << self._num_ids % 32) - 1

    @property
    def _may_end(self) -> bool:
        return self._ended or (self._reasoning is None and self._matcher.is_accepting)

    def _set_ends(self, row: Mask) -> None:
        may_end = self._may_end
        for word, bit in self._end_bits:
            row[word] = row[word] | bit if may_end else row[word] & ~bit
        if may_end:
            self._set_stops(row)

    def _set_stops(self, row: Mask) -> None:
        for stop in self.stop_ids:
            row[stop // 32] |= np.uint32(1 << stop % 32)
