"""Checks of what callers pass: prompts, token ids, parameters, priorities; a single one or a list of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypedDict

from nanoengine.api.errors import ParamsError, RequestError, TokenizerMissing, described, is_failure, shown
from nanoengine.params.field_types import conform, is_unicode
from nanoengine.params.sampling_fields import INT64
from nanoengine.params.sampling_params import SamplingParams

OnError = Literal["return", "raise"]
Prompt = str | Sequence[int] | Mapping[str, Any]


class GivenPrompt(NamedTuple):
    """Not checked. prompt: text or ids. text: what is shown with ids. generated: tokens of the output."""

    prompt: Any
    text: str | None = None
    generated: Any = ()


_SWITCHES: Mapping[str, Any] = {
    "add_generation_prompt": bool | None,
    "continue_final_message": bool | str | None,
    "sanitize_control_tokens": bool,
}


class ChatOptions(TypedDict, total=False):
    """Keywords of `LLM.chat` and `LLM.chat_prompt` that go to the chat template.

    Attributes:
        add_generation_prompt: add the beginning of the answer (default: True, unless `continue_final_message`).
        continue_final_message: continue the last message, or this field of it.
        tools, documents: variables of the template.
        chat_template: used instead of the model's template: its text, or the name of one of the model's templates.
        chat_template_kwargs: other variables that the template reads.
        sanitize_control_tokens: encode control tokens in the content of messages as plain text.
    """

    add_generation_prompt: bool | None
    continue_final_message: bool | str
    tools: Sequence[Any] | None
    documents: Sequence[Any] | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    sanitize_control_tokens: bool


def template_variables(options: ChatOptions) -> dict[str, Any]:
    """The variables for the chat template. Raises `ParamsError` for wrong types: `add_generation_prompt="no"`."""
    given: dict[str, Any] = dict(options)
    more = conform("chat_template_kwargs", given.pop("chat_template_kwargs", None), Mapping[str, Any] | None)
    variables = {**(more or {}), **given}
    for name, kind in _SWITCHES.items():
        if name in variables:
            variables[name] = conform(name, variables[name], kind)
    return variables


def is_conversation(prompt: Any) -> bool:
    """Whether this is one conversation: a list of messages."""
    return isinstance(prompt, list | tuple) and any(isinstance(each, Mapping) and "role" in each for each in prompt)


def check_one_prompt(prompt: Any, instead: str) -> None:
    """Raises `ParamsError` for messages, and for a list of prompts. `instead`: what to do with several."""
    if is_conversation(prompt):
        raise ParamsError("prompt must be one prompt, not messages: give them to chat")
    if isinstance(prompt, list | tuple) and any(isinstance(each, str | Mapping | list | tuple) for each in prompt):
        raise ParamsError(f"prompt must be one prompt, not a list of prompts: {instead}")


def check_on_error(on_error: object) -> bool:
    """Whether to raise. Raises `ParamsError` for another word."""
    if on_error not in ("return", "raise"):
        raise ParamsError(f'on_error must be "return" or "raise", not {shown(on_error)}')
    return on_error == "raise"


def is_one(prompts: Any) -> bool:
    """Whether this is one prompt: text, a dict, or a flat list of ids. An empty list is a list of no prompts."""
    if isinstance(prompts, str | Mapping):
        return True
    if not isinstance(prompts, Sequence) and not hasattr(prompts, "__array__"):
        raise ParamsError(f"prompts must be text, token ids, a dict, or a list of those, not {shown(prompts)}")
    return len(prompts) > 0 and (isinstance(prompts, range) or all(map(_is_integer, prompts)))


def _is_integer(value: Any) -> bool:
    try:
        return isinstance(value, Integral)
    except BaseException as error:  # its class may be any code; this prompt is rejected later, the others run
        if not is_failure(error):
            raise
        return False


def split_prompts(prompts: Any) -> list[GivenPrompt]:
    """`split_prompt` for one prompt or for each in a list. Raises `ParamsError` if it is neither."""
    try:
        return [split_prompt(prompt) for prompt in ([prompts] if is_one(prompts) else prompts)]
    except BaseException as error:
        if isinstance(error, ParamsError) or not is_failure(error):
            raise
        raise ParamsError(f"reading the prompts raised {described(error)}") from error


def split_prompt(prompt: Prompt) -> GivenPrompt:
    """The parts of a prompt. A wrong one is returned unchanged; the engine rejects it without the others."""
    try:
        if not isinstance(prompt, Mapping):
            return GivenPrompt(prompt)
        unknown = set(prompt) - {"prompt", "prompt_token_ids", "generated_token_ids"}
        if unknown or not {"prompt", "prompt_token_ids"} & set(prompt):
            return GivenPrompt(prompt)
        ids, generated = prompt.get("prompt_token_ids"), prompt.get("generated_token_ids")
        given, text = (prompt.get("prompt"), None) if ids is None else (ids, prompt.get("prompt"))
        return GivenPrompt(given, text, () if generated is None else generated)
    except BaseException as error:  # the prompt's class may be any code
        if not is_failure(error):
            raise
        return GivenPrompt(_unreadable(error))


def one_each(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise ParamsError(f"{name} has {len(value)} entries for {count} prompts; give one for all, or one for each")
    return list(value)


def check_params(params: Any) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        raise ParamsError(f"params must be SamplingParams, or one for each prompt, not {shown(params)}")
    return params


def one_name(params: Any, sampling_params: Any) -> Any:
    if params is not None and sampling_params is not None:
        raise ParamsError("params and sampling_params are two names for one thing: give one of them")
    return sampling_params if params is None else params


def check_priority(priority: object) -> int | None:
    """The priority as a plain int; None if there is none. Raises `ParamsError`."""
    if priority is None:
        return None
    try:
        level = as_int(priority)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ParamsError(f"reading the priority raised {described(error)}") from error
    if level is None or level not in INT64:
        raise ParamsError(f"priority must be a whole number of 64 bits, not {shown(priority)}")
    return level


def checked_name(what: str, name: object) -> str:
    """The name as a plain string. Raises `ParamsError`."""
    if not isinstance(name, str) or not is_unicode(name):
        raise ParamsError(f"{what} must be a string of valid Unicode, not {shown(name)}")
    return str.__str__(name)


def encoded_prompt(
    prompt: Any, prompt_text: object, encode: Callable[[str], list[int]]
) -> tuple[Any, str | None, RequestError | None]:
    """Token ids that are not checked, or the error that rejects the prompt; text to show; what is wrong with that text.

    `prompt_text`: shown if `prompt` is ids. Raises `TokenizerMissing` if `encode` does.
    """
    try:
        if isinstance(prompt, str):
            prompt = prompt_text = str.__str__(prompt)  # a plain string: a subclass may be any code
            prompt = _encoded(prompt, encode)
        if prompt_text is None:
            return prompt, None, None
        if isinstance(prompt_text, str) and is_unicode(prompt_text):
            return prompt, str.__str__(prompt_text), None
        words = f"a prompt's text, given with its ids, must be valid Unicode, not {shown(prompt_text)}"
        return prompt, None, RequestError("invalid_prompt", words)
    except BaseException as error:
        if isinstance(error, TokenizerMissing) or not is_failure(error):
            raise
        return _unreadable(error), None, None


def _encoded(text: str, encode: Callable[[str], list[int]]) -> list[int] | RequestError:
    try:
        return encode(text)
    except RequestError as error:  # text that has no tokens, such as half a surrogate pair
        return error
    except BaseException as error:
        if isinstance(error, TokenizerMissing) or not is_failure(error):
            raise
        return RequestError("invalid_prompt", f"the tokenizer raised {described(error)}")


def checked_ids(
    token_ids: Any, vocab_size: int, max_model_len: int, new_tokens: int = 1, name: str = "prompt"
) -> tuple[int, ...] | RequestError:
    """Plain ints in the vocabulary, that leave room for `new_tokens` (0 or 1) in `max_model_len`; or the error that
    rejects the prompt. name: what the message about an id calls the prompt."""
    if isinstance(token_ids, RequestError):  # the caller has found an error already
        return token_ids
    try:
        return _checked(token_ids, vocab_size, max_model_len, new_tokens, name)
    except BaseException as error:  # the class of a list or an id may be any code
        if not is_failure(error):
            raise
        return _unreadable(error)


def _unreadable(error: BaseException) -> RequestError:
    """The error of a prompt whose class raised `error` while it was read."""
    return RequestError("invalid_prompt", f"reading the prompt raised {described(error)}")


def too_long(tokens: int, max_model_len: int, least: str = "", new_tokens: int = 1) -> RequestError:
    """The error of a prompt with too many `tokens`. `least`: "at least " if not all of them were counted."""
    room = ", which must leave room for one new token" if new_tokens else ""
    return RequestError(
        "too_long",
        f"the prompt has {least}{tokens} tokens and max_model_len is {max_model_len}{room}: shorten the prompt to "
        f"{max_model_len - new_tokens} tokens or raise max_model_len, if the model was made for more",
    )


def _checked(
    token_ids: Any, vocab_size: int, max_model_len: int, new_tokens: int, name: str
) -> tuple[int, ...] | RequestError:
    """As `checked_ids`, but raises what reading raises. At most one id too many is read."""
    above = max_model_len - new_tokens + 1
    try:
        size = len(token_ids) if hasattr(type(token_ids), "__len__") else 0
        is_ids = not isinstance(token_ids, bytes | Mapping)
        given = list(islice(token_ids, above)) if is_ids and size < above else None
    except TypeError:
        size, is_ids, given = 0, False, None
    if is_ids and (given is None or len(given) == above):
        return too_long(max(size, above), max_model_len, "" if given is None else "at least ", new_tokens)
    if given is None:
        valid = (
            "text, token ids, {'prompt': text} or {'prompt_token_ids': ids}, to either of which 'generated_token_ids'"
        )
        is_message = isinstance(token_ids, Mapping) and "role" in token_ids
        chat = "; messages go to chat" if is_message else ""
        return RequestError("invalid_prompt", f"a prompt is {valid} may be added, not {kind_of(token_ids)}{chat}")
    if not given:
        return RequestError("invalid_prompt", "the prompt is empty: at least one token is needed")
    return in_vocabulary(given, vocab_size, name, "invalid_prompt")


def in_vocabulary(token_ids: Sequence[Any], vocab_size: int, name: str, code: str) -> tuple[int, ...] | RequestError:
    """Plain ints. Or an error with this `code` for the first one that is no id; `name`: what the message calls them."""
    if not token_ids or (set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return tuple(token_ids)
    ids = []
    for i, token in enumerate(token_ids):
        number = as_int(token)
        if number is None:
            return RequestError(code, f"{name}[{i}] is {shown(token)}, not a token id")
        if not 0 <= number < vocab_size:
            return RequestError(code, f"{name}[{i}] is {shown(number)}, outside the vocabulary 0..{vocab_size - 1}")
        ids.append(number)
    return tuple(ids)


def kind_of(value: object) -> str:
    return f"a dict with {list(value)}" if isinstance(value, Mapping) else type(value).__name__


def as_int(value: Any) -> int | None:
    """The int of an integer (also numpy's, or an element of a tensor); None for a bool and everything else."""
    if type(value) is int:
        return value
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
