"""Conversations: their shape is checked here, the model's template makes them text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanoengine.core.errors import RequestError

# Arguments of transformers' apply_chat_template that say what comes out; here that is always a flat list of ids.
_FIXED = ("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation",
          "max_length", "tokenizer_kwargs", "conversation")  # fmt: skip


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A non-empty list of `{"role": str, "content": str | list of parts}`; other keys go to the template as they are.

    `content` may be None or missing only beside `tool_calls`. Raises `RequestError("invalid_prompt")` naming the
    message by its index.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise _invalid(f"messages must be a list of {{'role', 'content'}} dicts, not {type(messages).__name__}")
    if not messages:
        raise _invalid("messages is empty; give at least one, as in [{'role': 'user', 'content': 'Hello'}]")
    return [_check_message(i, message) for i, message in enumerate(messages)]


def render(hf: Any, messages: Any, options: Mapping[str, Any]) -> str:
    """The conversation as the prompt text of the template. `hf`: a transformers tokenizer. Raises `RequestError`."""
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
    try:
        text = hf.apply_chat_template(conversation, tokenize=False, **options)
    except Exception as error:  # a template is code that came with the model: it may raise anything
        raise _invalid(f"the chat template refused the messages: {error}") from error
    assert isinstance(text, str)
    return text


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
    return dict(message)


def _invalid(message: str) -> RequestError:
    return RequestError("invalid_prompt", message)
