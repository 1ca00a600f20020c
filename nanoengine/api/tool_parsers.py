"""The interface of tool parsers: they find the calls of tools in a model's text while it comes. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Content:
    """The next piece of the answer's text. Not empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The next piece of the reasoning's text. Not empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegin:
    """A call begins. index: number of the call in its sample, from 0. name: of the function, as the model wrote it."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next piece of a call's arguments: the pieces of one call, joined, are the JSON text of an object.

    Only where a sample ends within its call, or the model's arguments are malformed, they are the beginning of one.
    """

    index: int
    text: str


ParserEvent = Content | Reasoning | ToolCallBegin | ToolCallArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: of the function. parameters: JSON schema of its arguments, an object; empty: any object.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


class ToolParser(ABC):
    """Finds the calls of tools in the text of one sample. One object for each sample, on one thread.

    The events must not depend on how the text is cut into pieces, except for how the texts of events are cut. No text
    is lost: what is neither a call nor its format comes as `Content`, before, between and behind calls. A call that is
    malformed comes as `Content` too: as a whole, or, if it was reported already, from the first wrong character on.
    What was reported is never taken back. The caller leaves out white space around calls.

    Class attributes:
        special_tokens: texts that the parser looks for and that may be special tokens: the caller's text has them.
        reads_reasoning: the parser separates the reasoning itself (`Reasoning`), so it gets the text from the
            beginning. Default: it gets what follows the reasoning.
    """

    special_tokens: ClassVar[tuple[str, ...]] = ()
    reads_reasoning: ClassVar[bool] = False

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        """`tools`: those of the request. A name that is not among them is reported as any other."""
        self.tools = tuple(tools)

    @abstractmethod
    def feed(self, text: str) -> list[ParserEvent]:
        """The events that the next piece of text makes certain."""

    @abstractmethod
    def finish(self) -> list[ParserEvent]:
        """The rest of the events. The text has ended, maybe within a call (max_tokens)."""

    @classmethod
    def matches(cls, template: str) -> bool:
        """Whether the models of this chat template write calls in this form, so that "auto" may choose the parser."""
        return False

    @classmethod
    def constraint(cls, tools: Sequence[Tool], *, required: bool, parallel: bool) -> Mapping[str, Any] | None:
        """What `structured_outputs` makes the model write calls of these tools that this parser reads.

        Args:
            tools: at least one; where the request names a function, that one alone.
            required: the output begins with a call. If not, it is free text in which calls may begin.
            parallel: several calls may come; if not, at most one.

        Returns a value of `structured_outputs`, as `{"json": schema}` or `{"structural_tag": {...}}`; None if the form
        cannot be constrained in this way.
        """
        return None
