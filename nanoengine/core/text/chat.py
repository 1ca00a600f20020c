"""Conversations: their shape is checked here, the model's template makes them text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanoengine.core.errors import RequestError, nearest

# Arguments of transformers' apply_chat_template that say what comes out; here that is always a flat list of ids.
_FIXED = ("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation",
          "max_length", "tokenizer_kwargs", "conversation")  # fmt: skip
_ROLES = ("system", "user", "assistant", "tool")  # usual ones; which there are is the template's matter


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
    in vLLM). Raises `RequestError`; also where the template leaves a message out for its role.
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
    in_parts = [message["content"] for message in conversation if isinstance(message.get("content"), list)]
    try:
        text = _applied(hf, conversation, options)
        printed = any(str(parts) in text for parts in in_parts)  # as Python shows a list: it was taken for a text
    except RequestError:
        if not in_parts:
            raise
        printed = True
    if printed:
        conversation = [_with_plain_text(message) for message in conversation]
        text = _applied(hf, conversation, options)
    _check_roles(hf, conversation, options, text)
    return text


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
        if role in _ROLES or not isinstance(content, str):
            continue
        other = [*conversation[:index], {**message, "content": f"{content}."}, *conversation[index + 1 :]]
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
