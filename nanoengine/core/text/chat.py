"""Conversations: their shape is checked here, the model's template makes them text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanoengine.core.errors import RequestError, nearest

# Arguments of transformers' apply_chat_template that say what comes out; here that is always a flat list of ids.
_FIXED = ("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation",
          "max_length", "tokenizer_kwargs", "conversation")  # fmt: skip
_ROLES = ("system", "user", "assistant", "tool")  # usual ones; which there are is the template's matter
_MARK = "8091726354"  # no template says it by itself


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A non-empty list of `{"role": str, "content": str | list of parts}`; other keys go to the template as they are.

    `content` may be None or missing only beside `tool_calls`. A part is {"type": "text", "text": str}, or a text, which
    becomes that. Raises `RequestError("invalid_prompt")` naming the message by its index.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise _invalid(f"messages must be a list of {{'role', 'content'}} dicts, not {type(messages).__name__}")
    if not messages:
        raise _invalid("messages is empty; give at least one, as in [{'role': 'user', 'content': 'Hello'}]")
    return [_check_message(i, message) for i, message in enumerate(messages)]


def render(hf: Any, messages: Any, options: Mapping[str, Any]) -> str:
    """The conversation as the prompt text of the template. `hf`: a transformers tokenizer.

    Content in parts goes to the template as such; to one that takes texts alone, as the parts' texts, a line each (as
    in vLLM). Raises `RequestError`; also where the template leaves a message out for a role that is not a usual one.
    """
    fixed = sorted(set(options) & set(_FIXED))
    if fixed:
        raise _invalid(f"chat template arguments {fixed} cannot be set: the result is always one list of token ids")
    if not hf.chat_template and not options.get("chat_template"):
        raise _invalid(
            "the model's folder has no chat template; give a text or token-id prompt, "
            "or chat_template='...' among the template's arguments"
        )
    options = {"add_generation_prompt": not options.get("continue_final_message", False), **options}
    conversation = check_messages(messages)
    if any(isinstance(message.get("content"), list) for message in conversation):
        conversation = _parts_or_texts(hf, conversation, options)
    text = _applied(hf, conversation, options)
    _check_roles(hf, conversation, options, text)
    return text


def _parts_or_texts(hf: Any, conversation: list[dict[str, Any]], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Content in parts stays so where the template wants it; one that does not raises, prints it as Python does, or
    leaves it out. A further part for each message shows which."""
    marks = [{"type": "text", "text": f"{_MARK}{index}."} for index in range(len(conversation))]
    marked = [
        {**message, "content": [*message["content"], mark]} if isinstance(message.get("content"), list) else message
        for message, mark in zip(conversation, marks, strict=True)
    ]
    try:
        text = _applied(hf, marked, options)
    except RequestError:
        text = ""
    return [
        message if mark["text"] in text and str(mark) not in text else _with_plain_text(message)
        for message, mark in zip(conversation, marks, strict=True)
    ]


def _applied(hf: Any, conversation: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
    try:
        text = hf.apply_chat_template(conversation, tokenize=False, **options)
    except Exception as error:  # a template is code that came with the model: it may raise anything
        raise _invalid(f"the chat template refused the messages: {error}") from error
    assert isinstance(text, str)
    return text


def _with_plain_text(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": "\n".join(part["text"] for part in content)} if isinstance(content, list) else message


def _check_roles(hf: Any, conversation: list[dict[str, Any]], options: Mapping[str, Any], text: str) -> None:
    """Many templates pass over a role that they do not know: the model would answer to less than was asked.

    That is so where another content makes no other prompt.
    """
    for index, message in enumerate(conversation):
        role, content = message["role"], message.get("content")
        if role in _ROLES or content is None:
            continue
        more = f"{content}." if isinstance(content, str) else [*content, {"type": "text", "text": "."}]
        other = [*conversation[:index], {**message, "content": more}, *conversation[index + 1 :]]
        if _applied(hf, other, options) == text:
            raise _invalid(
                f"messages[{index}] is not in the prompt: this model's chat template passes over role {role!r}; "
                f"{nearest(role, _ROLES)}"
            )


def _check_message(index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise _invalid(f"{where} must be a dict with 'role' and 'content', not {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        raise _invalid(f"{where} needs 'role', a string such as 'user'; it has {sorted(map(str, message))}")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise _invalid(f"{where} needs 'content', a string; it has {sorted(map(str, message))}")
    if content is not None and not isinstance(content, str | list):
        raise _invalid(f"{where}['content'] must be a string or a list of parts, not {type(content).__name__}")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": [_check_part(f"{where}['content'][{i}]", part) for i, part in enumerate(content)]}


def _check_part(where: str, part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise _invalid(f"{where} must be a string or a dict with 'type' and 'text', not {type(part).__name__}")
    if part.get("type") != "text":
        raise _invalid(f"{where} is of type {part.get('type')!r}: only parts of type 'text' are served")
    if not isinstance(part.get("text"), str):
        raise _invalid(f"{where} needs 'text', a string; it has {sorted(map(str, part))}")
    return dict(part)


def _invalid(message: str) -> RequestError:
    return RequestError("invalid_prompt", message)
