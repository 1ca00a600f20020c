"""Prompts of requests: checked, tokenized and rendered outside the event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanoengine.api.errors import RequestError, nearest, shown
from nanoengine.params.arguments import checked_ids
from nanoengine.server.context import Context
from nanoengine.server.conversations import fit_call_ids
from nanoengine.server.errors import ApiError, api_error, invalid, shortened

_INLINE = 2_000  # characters that are tokenized at once; more go to a thread
# Variables that choose the template or the kind of result, or are fields of their own.
_NO_VARIABLES = frozenset({
    "chat_template", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding",
    "truncation", "max_length", "tokenizer_kwargs", "conversation", "messages", "tools", "documents",
    "add_generation_prompt", "continue_final_message", "sanitize_control_tokens",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prompt:
    """token_ids: in the vocabulary. text: None where the client gave ids."""

    token_ids: tuple[int, ...]
    text: str | None = None


async def completion_prompts(
    context: Context, given: Any, add_special_tokens: bool, *, name: str = "prompt", new_tokens: int = 1
) -> list[Prompt]:
    """The prompts in the field `name`: text, token ids, or a list of these. Raises `ApiError` or `RequestError`.

    new_tokens: that each must leave room for, 0 or 1.
    """
    parts = _parts(given, context.config.max_prompts, name)

    def prompts() -> list[Prompt]:
        names = [name] if parts[0] is given else [f"{name}[{index}]" for index in range(len(parts))]
        return [
            _prompt(context, part, add_special_tokens, new_tokens, where)
            for part, where in zip(parts, names, strict=True)
        ]

    size = sum(len(part) for part in parts)
    return prompts() if size <= _INLINE else await context.in_thread(prompts, size)


def _parts(given: Any, most: int, name: str) -> list[Any]:
    """One entry for each prompt."""
    if given is None:
        raise invalid(f"{name} is missing: give text, token ids, or a list of these", name, "missing_field")
    if isinstance(given, str) or (isinstance(given, list) and given and type(given[0]) is int):
        return [given]
    if not isinstance(given, list) or not all(isinstance(part, str | list) for part in given):
        raise invalid(f"{name} must be text, token ids, or a list of these, not {shown(given)}", name)
    if not 1 <= len(given) <= most:
        raise invalid(f"{name} has {len(given)} entries, and must have 1 to {most} (server.max_prompts)", name)
    return given


def _prompt(context: Context, part: str | list[Any], add_special_tokens: bool, new_tokens: int, where: str) -> Prompt:
    if not isinstance(part, str):
        return Prompt(checked_prompt(context, part, where, new_tokens))
    try:
        ids = context.need_tokenizer().encode(part, add_special_tokens=add_special_tokens)
    except RequestError as error:
        raise _about(where, error) from error
    return Prompt(checked_prompt(context, ids, where, new_tokens), part)


def checked_prompt(context: Context, ids: Sequence[int], where: str, new_tokens: int = 1) -> tuple[int, ...]:
    """Raises `ApiError` with the param `where` for an id outside the vocabulary, and for too many of them."""
    info = context.client.info
    found = checked_ids(ids, info.vocab_size, info.max_model_len, new_tokens, name=where)
    if isinstance(found, RequestError):
        raise _about(where, found)
    return found


def _about(where: str, error: RequestError) -> ApiError:
    """Says which prompt is wrong. A message that begins with it says more."""
    found = api_error(error)
    return found if found.message.startswith(where) else replace(found, param=where)


def check_room(context: Context, prompt: Prompt, most: int | None, name: str) -> None:
    """Raises `ApiError` where so many new tokens, which the client asks for by the field `name`, cannot fit."""
    tokens, room = len(prompt.token_ids), context.client.info.max_model_len
    if most is not None and tokens + most > room:
        raise invalid(
            f"{name} is {most} and the prompt has {tokens} tokens, together {tokens + most}, but max_model_len is "
            f"{room}: ask for at most {room - tokens}, or leave {name} out",
            name,
            "context_length_exceeded",
        )


async def chat_prompt(context: Context, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Prompt:
    """The prompt of a conversation. `options`: see `template_options`. Raises `ApiError` or `RequestError`."""
    ids, text = await rendered(context, messages, options)
    return Prompt(checked_prompt(context, ids, "messages"), text)


async def rendered(
    context: Context, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> tuple[list[int], str]:
    """Token ids, however many, and the text of a conversation."""
    tokenizer = context.need_tokenizer()
    sanitize = context.config.special_tokens_in_content == "text"

    def chat() -> tuple[list[int], str]:
        plain = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
        fit_call_ids(plain, tokenizer.template_text)
        return tokenizer.chat(plain, sanitize_control_tokens=sanitize, **options)

    return await context.in_thread(chat, _size(messages))


def _size(messages: Sequence[Mapping[str, Any]]) -> int:
    """About how many characters they have."""
    if len(messages) > 1000:
        return len(messages) * 100
    return sum(len(str(message.get("content"))) for message in messages)


def template_options(
    *,
    kwargs: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    reasoning_effort: str | None = None,
) -> dict[str, Any]:
    """Variables of the template. Raises `ApiError` for one that is none, such as a template."""
    for name in kwargs or {}:
        if name in _NO_VARIABLES:
            raise invalid(
                f"chat_template_kwargs.{name} cannot be set: the template is the model's, its result is always token "
                "ids, and tools, documents, add_generation_prompt and continue_final_message are fields of the request",
                f"chat_template_kwargs.{name}",
            )
        if not name.isidentifier():
            words = f"chat_template_kwargs: {shortened(name, 100)!r} is not the name of a variable"
            raise invalid(words, "chat_template_kwargs")
    options: dict[str, Any] = {}
    if reasoning_effort is not None:
        options["reasoning_effort"] = reasoning_effort
        if reasoning_effort == "none":
            options["enable_thinking"] = False
    options |= kwargs or {}
    if tools:
        options["tools"] = [*tools]
    if documents:
        options["documents"] = [*documents]
    if add_generation_prompt is not None:
        options["add_generation_prompt"] = add_generation_prompt
    if continue_final_message is not None:
        options["continue_final_message"] = continue_final_message
    return options


_PARTS = ("text", "refusal", "input_text", "output_text")


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message as templates know it. Raises `ApiError` for parts that are no text: no URL is fetched."""
    found = {key: value for key, value in message.items() if value is not None}
    for name in ("audio", "function_call"):
        if name in found:
            advice = "use tool_calls" if name == "function_call" else "only text is supported"
            raise invalid(f"{where}.{name} is not supported: {advice}", f"{where}.{name}", "unknown_field")
    if found.get("role") == "developer":  # OpenAI's newer name
        found["role"] = "system"
    content = found.get("content")
    if isinstance(content, list):
        found["content"] = [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    if found.get("role") == "assistant" and "content" not in found and not found.get("tool_calls"):
        found["content"] = found.pop("refusal", "")
    return found


def _part(part: Any, where: str) -> Any:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return part  # `check_messages` explains it
    kind = part["type"]
    if kind in _PARTS:
        return {"type": "text", "text": part.get("text", part.get("refusal"))}
    fetched = any(word in kind for word in ("url", "image", "audio", "video", "file"))
    hint = "nothing is fetched, and only text is supported" if fetched else nearest(kind, _PARTS)
    raise ApiError(400, f"{where} is of type {shortened(kind, 100)!r}: {hint}", "not_supported", where)
