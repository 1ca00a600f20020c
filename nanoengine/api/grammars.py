"""The interface of grammar backends, which compile constraints on the output and say which tokens may come next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from nanoengine.api.errors import GrammarError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ConstraintKind = Literal["json", "regex", "choice", "grammar", "structural_tag"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """What an output must match. Hashable, and picklable.

    Attributes:
        kind: "json": a JSON schema; "regex": a regular expression for the whole output; "choice": a JSON list of texts,
            of which the output is one; "grammar": a grammar in Lark's or in EBNF (GBNF) notation; "structural_tag":
            JSON of tags in free text.
        text: the constraint itself.
        any_whitespace: JSON may have white space between its tokens.
        whitespace_pattern: a regular expression of the white space there; None: the backend's own.
    """

    kind: ConstraintKind
    text: str
    any_whitespace: bool = True
    whitespace_pattern: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarContext:
    """What a backend compiles for.

    Attributes:
        tokenizer_json: the content of a tokenizer.json, with all added tokens.
        vocab_size: of the model: often more than the tokenizer has. The mask of an id without a token is 0.
        end_ids: ids that end an output. A matcher never sees them.
        timeout: seconds that compiling one constraint may take. A backend that can keep to it should.
    """

    tokenizer_json: str
    vocab_size: int
    end_ids: frozenset[int]
    timeout: float

    @property
    def mask_width(self) -> int:
        """Words of 32 bits in a mask."""
        return -(-self.vocab_size // 32)


@dataclass(frozen=True, slots=True)
class Advanced:
    """What `Matcher.advance` says of matchers, by their places.

    Attributes:
        failed: those that did not take their token, or could not compute their mask -> the error that `consume` or
            `mask` raises; None: the grammar refuses the token. Such a matcher is not used any more.
        complete: those whose output is complete (`Matcher.is_accepting`).
    """

    failed: Mapping[int, GrammarError | None]
    complete: Sequence[int]


class Matcher(ABC):
    """The state of one output in its grammar. One thread at a time uses it."""

    @abstractmethod
    def consume(self, token_ids: Sequence[int]) -> int:
        """Advance over tokens until the grammar refuses one. Returns how many it took; a refusal changes nothing.

        Raises `GrammarError` if what comes behind a token is beyond the backend's limits; then the matcher is not used
        any more.
        """

    @abstractmethod
    def rollback(self, count: int) -> None:
        """Take the last `count` consumed tokens back."""

    @abstractmethod
    def mask(self, out: npt.NDArray[np.int32]) -> None:
        """Write which ids may come next: int32 [ceil(vocab_size / 32)], bit i of word w is id 32 w + i.

        It depends on the consumed tokens alone. It may leave out ids that `consume` takes, such as another spelling of
        a text that must come next. Bits of `end_ids` have no meaning. Raises `GrammarError` if it cannot be computed
        within the backend's limits.
        """

    @classmethod
    def advance(cls, matchers: Sequence[Self], token_ids: Sequence[int | None], out: npt.NDArray[np.int32]) -> Advanced:
        """Several matchers of this class consume a token each, those with None none; then each writes its mask into its
        row of `out`, contiguous int32 [N, W]. Default: one after the other, by `consume` and `mask`."""
        failed, complete = dict[int, GrammarError | None](), list[int]()
        for place, (matcher, token, row) in enumerate(zip(matchers, token_ids, out, strict=True)):
            try:
                if token is not None and matcher.consume((token,)) != 1:
                    failed[place] = None
                    continue
                matcher.mask(row)
                if matcher.is_accepting:
                    complete.append(place)
            except GrammarError as error:
                failed[place] = error
        return Advanced(failed, complete)

    @property
    @abstractmethod
    def is_accepting(self) -> bool:
        """Whether the output so far is complete, so that it may end here."""

    def forced(self, most: int, width: int) -> list[int]:
        """Up to `most` tokens that must come next, each the only one that may. `width`: words of a mask.

        Default: looks at the masks, and takes the tokens back.
        """
        import numpy as np  # listing plugins needs none

        found: list[int] = []
        out = np.empty(width, np.int32)
        while len(found) < most and not self.is_accepting:
            self.mask(out)
            only = only_id(out)
            if only is None or self.consume([only]) != 1:
                break
            found.append(only)
        self.rollback(len(found))
        return found


class Grammar(ABC):
    """A compiled constraint. Several threads may use it."""

    @abstractmethod
    def matcher(self) -> Matcher:
        """A matcher at the beginning. Quick: it is called in a step."""


class GrammarBackend(ABC):
    """Compiles constraints for one tokenizer. Several threads may use it."""

    @abstractmethod
    def __init__(self, ctx: GrammarContext) -> None:
        """Reads the tokenizer. May take seconds: it is called on a worker thread, with the first constraint.

        Raises `GrammarError` if this kind of tokenizer is not supported.
        """

    @abstractmethod
    def compile(self, constraint: Constraint) -> Grammar:
        """May be slow: it is called on a worker thread.

        Raises `GrammarError` for a constraint that is wrong, or has something that the backend does not support, which
        the message names: a constraint is never weakened.
        """

    def close(self) -> None:  # noqa: B027 - most backends have nothing to close
        """End processes, give memory back. Idempotent."""


def only_id(mask: npt.NDArray[np.int32]) -> int | None:
    """The only id in a mask; None if there is none, or more than one."""
    import numpy as np

    if np.count_nonzero(mask) != 1:
        return None
    at = int(mask.nonzero()[0][0])
    word = int(mask[at]) & 0xFFFFFFFF
    return None if word & (word - 1) else at * 32 + word.bit_length() - 1
