"""Keeps control tokens in the caller's messages as text. Control tokens that the template writes stay tokens.

To find out where a control token comes from, the conversation is rendered twice. For the second rendering, every
character of the caller that can begin a control token is replaced by an alias, a character of a private-use area. The
control tokens in the second text are then the template's, even if the template joins or trims the caller's texts. With
the aliases replaced back, the second text must be equal to the first. It is not if the template reads such characters
(e.g. to split off reasoning); then the conversation is rejected with an error.

A control token may begin in the template and end in the caller's text (`<|{{ content }}`). To find these, the
conversation is rendered again with aliases for the other characters of control tokens; it is rejected if there is such
a token. A rendering that differs for another reason, because the template reads these characters, proves nothing. So
letters are replaced in contents only, not in roles and names, which templates compare and write into their own tokens
(`<|{{ role }}|>`).

The ids come from a copy of the tokenizer in which control tokens have private-use names. The whole text is encoded at
once, with these names for the template's control tokens, so that all other text is split in the same way as without the
option.
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
from nanoengine.text.encoding import encoded
from nanoengine.text.messages import REASONING, invalid

_NAMES, _ALIASES, _WITHIN = (
    0x10_0000,
    0xF_0000,
    0xF_8000,
)  # names of control tokens; aliases of first and of other characters
_CONTENTS = ("content", *REASONING)  # keys of a message
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")


class ControlTokens:
    """Encodes conversations in which the caller's control tokens are text.

    Args:
        backend: the tokenizer. It is copied when a conversation needs that.
        contents: the texts of the control tokens.
    """

    def __init__(self, backend: Backend, contents: tuple[str, ...]) -> None:
        self._backend = backend
        self._names = {content: chr(_NAMES + i) for i, content in enumerate(contents)}
        firsts = sorted({content[0] for content in contents})
        # Letters get no alias, because templates compare words.
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
        """Ids of `text`, which is `chat.text()`. Raises `RequestError("invalid_prompt")` if they are not certain."""
        values = [chat.messages, chat.given]
        if _any(values, lambda value: any(word in value for word in self._words)):
            raise invalid(f"sanitize_control_tokens: control tokens such as {self._words[:3]} cannot be kept as text")
        begins = _any(values, self._begins.search)
        if not begins and not self._pattern.search(text):
            return self._plainly(text)
        if _any(values, (_PRIVATE if begins else self._reserved).search):
            raise invalid(
                "sanitize_control_tokens: the conversation has characters of the private-use planes (from U+F0000 on), "
                "which are needed to separate its control tokens from those of the template"
            )
        marked = _with_aliases(chat, self._aliases).text() if begins else text
        if marked.translate(self._back) != text:
            raise invalid(
                f"sanitize_control_tokens: this chat template reads control tokens in {self._reader(chat, text)}; "
                "leave them out there (reasoning has its own key, 'reasoning_content')"
            )
        self._refuse_mixed(chat, text, marked)
        if not begins:
            return self._plainly(text)
        ids = self._named_ids(self._with_names(marked).translate(self._back))
        own = len(self._pattern.findall(marked))
        if self._named_ids(self._with_names(text)) != self._plainly(text) or own != sum(i in self._ids for i in ids):
            raise invalid("sanitize_control_tokens: it is not supported with the way this tokenizer splits text")
        return ids

    def _refuse_mixed(self, chat: Chat, text: str, marked: str) -> None:
        """Raises `RequestError` if a control token in `marked` begins in the template and ends in the caller's text."""
        own = {found.span() for found in self._pattern.finditer(marked)}
        if not own:
            return
        tries = [_with_contents(chat, self._within)]
        if not self._same(tries[0], text):
            tries = [_with_contents(chat, {code: alias}) for code, alias in self._within.items()]
        for code, alias in self._within.items():
            # Letters, digits and "_" make the names and words that templates compare, so they are not replaced.
            if not (chr(code).isalnum() or chr(code) == "_"):
                tries.append(_with_aliases(chat, {**self._aliases, code: alias}))
        plain = _with_aliases(chat, self._aliases)
        for tried in tries:
            if tried in (chat, plain):
                continue  # the conversation has no such character
            shown = self._same(tried, text)
            if shown and not own <= {found.span() for found in self._pattern.finditer(shown)}:
                raise invalid(
                    "sanitize_control_tokens: this chat template completes a control token with the caller's text"
                )

    def _same(self, changed: Chat, text: str) -> str:
        """The text of a conversation with aliases, if it is `text` apart from the aliases; "" if it differs."""
        try:
            shown = changed.text()
        except RequestError:
            return ""
        return shown if shown.translate(self._back) == text else ""

    def _reader(self, chat: Chat, text: str) -> str:
        """The message (as text, e.g. "messages[1]") whose aliases change the rendered text."""
        for index, message in enumerate(chat.messages):
            others = [*chat.messages[:index], _translated(message, self._aliases), *chat.messages[index + 1 :]]
            if replace(chat, messages=others).text().translate(self._back) != text:
                return f"messages[{index}]"
        return "its arguments"

    def _with_names(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._names[found.group()], text)

    def _plainly(self, text: str) -> list[int]:
        return encoded(self._backend, text)

    def _named_ids(self, text: str) -> list[int]:
        copy, id_of = self._copy
        return [id_of.get(i, i) for i in encoded(copy, text)]

    @cached_property
    def _copy(self) -> tuple[Backend, dict[int, int]]:
        """A copy of the tokenizer with private-use names for control tokens; its ids of added tokens -> our ids."""
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
    """Texts of the tokens that are control tokens, as in transformers.

    These are all special tokens, and those other added tokens that `hf.chat_control_tokens` names; without that
    attribute, those that are in the template's source and not white space.
    """
    named = getattr(hf, "chat_control_tokens", None)
    named = template if named is None else set(named)
    added = hf.backend_tokenizer.get_added_tokens_decoder().values()
    return tuple(
        token.content
        for token in added
        if token.content and (token.special or (token.content in named and not token.content.isspace()))
    )


def _with_aliases(chat: Chat, aliases: Mapping[int, str]) -> Chat:
    """The conversation with characters replaced in all the caller's texts."""
    return replace(chat, messages=_translated(chat.messages, aliases), given=_translated(chat.given, aliases))


def _with_contents(chat: Chat, aliases: Mapping[int, str]) -> Chat:
    """The conversation with characters replaced in contents and reasoning only."""
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
    """`value` with characters replaced in all its texts."""
    if isinstance(value, str):
        return value.translate(aliases)
    if isinstance(value, Mapping):
        return {_translated(key, aliases): _translated(each, aliases) for key, each in value.items()}
    return type(value)(_translated(each, aliases) for each in value) if isinstance(value, list | tuple) else value


def _any(value: Any, holds: Any) -> bool:
    """Whether `holds` is true for any text in `value`."""
    if isinstance(value, str):
        return bool(holds(value))
    if isinstance(value, Mapping):
        return any(_any(each, holds) for pair in value.items() for each in pair)
    return isinstance(value, list | tuple) and any(_any(each, holds) for each in value)
