"""Control tokens in what a user says can be kept as text, while the template's own stay tokens.

Where a control token comes from is found by rendering twice. In the second rendering each of the caller's characters
that may begin a control token is another one, of a private-use area: what is a control token then, the template has
written, even where the caller's texts are joined or trimmed. Undone, the second text must be the first; a template that
reads such characters (to split off a thought, say) makes another one, and the conversation is refused in words.

A control token that the template begins may go on with the caller's text (`<|{{ content }}`). Further renderings, with
other characters in place of those that may be within a control token, show it: the conversation is refused. A template
that reads these characters makes another text, which shows nothing: so words are tried in contents alone, and not in
roles and names, which templates compare and write into their own tokens (`<|{{ role }}|>`).

The ids come from a copy of the tokenizer whose control tokens have private-use names. The whole text is encoded at
once, with those names where the template wrote control tokens, so that everything else is split as without the option.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Backend

from nanoengine.api.errors import RequestError
from nanoengine.text.chat import Chat
from nanoengine.text.messages import REASONING, invalid

_NAMES, _ALIASES, _WITHIN = 0x10_0000, 0xF_0000, 0xF_8000  # of control tokens, their first and their other characters
_CONTENTS = ("content", *REASONING)  # of a message
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")


class ControlTokens:
    """Some control tokens of a tokenizer.

    Args:
        backend: the tokenizer; it is copied when a conversation needs that.
        contents: texts of its added tokens that are control tokens.
    """

    def __init__(self, backend: Backend, contents: tuple[str, ...]) -> None:
        self._backend = backend
        self._names = {content: chr(_NAMES + i) for i, content in enumerate(contents)}
        firsts = sorted({content[0] for content in contents})
        # A letter is left where it is: a template compares words, and no word of a user's would be safe from that.
        self._aliases = {ord(char): chr(_ALIASES + i) for i, char in enumerate(firsts) if not char.isalnum()}
        within = "".join(sorted({char for content in contents for char in content if not char.isspace()}))
        self._within = {ord(char): self._aliases.get(ord(char), chr(_WITHIN + i)) for i, char in enumerate(within)}
        self._ids = {backend.token_to_id(content) for content in contents}
        self._words = [content for content in contents if content[0].isalnum()]
        self._back = {ord(alias): chr(code) for code, alias in (self._aliases | self._within).items()}
        self._begins = re.compile(f"[{re.escape(''.join(map(chr, self._aliases)))}]" if self._aliases else "(?!)")
        self._reserved = re.compile(f"[{''.join(map(chr, self._back))}]" if self._back else "(?!)")
        self._pattern = re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)")

    def encode(self, chat: Chat, text: str) -> list[int]:
        """Ids of `text`, which is `chat.text()`. Raises `RequestError("invalid_prompt")` where they are not certain."""
        values = [chat.messages, chat.given]
        if _any(values, lambda value: any(word in value for word in self._words)):
            raise invalid(f"sanitize_control_tokens: control tokens such as {self._words[:3]} cannot be kept text")
        begins = _any(values, self._begins.search)
        if not begins and not self._pattern.search(text):
            return self._plainly(text)
        if _any(values, (_PRIVATE if begins else self._reserved).search):
            raise invalid(
                "sanitize_control_tokens: the conversation has characters of the private-use planes (from U+F0000 on), "
                "which are needed to tell its control tokens from the template's"
            )
        marked = _with_aliases(chat, self._aliases).text() if begins else text
        if marked.translate(self._back) != text:
            raise invalid(
                f"sanitize_control_tokens: this chat template reads control tokens in {self._reader(chat, text)}; "
                "leave them out there (a thought has a key of its own, 'reasoning_content')"
            )
        self._refuse_mixed(chat, text, marked)
        if not begins:
            return self._plainly(text)
        ids = self._named_ids(self._with_names(marked).translate(self._back))
        own = len(self._pattern.findall(marked))
        if self._named_ids(self._with_names(text)) != self._plainly(text) or own != sum(i in self._ids for i in ids):
            raise invalid("sanitize_control_tokens: this tokenizer splits control tokens from text in a way of its own")
        return ids

    def _refuse_mixed(self, chat: Chat, text: str, marked: str) -> None:
        """Raises where a control token of `marked`, which the template has begun, goes on with the caller's text."""
        own = {found.span() for found in self._pattern.finditer(marked)}
        if not own:
            return
        tries = [_with_contents(chat, self._within)]
        if not self._same(tries[0], text):
            tries = [_with_contents(chat, {code: alias}) for code, alias in self._within.items()]
        for code, alias in self._within.items():
            # Names and words, which templates compare, consist of the others.
            if not (chr(code).isalnum() or chr(code) == "_"):
                tries.append(_with_aliases(chat, {**self._aliases, code: alias}))
        plain = _with_aliases(chat, self._aliases)
        for tried in tries:
            if tried in (chat, plain):
                continue  # it has no such character
            shown = self._same(tried, text)
            if shown and not own <= {found.span() for found in self._pattern.finditer(shown)}:
                raise invalid(
                    "sanitize_control_tokens: this chat template completes a control token with a caller's text"
                )

    def _same(self, changed: Chat, text: str) -> str:
        """The text of a conversation with aliases, if it is `text` but for these; "" where the template reads them."""
        try:
            shown = changed.text()
        except RequestError:
            return ""
        return shown if shown.translate(self._back) == text else ""

    def _reader(self, chat: Chat, text: str) -> str:
        """Which message makes another text when it is marked."""
        for index, message in enumerate(chat.messages):
            others = [*chat.messages[:index], _translated(message, self._aliases), *chat.messages[index + 1 :]]
            if replace(chat, messages=others).text().translate(self._back) != text:
                return f"messages[{index}]"
        return "its arguments"

    def _with_names(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._names[found.group()], text)

    def _plainly(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _named_ids(self, text: str) -> list[int]:
        copy, id_of = self._copy
        return [id_of.get(i, i) for i in copy.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _copy(self) -> tuple[Backend, dict[int, int]]:
        """The tokenizer with names for control tokens; its ids of added tokens -> the tokenizer's."""
        state = json.loads(self._backend.to_str())
        for token in state["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        copy = Backend.from_str(json.dumps(state))
        id_of = {}
        for token_id, token in self._backend.get_added_tokens_decoder().items():
            there = copy.token_to_id(self._names.get(token.content, token.content))
            assert there is not None
            id_of[there] = token_id
        return copy, id_of


def control_tokens(hf: Any, template: str) -> tuple[str, ...]:
    """Texts of the tokens that count as control tokens, as in transformers: all special ones, and of the other added
    ones those that `hf.chat_control_tokens` names, or else those in the template's source that are not blank."""
    named = getattr(hf, "chat_control_tokens", None)
    named = template if named is None else set(named)
    added = hf.backend_tokenizer.get_added_tokens_decoder().values()
    return tuple(
        token.content
        for token in added
        if token.content and (token.special or (token.content in named and not token.content.isspace()))
    )


def _with_aliases(chat: Chat, aliases: Mapping[int, str]) -> Chat:
    """The conversation with other characters in all the caller's texts."""
    return replace(chat, messages=_translated(chat.messages, aliases), given=_translated(chat.given, aliases))


def _with_contents(chat: Chat, aliases: Mapping[int, str]) -> Chat:
    """The conversation with other characters in contents and thoughts alone."""
    messages = [
        {key: _in_parts(value, aliases) if key in _CONTENTS else value for key, value in message.items()}
        for message in chat.messages
    ]
    return replace(chat, messages=messages)


def _in_parts(content: Any, aliases: Mapping[int, str]) -> Any:
    if not isinstance(content, list):
        return _translated(content, aliases)
    return [
        {**part, "text": _translated(part["text"], aliases)} if isinstance(part, dict) and "text" in part else part
        for part in content
    ]


def _translated(value: Any, aliases: Mapping[int, str]) -> Any:
    """`value` with other characters in all its texts."""
    if isinstance(value, str):
        return value.translate(aliases)
    if isinstance(value, Mapping):
        return {_translated(key, aliases): _translated(each, aliases) for key, each in value.items()}
    return type(value)(_translated(each, aliases) for each in value) if isinstance(value, list | tuple) else value


def _any(value: Any, holds: Any) -> bool:
    """Whether a text within `value` does."""
    if isinstance(value, str):
        return bool(holds(value))
    if isinstance(value, Mapping):
        return any(_any(each, holds) for pair in value.items() for each in pair)
    return isinstance(value, list | tuple) and any(_any(each, holds) for each in value)
