"""What a client calls the fields of its request, so that errors speak of what it sent.

Requests of other shapes become chat completions, and fields become parameters of the engine, which have names of their
own. An error that says one of these gets the client's name, in `param` and in its message.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nanoengine.server.errors import ApiError
from nanoengine.server.protocol.base import Model, RequestModel, checked
from nanoengine.server.protocol.generate import GenerateRequest

FIELD_NAMES = "nanoengine.field_names"
"""Key of the scope of a request: the `FieldNames` of its body."""
_PATH = re.compile(r"[a-z_][a-z0-9_]*(?:\.\w+|\[\d+\]|\['\w+'\])*(?=[\s:,]|$)")
_MESSAGE = re.compile(r"messages\[(\d+)\](\.content.*)?")


class Renames:
    """From paths of one shape of requests to those of another.

    Args:
        patterns: regular expression of a path, or of its beginning -> what takes its place, as in `re.sub`.
        messages: where each message of the chat came from.
    """

    def __init__(self, patterns: Mapping[str, str], messages: Sequence[str] = ()) -> None:
        self._patterns = [(re.compile(rf"(?:{old})(?=[.\[]|$)"), new) for old, new in patterns.items()]
        self._messages = messages

    def __call__(self, path: str) -> str:
        found = _MESSAGE.match(path)
        if found is not None and int(found[1]) < len(self._messages):
            return self._messages[int(found[1])] + (found[2] or "")
        for old, new in self._patterns:
            if old.match(path):
                return old.sub(new, path, count=1)
        return path


@dataclass(frozen=True, slots=True)
class FieldNames:
    """
    Attributes:
        known: names at the top of the request, with which messages of errors begin.
        renames: from them to the client's, one after the other.
        constraint: the field that says what the output must match, if one does.
    """

    known: Collection[str]
    renames: tuple[Renames, ...] = ()
    constraint: str | None = None

    def named(self, error: ApiError) -> ApiError:
        """The error in the client's words."""
        begin = _PATH.match(error.message)
        said = None if begin is None else re.sub(r"\['(\w+)'\]", r".\1", begin[0])
        path = error.param
        if path is None and said is not None and re.split(r"[.\[]", said)[0] in self.known:
            path = said
        if path is None and error.code == "invalid_grammar":
            path = self.constraint
        if path is None or error.status != 400:
            return error
        new = path
        for rename in self.renames:
            new = rename(new)
        message = error.message
        if begin is not None and said is not None and f"{said}.".startswith((f"{path}.", f"{path}[")) and new != path:
            message = new + said[len(path) :] + message[begin.end() :]
        return replace(error, message=message, param=new)


@dataclass(frozen=True, slots=True)
class Converted:
    """The fields of a chat completion that a request of another shape became. renames: back to that shape."""

    fields: Mapping[str, Any]
    renames: Renames = field(default_factory=lambda: Renames({}))


def names_of(body: RequestModel) -> FieldNames:
    """Those of a request in its own shape."""
    known = frozenset(type(body).model_fields)
    if not isinstance(body, GenerateRequest):
        return FieldNames(known)
    constraint = body.constraint_field or ("tools" if getattr(body, "tools", None) else None)
    own = Renames({} if constraint is None else {r"structured_outputs(?:\.\w+)?": constraint})
    return FieldNames(known, (own,) if constraint != "structured_outputs" else (), constraint)


def checked_chat(scope: Any, model: type[Model], found: Converted) -> Model:
    """The chat completion, whose errors from now on have the names of the request that it was. Raises `ApiError`."""
    scope[FIELD_NAMES] = FieldNames(frozenset(model.model_fields), (found.renames,))
    body = checked(model, found.fields)
    own = names_of(body)
    scope[FIELD_NAMES] = replace(own, renames=(*own.renames, found.renames))
    return body
