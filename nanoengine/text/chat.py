"""Makes the prompt text of a conversation with the model's chat template."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanoengine.api.errors import RequestError, nearest
from nanoengine.text.messages import REASONING, check_documents, check_messages, check_tools, invalid, plain
from nanoengine.text.templates import TemplateProcesses

# Arguments of transformers' apply_chat_template that select the result, which is always a flat list of ids here.
_FIXED = ("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation",
          "max_length", "tokenizer_kwargs", "conversation", "messages")  # fmt: skip
_ROLES = ("system", "user", "assistant", "tool")  # the usual ones; each template has its own
_LIKE = 0.75  # likeness to a usual role from which on a role is probably mistyped
_MARK = "8091726354"  # a text that no template contains
_NULLS: tuple[dict[str, Any], ...] = ({}, {"content": None}, {"content": ""})


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation and the template for it.

    Attributes:
        template: source of the template. own: the model's variables (the texts of its special tokens).
        messages: as plain data. given: the caller's other variables, as plain data: tools, documents and so on.
        continued: key of the last message whose value the model continues; None: the model begins a new message.
    """

    processes: TemplateProcesses
    template: str
    own: Mapping[str, Any]
    messages: list[dict[str, Any]]
    given: Mapping[str, Any]
    continued: str | None

    def text(self) -> str:
        """The prompt text. Raises `RequestError("invalid_prompt")`."""
        if self.continued is None:
            return self._applied(self.messages)
        *before, last = self.messages
        final = last.get(self.continued)
        # Reasoning has several names. The template reads one of them.
        keys = [k for k in REASONING if last.get(k) == final] if self.continued in REASONING else [self.continued]
        if final is None or final == [] or not any(key in self.template for key in keys):
            raise invalid(
                f"continue_final_message: messages[{len(before)}] has no {self.continued!r} that this template uses"
            )
        # The mark ends with a space, which shows whether the template trims the text.
        text = self._applied([*before, {**last, **dict.fromkeys(keys, _marked(final))}])
        shown = final if isinstance(final, str) else final[-1]["text"]
        if text.count(_MARK) != 1 or shown.strip() not in text:
            raise invalid(
                "continue_final_message: the chat template leaves the final message out, or does not end there"
            )
        at = text.index(_MARK)
        return text[:at] if text.startswith(f"{_MARK} ", at) else text[:at].rstrip()

    def _applied(self, messages: list[dict[str, Any]]) -> str:
        return self.processes.render(self.template, {**self.own, **self.given, "messages": messages})


def _marked(content: str | list[dict[str, Any]]) -> Any:
    if isinstance(content, str):
        return f"{content}{_MARK} "
    return [*content[:-1], {**content[-1], "text": f"{content[-1]['text']}{_MARK} "}]


def prepare(hf: Any, processes: TemplateProcesses, messages: Any, options: Mapping[str, Any]) -> tuple[Chat, str]:
    """A conversation and its prompt text. `hf`: a transformers tokenizer. `options`: see `Tokenizer.render_chat`.

    The template receives content in parts unchanged if it supports parts; otherwise the texts of the parts, one line
    each (as in vLLM). Raises `RequestError`, also if the template skips a message because it does not know the role.
    """
    fixed = sorted(set(options) & set(_FIXED))
    if fixed:
        raise invalid(f"chat template arguments {fixed} cannot be set: the result is always one list of token ids")
    chat = _chat(hf, processes, check_messages(messages), dict(options))
    if any(isinstance(message.get("content"), list) for message in chat.messages):
        chat = _parts_or_texts(chat)
    chat, text = _with_calls(chat)
    _check_roles(chat, text)
    return chat, text


def _chat(hf: Any, processes: TemplateProcesses, messages: list[dict[str, Any]], options: dict[str, Any]) -> Chat:
    continued = options.pop("continue_final_message", False)
    begun = options.pop("add_generation_prompt", None)
    begun = not continued if begun is None else bool(begun)
    if continued and begun:
        raise invalid("continue_final_message and add_generation_prompt cannot be used together: give one of them")
    template, tools = options.pop("chat_template", None), check_tools(options.pop("tools", None))
    documents = check_documents(options.pop("documents", None))
    given = plain(options, "the template's arguments")
    return Chat(
        processes,
        _template(hf, template, tools),
        plain(hf.special_tokens_map, "special_tokens_map"),
        # As in transformers, a key with the value None is left out.
        [{key: value for key, value in message.items() if value is not None} for message in messages],
        {**given, "tools": tools, "documents": documents, "add_generation_prompt": begun},
        ("content" if continued is True else str(continued)) if continued else None,
    )


def _template(hf: Any, given: Any, tools: Any) -> str:
    if not isinstance(given, str | None):
        raise invalid(f"chat_template must be a template, or the name of a template of the model, not {given!r}")
    if not hf.chat_template and not given:
        raise invalid("the model's folder has no chat template; give a text or token-id prompt, or chat_template='...'")
    try:
        found = hf.get_chat_template(given, tools)
    except ValueError as error:  # there are several templates, and none is the default
        raise invalid(str(error)) from error
    if not isinstance(found, str):
        raise invalid(f"the model's chat template must be text, not {type(found).__name__}")
    return found


def _parts_or_texts(chat: Chat) -> Chat:
    """The conversation with content in parts if the template supports that, with the texts of the parts if not.

    A template that does not support parts raises an error, prints them as Python does, or skips them. A test rendering
    with one more part in each message shows which.
    """
    marks = [{"type": "text", "text": f"{_MARK}{index}."} for index in range(len(chat.messages))]
    marked = [
        {**message, "content": [*message["content"], mark]} if isinstance(message.get("content"), list) else message
        for message, mark in zip(chat.messages, marks, strict=True)
    ]
    try:
        text = replace(chat, messages=marked, continued=None).text()
    except RequestError:
        text = ""
    return replace(
        chat,
        messages=[
            message if mark["text"] in text and str(mark) not in text else _with_plain_text(message)
            for message, mark in zip(chat.messages, marks, strict=True)
        ],
    )


def _with_plain_text(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": "\n".join(part["text"] for part in content)} if isinstance(content, list) else message


def _with_calls(chat: Chat) -> tuple[Chat, str]:
    """The conversation with the form of "no content" that the template needs, and its prompt text.

    A message that only calls tools has no content. Depending on the template, this must be a missing key, None or an
    empty text. The first form is used whose prompt has the calls, else the first that gives a prompt.
    """
    names = [
        call.get("function", call).get("name")
        for message in chat.messages
        if "content" not in message
        for call in message["tool_calls"]
    ]
    if not names:
        return chat, chat.text()
    found, failures = [], []
    for null in _NULLS:
        tried = replace(chat, messages=[{**null, **message} for message in chat.messages])
        try:
            text = tried.text()
        except RequestError as error:
            failures.append(error)
            continue
        if all(str(name) in text for name in names):
            return tried, text
        found.append((tried, text))
    if not found:
        raise failures[0]
    return found[0]


def _check_roles(chat: Chat, text: str) -> None:
    """Raises `RequestError` for a role that is probably mistyped, and if the template skips a message, as many
    templates do for a role that they do not know. A role is probably mistyped if it is nearly a usual one, and the
    template does not name it.
    """
    for index, message in enumerate(chat.messages):
        role, content = message["role"], message.get("content")
        if role in _ROLES:
            continue
        if content is not None and _is_skipped(chat, text, index):
            raise invalid(
                f"messages[{index}] is not in the prompt: this model's chat template skips role {role!r}; "
                f"{nearest(role, _ROLES)}"
            )
        meant = difflib.get_close_matches(role.lower()[:100], _ROLES, n=1, cutoff=_LIKE)
        if meant and not re.search(rf"""(['"]){re.escape(role)}\1""", chat.template):
            raise invalid(
                f"messages[{index}]: this model's chat template does not name role {role!r}; did you mean {meant[0]!r}?"
            )


def _is_skipped(chat: Chat, text: str, index: int) -> bool:
    """Whether more content in a message does not change the prompt."""
    message = chat.messages[index]
    content = message["content"]
    more = f"{content}." if isinstance(content, str) else [*content, {"type": "text", "text": "."}]
    other = [*chat.messages[:index], {**message, "content": more}, *chat.messages[index + 1 :]]
    return replace(chat, messages=other).text() == text
