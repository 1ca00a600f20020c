"""Conversations of other shapes as those of chat completions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nanoengine.api.errors import nearest
from nanoengine.server.errors import ApiError, invalid, shortened

# Of parts, what changes no prompt: citations, and marks of prefixes, which the cache finds without them.
_IGNORED = ("annotations", "cache_control", "citations", "logprobs")


def part_text(part: Any, where: str, kinds: Sequence[str]) -> str:
    """The text of a content part of one of these kinds. Raises `ApiError`: nothing is fetched."""
    kind = kind_of(part, where)
    if kind not in kinds:
        raise wrong_kind(kind, where, kinds)
    key = "refusal" if kind == "refusal" else "text"
    only(part, where, {key: str}, _IGNORED)
    return str(part[key])


def texts_of(content: Any, where: str, kinds: Sequence[str]) -> str:
    """The text of a content that is text, or a list of parts with text, a line each."""
    return content if isinstance(content, str) else "\n".join(part_texts(content, where, kinds))


def part_texts(content: Any, where: str, kinds: Sequence[str]) -> list[str]:
    """The texts of a list of parts."""
    if not isinstance(content, list):
        raise invalid(f"{where} must be text or a list of parts", where)
    return [part_text(part, f"{where}[{i}]", kinds) for i, part in enumerate(content)]


def kind_of(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise invalid(f"{where} must be an object with 'type'", where)
    return str(part["type"])


def wrong_kind(kind: str, where: str, kinds: Sequence[str]) -> ApiError:
    fetched = any(word in kind for word in ("url", "image", "audio", "video", "file", "document"))
    hint = "nothing is fetched, and only text is supported" if fetched else nearest(kind, kinds)
    return ApiError(400, f"{where} is of type {shortened(kind, 100)!r}: {hint}", "not_supported", where)


def only(value: Mapping[str, Any], where: str, required: Mapping[str, type], optional: Sequence[str] = ()) -> None:
    """Raises `ApiError` for a key that is missing, of another type, or not known. None is no value."""
    for key, kind in required.items():
        if not isinstance(value.get(key), kind):
            raise invalid(f"{where} needs {key!r}: {'a string' if kind is str else 'an object'}", f"{where}.{key}")
    known = ["type", *required, *optional]
    unknown = next((key for key in value if key not in known and value[key] is not None), None)
    if unknown is not None:
        hint = nearest(unknown, known)
        raise ApiError(400, f"unknown field {shortened(f'{where}.{unknown}', 200)!r}: {hint}", "unknown_field", where)


_ID_LENGTH = re.compile(r"id\s*\|\s*length\s*!=\s*([1-9]|[1-5][0-9])\b")


def fit_call_ids(messages: Sequence[dict[str, Any]], template: str) -> None:
    """Gives calls of tools ids of the only length that the template takes (Mistral's: 9 letters and digits).

    A client sends back the ids that it got, from here or elsewhere. Equal ids stay equal.
    """
    found = _ID_LENGTH.search(template)
    if found is None:
        return
    length = int(found[1])

    def fitted(given: Any) -> Any:
        if not isinstance(given, str) or (len(given) == length and given.isalnum()):
            return given
        return hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()[:length]

    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            message["tool_calls"] = [
                {**call, "id": fitted(call["id"])} if isinstance(call, dict) and "id" in call else call
                for call in calls
            ]
        if "tool_call_id" in message:
            message["tool_call_id"] = fitted(message["tool_call_id"])
