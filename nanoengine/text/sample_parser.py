"""Separates the text of a sample into reasoning, content and calls of tools, while it comes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from nanoengine.api.errors import ConfigError, nearest
from nanoengine.api.plugin_calls import name_of, plugin_call
from nanoengine.api.tool_parsers import Content, ParserEvent, Reasoning, ToolCallBegin, ToolParser
from nanoengine.text.markers import Marker, Without


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The texts before and behind a model's reasoning."""

    begin: str
    end: str

    def opened(self, prompt: str, *, continued: bool = False) -> bool:
        """Whether the output goes on with reasoning that the prompt has begun.

        Args:
            prompt: its text, with special tokens.
            continued: the output continues the last message. If not, only a tag at the prompt's end counts, as a
                template writes it: messages may contain one.
        """
        return prompt.rfind(self.begin) > prompt.rfind(self.end) if continued else prompt.rstrip().endswith(self.begin)


REASONING_TAGS: Mapping[str, ReasoningTags] = {
    "think": ReasoningTags("<think>", "</think>"),
    "mistral": ReasoningTags("[THINK]", "[/THINK]"),
    "seed": ReasoningTags("<seed:think>", "</seed:think>"),
}


def reasoning_tags(name: str | None, template: str) -> ReasoningTags | None:
    """The tags of a model's reasoning.

    Args:
        name: a key of `REASONING_TAGS`; two texts with a space between them, as "<think> </think>"; "auto": those that
            the chat template has, if any; None: the reasoning is not separated.

    Raises `ConfigError` for another name.
    """
    if name is None:
        return None
    if name == "auto":
        found = (tags for tags in REASONING_TAGS.values() if tags.begin in template or tags.end in template)
        return next(found, None)
    if len(name.split()) == 2:
        return ReasoningTags(*name.split())
    if name not in REASONING_TAGS:
        valid = nearest(name, ["auto", *REASONING_TAGS])
        raise ConfigError(f"reasoning_parser {name!r}: {valid}; or give the two tags: '<think> </think>'")
    return REASONING_TAGS[name]


class SampleParser:
    """Makes events of the text of one sample. The tool parser reads only what follows the reasoning.

    Args:
        tags: those of the reasoning; None: it is not separated.
        opened: the prompt has begun the reasoning already (`ReasoningTags.opened`).
        tool_parser: None: calls are not looked for.
        parallel: several calls may come. If not, nothing is reported from the second one on.
        hidden: texts of special tokens that are left out. Those that the parsers look for are left out of the content.

    Attributes:
        ended: a second call began that is not wanted, so the sample can end.
    """

    def __init__(
        self,
        *,
        tags: ReasoningTags | None = None,
        opened: bool = False,
        tool_parser: ToolParser | None = None,
        parallel: bool = True,
        hidden: Collection[str] = (),
    ) -> None:
        self.ended = False
        self._parser, self._parallel = tool_parser, parallel
        tags = None if tool_parser is not None and tool_parser.reads_reasoning else tags
        self._reasoning = _Reasoning(tags, opened) if tags is not None else None
        needed = {*(tool_parser.special_tokens if tool_parser else ()), *((tags.begin, tags.end) if tags else ())}
        self._input = Without([text for text in hidden if text not in needed])
        self._content = Without([text for text in hidden if text in needed])

    @property
    def reasons(self) -> bool:
        """Whether the next piece of text belongs to the reasoning."""
        return self._reasoning is not None and self._reasoning.begun and not self._reasoning.over

    @property
    def may_reason(self) -> bool:
        """Whether reasoning may still come, or goes on."""
        return self._reasoning is not None and not self._reasoning.over

    def feed(self, text: str) -> list[ParserEvent]:
        """The events that the next piece of text makes certain. Raises `PluginError` if the tool parser fails."""
        return [] if self.ended else self._read(self._input.feed(text))

    def _read(self, text: str) -> list[ParserEvent]:
        events: list[ParserEvent] = []
        if self._reasoning is not None:
            thought, text = self._reasoning.feed(text)
            events += [Reasoning(thought)] if thought else []
        return [*events, *self._after(text)] if text else events

    def finish(self) -> list[ParserEvent]:
        """The rest of the events, when the text has ended."""
        if self.ended:
            return []
        events = self._read(self._input.flush())
        if self._reasoning is not None:
            thought, text = self._reasoning.finish()
            events += [Reasoning(thought)] if thought else []
            events += self._after(text) if text else []
        events += self._after(None)
        rest = "" if self.ended else self._content.flush()
        return [*events, Content(rest)] if rest else events

    def _after(self, text: str | None) -> list[ParserEvent]:
        """The events of text behind the reasoning; None: of its end."""
        if self._parser is None:
            found: list[ParserEvent] = [Content(text)] if text else []
        else:
            try:
                found = self._parser.feed(text) if text is not None else self._parser.finish()
            except BaseException:
                parser = type(self._parser)
                with plugin_call(f"{name_of(parser)}.{'finish' if text is None else 'feed'} failed", parser):
                    raise
        return self._wanted(found)

    def _wanted(self, events: list[ParserEvent]) -> list[ParserEvent]:
        kept: list[ParserEvent] = []
        for event in events:
            if isinstance(event, Content):
                shown = self._content.feed(event.text)
                kept += [Content(shown)] if shown else []
                continue
            if isinstance(event, ToolCallBegin):
                if event.index and not self._parallel:
                    self.ended = True
                    break
                rest = self._content.flush()
                kept += [Content(rest)] if rest else []
            kept.append(event)
        return kept


class _Reasoning:
    """Splits a text into its reasoning and what follows. White space before the tag that begins it is left out."""

    def __init__(self, tags: ReasoningTags, opened: bool) -> None:
        self._begin, self._marker = tags.begin, Marker(tags.end)
        self._held, self.begun, self.over = "", opened, False

    def feed(self, text: str) -> tuple[str, str]:
        """The next pieces of the reasoning and of what follows it."""
        if self.over:
            return "", text
        if not self.begun:
            text = self._held + text
            rest = text.lstrip()
            if self._begin.startswith(rest) and rest != self._begin:
                self._held = text
                return "", ""
            self._held, self.begun = "", True
            if not rest.startswith(self._begin):
                self.over = True
                return "", text
            text = rest.removeprefix(self._begin)
        thought, self.over, text = self._marker.feed(text)
        return thought, text

    def finish(self) -> tuple[str, str]:
        """The rest of both, when the text has ended."""
        return ("", self._held) if not self.begun else ("" if self.over else self._marker.finish(), "")
