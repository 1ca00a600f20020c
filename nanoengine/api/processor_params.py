"""What a logits processor takes from a request: its parameters, their columns, and the state of a sample. Imports no
torch, so that plugins are listed quickly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

if TYPE_CHECKING:
    import numpy.typing as npt

    from nanoengine.api.grammars import Constraint, Grammar


class StandardOp(StrEnum):
    """Operations that the core may fuse, no matter which plugin provides their column.

    TEMPERATURE: logits / value; 0 means greedy. TOP_K: keep the k highest; 0 means all. TOP_P: nucleus; 1 means all.
    MIN_P: keep p >= value * max p; 0 means all. BITMASK: only ids whose bit is set: bit i of word w allows id 32 w + i;
    int32 words, ceil(vocabulary / 32) of them; -1 in each allows all. It is supplied by a `HostState` only.
    """

    TEMPERATURE = "temperature"
    TOP_K = "top_k"
    TOP_P = "top_p"
    MIN_P = "min_p"
    BITMASK = "bitmask"


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSpec:
    """One column of per-slot values that a processor reads on the device.

    Attributes:
        dtype: "float32", "int32" or "bool".
        ragged: several values per slot. The device table is then [slots, width]; its width grows when needed.
        width: that many values in each slot; None: one, or with `ragged` any number.
        default: the value without effect. Slots that do not use the processor have it, and ragged rows are padded
            with it.
        op: the standard operation that uses this column, if there is one.
    """

    dtype: str
    ragged: bool = False
    default: float | int | bool = 0
    op: StandardOp | None = None
    width: int | None = None


class ParamsContext(Protocol):
    """What parameters can be checked against when a request is submitted."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def in_process(self) -> bool:
        """Whether logits processors run in this process: not with several ranks."""
        ...

    @property
    def num_tokens(self) -> int:
        """Ids from this one on have no token: a model's vocabulary is often padded to more."""
        ...

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an output (EOS), as the model's folder names them."""
        ...

    @property
    def reasoning(self) -> str | int | None:
        """Engine option `structured_outputs.reasoning`: the token after which constraints begin."""
        ...

    def grammar(self, constraint: Constraint) -> Grammar:
        """The compiled constraint. It is compiled once, which may be slow: call it in `prepare` first.

        Raises `GrammarError` for a constraint that is wrong or not supported, and `UnsupportedError` if there is no
        grammar backend.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without special tokens. Raises `TokenizerMissing` if the model has no tokenizer."""
        ...


class HostState(ABC):
    """What a processor knows on the host about one sample. `ProcessorParams.start` makes it, once.

    The engine may ask for the columns of a draw more than once, and with drafts that are then refused: only `feed`
    (and `columns_together`, for it) advances the state. What a method raises fails that request alone.

    Attributes:
        stop_ids: the request's own stop tokens (`stop_token_ids`). The engine sets it after `start`.
    """

    stop_ids: frozenset[int] = frozenset()

    @abstractmethod
    def feed(self, token_ids: Sequence[int]) -> None:
        """The next tokens of the output, one or more, in order. Each token is fed once."""

    @abstractmethod
    def columns(self, drafts: Sequence[int]) -> Mapping[str, Any]:
        """Values of columns for the next draw, and for the draw behind each of the drafts, if they were accepted.

        For each column that is given: 1 + len(drafts) values; an array [1 + len(drafts), width] for one of fixed width
        or a bit mask; as many sequences for a ragged one. A column that is not given keeps what `pack` returned.
        """

    def forced(self) -> Sequence[int]:
        """Tokens that must come next, each the only one that is possible in its place. Default: none are known."""
        return ()

    @classmethod
    def columns_together(
        cls, states: Sequence[Self], token_ids: Sequence[Sequence[int]], out: Mapping[str, npt.NDArray[Any]]
    ) -> Mapping[int, BaseException] | None:
        """`feed` and `columns(())` of several states in one call, which takes less time, or may use several threads.

        The engine calls it with all states of the class that draw in a step. It must do as the calls one by one, which
        the engine makes if it returns None, having done nothing (the default). A processor with a ragged column has
        none.

        Args:
            token_ids: what each state is fed; nothing where it has had all.
            out: for each of the processor's columns an array [N] or [N, width], to be filled: row i for state i.

        Returns the place of each state that failed -> what it would have raised. What is raised fails all.
        """
        return None


class ProcessorParams:
    """Base class of a processor's parameters: `@dataclass(frozen=True)`, each field with a default without effect.

    The fields become valid keys of `SamplingParams`. The engine checks types against the annotations; the dataclass
    checks ranges in `__post_init__` and raises `ParamsError`.

    Class attributes:
        columns: the device columns that the processor reads, by name.
    """

    columns: ClassVar[Mapping[str, ColumnSpec]] = {}

    def active(self) -> bool:
        """Whether a request with these values uses the processor. Default: if any field differs from its default."""
        return self != type(self)()

    def pack(self, ctx: ParamsContext) -> Mapping[str, Any]:
        """Column values of one request: a scalar, or a sequence for a column with several values; no bit masks.

        Default: the fields of that name.

        Raises `ParamsError` for mistakes that need the context to be seen (a token id outside the vocabulary).
        """
        return {name: getattr(self, name) for name, spec in self.columns.items() if spec.op is not StandardOp.BITMASK}

    def prepare(self, ctx: ParamsContext) -> Callable[[], Any] | None:
        """Slow work that must be done before a request with these values can start. Default: None, nothing is to do.

        The engine calls it when the request is added, and what it returns on a thread of its own, so no step waits. The
        request starts when that has returned; what it raises fails only this request. Equal parameters of several
        requests may be one object: keep the result in it, and return None once it is there.
        """
        return None

    def start(self, prompt_token_ids: Sequence[int], ctx: ParamsContext) -> HostState | None:
        """The state of one sample of a request with this prompt, if its columns depend on the tokens that it gets.

        Default: None, the columns are those of `pack`. An exception raised here fails only that request.
        """
        return None


class Phase(IntEnum):
    """When a processor runs. In a phase, processors run in registration order; top-k, top-p and min-p run first."""

    MASK = 0
    BIAS = 1
    PENALTY = 2
    TEMPERATURE = 3
    TRUNCATE = 4
