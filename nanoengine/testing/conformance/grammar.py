"""The conformance kit of grammar backends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nanoengine.api import Constraint, Grammar, GrammarBackend, GrammarContext, GrammarError, Matcher
from nanoengine.api.plugin_calls import name_of
from nanoengine.setup.plugins.choose import check_class
from nanoengine.testing.byte_tokenizer import END, byte_tokenizer
from nanoengine.testing.conformance.failure import ConformanceError, during, require

Example = tuple[Constraint, Sequence[str], Sequence[str]]
_PADDING = 37  # ids of the model without a token
_MOST_FORCED = 8


def check_grammar_backend(
    backend: type[GrammarBackend], *examples: Example, refused: Sequence[Constraint] = (), timeout: float = 60.0
) -> None:
    """Tests a grammar backend with a small byte-level tokenizer.

    Args:
        backend: the class.
        examples: constraints, each with texts that it allows and texts that it does not.
        refused: constraints that `compile` must refuse with `GrammarError`.
        timeout: `GrammarContext.timeout`.

    Raises `ConformanceError` that says what was wrong.
    """
    check_class(backend, GrammarBackend, name_of(backend))
    require(bool(examples), "give at least one example, or nothing is tested")
    tokenizer = byte_tokenizer()
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    ends = frozenset(i for i in [tokenizer.token_to_id(END)] if i is not None)
    ctx = GrammarContext(tokenizer_json=tokenizer.to_str(), vocab_size=size + _PADDING, end_ids=ends, timeout=timeout)
    with during(f"{name_of(backend)}(ctx)"):
        made = backend(ctx)
    try:
        for constraint, good, bad in examples:
            with during(f"compile({constraint})"):
                grammar = made.compile(constraint)
            require(isinstance(grammar, Grammar), f"compile({constraint}) returned {grammar!r}, not a Grammar")
            trial = _Trial(grammar, ctx, size)
            for text in good:
                with during(f"{constraint}, matching {text!r}"):
                    trial.accepts(tokenizer.encode(text, add_special_tokens=False).ids)
            for text in bad:
                with during(f"{constraint}, matching {text!r}"):
                    trial.refuses(tokenizer.encode(text, add_special_tokens=False).ids)
        for constraint in refused:
            _check_refused(made, constraint)
    finally:
        made.close()
    with during("close(), a second time"):
        made.close()


def _check_refused(made: GrammarBackend, constraint: Constraint) -> None:
    try:
        made.compile(constraint)
    except GrammarError as error:
        require(bool(str(error).strip()), f"compile({constraint}) raised a GrammarError without a message")
        return
    except Exception as error:
        raise ConformanceError(f"compile({constraint}) raised {error!r}, expected a GrammarError") from error
    raise ConformanceError(f"compile({constraint}) accepted it, expected a GrammarError")


class _Trial:
    """A grammar, tried with matchers at the beginning."""

    def __init__(self, grammar: Grammar, ctx: GrammarContext, known: int) -> None:
        self._grammar, self._ctx, self._known = grammar, ctx, known
        self._texts = np.ones(ctx.vocab_size, bool)  # ids that are text
        self._texts[[*ctx.end_ids]] = False

    def accepts(self, ids: Sequence[int]) -> None:
        """Each token is in the mask of its position; at the end the output may end."""
        matcher, other, together = (self._grammar.matcher() for _ in range(3))
        first = self._allowed(other)
        for count, token in enumerate(ids):
            allowed = self._check_position(matcher, probe=count in (0, len(ids) // 2, len(ids) - 1))
            require(bool(allowed[token]), f"token {count}, id {token}, is not in the mask")
            require(matcher.consume([token]) == 1, f"consume refused token {count}, id {token}, which is in the mask")
            self._check_advance([other, together], [None, token], [other, matcher])
        require(matcher.is_accepting, "is_accepting is False at the end")
        self._check_position(matcher, probe=True)
        require(np.array_equal(self._allowed(other), first), "one matcher changed the mask of another one")
        matcher.rollback(len(ids))
        require(np.array_equal(self._allowed(matcher), first), "after rollback of all tokens the mask is another one")
        require(matcher.consume(ids) == len(ids), "after rollback the same tokens are refused")

    def refuses(self, ids: Sequence[int]) -> None:
        """Some token is refused, or the output may not end there."""
        matcher = self._grammar.matcher()
        count = matcher.consume(ids)
        require(0 <= count <= len(ids), f"consume of {len(ids)} tokens returned {count}")
        require(count < len(ids) or not matcher.is_accepting, "it is accepted")
        if count < len(ids):
            require(not self._allowed(matcher)[ids[count]], f"consume refused id {ids[count]}, which is in the mask")
            again = self._grammar.matcher()
            again.consume(ids[:count])
            same = np.array_equal(self._allowed(again), self._allowed(matcher))
            require(same, "consume that refuses a token changed the state")
            self._check_advance([self._grammar.matcher(), again], [None, ids[count]], [self._grammar.matcher(), None])

    def _check_position(self, matcher: Matcher, *, probe: bool) -> npt.NDArray[np.bool_]:
        """The ids that the mask allows. `probe`: try each of them."""
        allowed = self._allowed(matcher)
        require(not allowed[self._known :].any(), "the mask allows an id that has no token")
        if probe:
            for token in np.flatnonzero(allowed).tolist():
                taken = matcher.consume([token])
                require(taken == 1, f"the mask allows id {token}, but consume returned {taken}")
                self._allowed(matcher)
                matcher.rollback(taken)
            require(np.array_equal(self._allowed(matcher), allowed), "consume and rollback changed the mask")
        self._check_forced(matcher, allowed)
        return allowed

    def _check_advance(
        self, matchers: Sequence[Matcher], token_ids: Sequence[int | None], want: Sequence[Matcher | None]
    ) -> None:
        """`want`: matchers that are where these will be; None for one that refuses its token."""
        rows = np.full((len(matchers), self._ctx.mask_width), 0x55555555, np.int32)
        advanced, refused = type(matchers[0]).advance(matchers, token_ids, rows), [each is None for each in want]
        failed = [advanced.failed.get(place, "") is None for place in range(len(matchers))]
        require(
            failed == refused and len(advanced.failed) == sum(refused),
            f"advance() by {token_ids}: failed is {advanced.failed}; matchers that refuse their tokens: {refused}",
        )
        for place, (row, other) in enumerate(zip(rows, want, strict=True)):
            if other is None:
                continue
            words = np.empty_like(row)
            other.mask(words)
            require(np.array_equal(row, words), f"advance() by {token_ids}: mask {place} differs from consume and mask")
            complete = place in advanced.complete
            require(complete == other.is_accepting, f"advance() by {token_ids}: complete differs from is_accepting")

    def _check_forced(self, matcher: Matcher, allowed: npt.NDArray[np.bool_]) -> None:
        forced = matcher.forced(_MOST_FORCED, self._ctx.mask_width)
        require(len(forced) <= _MOST_FORCED, f"forced({_MOST_FORCED}) returned {len(forced)} tokens")
        for count, token in enumerate(forced):
            only = np.flatnonzero(self._allowed(matcher)).tolist() == [token]
            require(
                only and not matcher.is_accepting, f"forced returned id {token}, but another one may come next, too"
            )
            require(matcher.consume([token]) == 1, f"consume refused forced token {count}, id {token}")
        matcher.rollback(len(forced))
        require(np.array_equal(self._allowed(matcher), allowed), "forced changed the mask")

    def _allowed(self, matcher: Matcher) -> npt.NDArray[np.bool_]:
        """bool [vocab_size]: the ids that may come next."""
        words = np.full(self._ctx.mask_width, 0x55555555, np.int32)
        matcher.mask(words)
        both = [matcher, self._grammar.matcher()]
        self._check_advance(both, [None, None], both)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
        require(not bits[self._ctx.vocab_size :].any(), "the mask has bits beyond the vocabulary")
        found: npt.NDArray[np.bool_] = bits[: self._ctx.vocab_size] & self._texts
        return found
