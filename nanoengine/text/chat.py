"""Conversations become prompt texts by the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanoengine.api.errors import RequestError, nearest
from nanoengine.text.messages import REASONING, check_documents, check_messages, check_tools, invalid, plain
from nanoengine.text.templates import TemplateProcesses

# Arguments of transformers' apply_chat_template that say what comes out; here that is always a flat list of ids.
_FIXED = ("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation",
          "max_length", "tokenizer_kwargs", "conversation", "messages")  # fmt: skip
_ROLES = ("system", "user", "assistant", "tool")  # usual ones; which there are is the template's matter
_MARK = "8091726354"  # no template says it by itself
_NULLS: tuple[dict[str, Any], ...] = ({}, {"content": None}, {"content": ""})


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation on its way into a template.

    Attributes:
        template: its source. own: variables of the model's (the texts of its special tokens).
        messages: plain data. given: the caller's other variables, plain: tools, documents, whatever the template knows.
        continued: key of the last message that the model goes on with; None: it begins a new message.
    """

    processes: TemplateProcesses
    template: str
    own: Mapping[str, Any]
    messages: list[dict[str, Any]]
    given: Mapping[str, Any]
    continued: str | None

    def text(self) -> str:
        """Raises `RequestError("invalid_prompt")`."""
        if self.continued is None:
            return self._applied(self.messages)
        *before, last = self.messages
        final = last.get(self.continued)
        # A thought has several names, of which the template reads one.
        keys = [k for k in REASONING if last.get(k) == final] if self.continued in REASONING else [self.continued]
        if final is None or final == [] or not any(key in self.template for key in keys):
            raise invalid(
                f"continue_final_message: messages[{len(before)}] has no {self.continued!r} that this template shows"
            )
        # A blank behind the mark shows whether the template trims what it is given.
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

    Content in parts goes to the template as such; to one that takes texts alone, as the parts' texts, a line each (as
    in vLLM). Raises `RequestError`; also where the template leaves a message out for a role that is not a usual one.
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
        raise invalid("continue_final_message and add_generation_prompt exclude each other: give one of them")
    template, tools = options.pop("chat_template", None), check_tools(options.pop("tools", None))
    documents = check_documents(options.pop("documents", None))
    given = plain(options, "the template's arguments")
    return Chat(
        processes,
        _template(hf, template, tools),
        plain(hf.special_tokens_map, "special_tokens_map"),
        # As in transformers, a key whose value is None is not there.
        [{key: value for key, value in message.items() if value is not None} for message in messages],
        {**given, "tools": tools, "documents": documents, "add_generation_prompt": begun},
        ("content" if continued is True else str(continued)) if continued else None,
    )


def _template(hf: Any, given: Any, tools: Any) -> str:
    if not isinstance(given, str | None):
        raise invalid(f"chat_template must be a template, or the name of one of the model's, not {given!r}")
    if not hf.chat_template and not given:
        raise invalid(
            "the model's folder has no chat template; give a text or token-id prompt, "
            "or chat_template='...' among the template's arguments"
        )
    try:
        found = hf.get_chat_template(given, tools)
    except ValueError as error:  # several, none of them the default
        raise invalid(str(error)) from error
    if not isinstance(found, str):
        raise invalid(f"the model's chat template is no text, but {type(found).__name__}")
    return found


def _parts_or_texts(chat: Chat) -> Chat:
    """Content in parts stays so where the template wants it; one that does not raises, prints it as Python does, or
    leaves it out. A further part for each message shows which."""
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
    """Templates differ in how a message that only calls tools must say that it has no content: by no key at all, by
    None, or by an empty text. The first of these with which the prompt has the calls is taken, else the first that
    gives a prompt."""
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
    """Many templates skip a role that they do not know: the model would answer to less than was asked.

    That is so where another content makes no other prompt.
    """
    for index, message in enumerate(chat.messages):
        role, content = message["role"], message.get("content")
        if role in _ROLES or content is None:
            continue
        more = f"{content}." if isinstance(content, str) else [*content, {"type": "text", "text": "."}]
        other = [*chat.messages[:index], {**message, "content": more}, *chat.messages[index + 1 :]]
        if replace(chat, messages=other).text() == text:
            raise invalid(
                f"messages[{index}] is not in the prompt: this model's chat template skips role {role!r}; "
                f"{nearest(role, _ROLES)}"
            )
