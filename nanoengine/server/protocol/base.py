"""From the bytes of a request to its model, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from nanoengine.api.errors import nearest
from nanoengine.server.errors import ApiError, invalid, shortened

Model = TypeVar("Model", bound="RequestModel")
_MOST_DEPTH = 128
_MOST_BRACKETS = 1 << 20  # of lists and objects, whose decoding stops the event loop; also those in texts
_TYPES = frozenset({"str", "int", "float", "bool"})  # parts of a union, in the path of an error; models' are upper-case


class _FailFast(FailFast):
    __hash__ = object.__hash__  # so that it may be in a union


FIRST_ERROR = _FailFast()
"""Of a list: its check ends at the first wrong entry, and not with an error for each of a million."""


Name = Annotated[str, Field(max_length=256)]
"""Who asks, which limits and counters keep."""


def _refuse_true(value: bool) -> bool:
    if value:
        raise ValueError("only false is supported here")
    return value


OnlyFalse = Annotated[bool, AfterValidator(_refuse_true)]
"""Not `Literal[False]`, which takes 0."""


class RequestModel(BaseModel):
    """Base of all request models: an unknown field is an error, and a value is not converted.

    Class attributes:
        not_supported: fields that other servers have, and what to do instead.
    """

    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, protected_namespaces=())

    not_supported: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        return _without_nulls(cls, given) if isinstance(given, dict) else given

    def given(self, name: str) -> bool:
        """Whether the client sent this field with a value; null is no value."""
        return name in self.model_fields_set and getattr(self, name) is not None


def parsed(model: type[Model], body: bytes) -> Model:
    """Raises `ApiError` that names the first wrong field."""
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > _MOST_BRACKETS:
        raise invalid(f"the body has {brackets} brackets, and at most {_MOST_BRACKETS} are read", code="invalid_json")
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {shortened(str(error), 300)}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise invalid(f"the body must be a JSON object, not {type(data).__name__}", code="invalid_json")
    if brackets > _MOST_DEPTH:
        _refuse_deep(data)
    _refuse_unknown(model, _without_nulls(model, data))
    return checked(model, data)


def checked(model: type[Model], fields: Mapping[str, Any]) -> Model:
    """The model of these fields, also of those that a request of another shape became. Raises `ApiError`."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _explained(model, _clearest(error.errors(include_url=False, include_input=False))) from None


def _clearest(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """That of the first wrong field which says most: a field of several types has an error for each of them."""
    of_field = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    return max(of_field, key=lambda error: (not error["type"].endswith("_type"), len(error["loc"])))


def _refuse_deep(data: Any) -> None:
    """So that what reads it may recurse: templates, schemas, grammars."""
    level = [data]
    for _ in range(_MOST_DEPTH):
        level = [
            child
            for each in level
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise invalid(f"the body is nested more than {_MOST_DEPTH} levels deep", code="invalid_json")


def _without_nulls(model: type[RequestModel], data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Some clients write every field that they know, and null where nothing is wanted."""
    nulls = [name for name in model.not_supported if data.get(name, 0) is None]
    return {name: value for name, value in data.items() if name not in nulls} if nulls else data


def _refuse_unknown(model: type[RequestModel], data: Mapping[str, Any]) -> None:
    """Before pydantic would list all of them."""
    for name in data:
        if name not in model.model_fields:  # fields at the top have no aliases
            raise _unknown(model, name, name)


def _unknown(model: type[RequestModel] | None, name: str, where: str) -> ApiError:
    known = [] if model is None else [field.alias or key for key, field in model.model_fields.items()]
    advice = model.not_supported.get(name) if model is not None else None
    hint = f"it is not supported: {advice}" if advice is not None else nearest(name, known)
    return invalid(f"unknown field {shortened(where, 200)!r}: {hint}", param=where, code="unknown_field")


def _explained(model: type[RequestModel], error: ErrorDetails) -> ApiError:
    where = _path(error["loc"])
    if error["type"] == "extra_forbidden":
        return _unknown(_model_at(model, error["loc"][:-1]), str(error["loc"][-1]), where)
    context = error.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, ApiError):
        return cause
    message = str(cause) if cause is not None else error["msg"]
    return invalid(f"{where}: {message}" if where else message, param=where or None)


def _path(loc: Sequence[int | str]) -> str:
    """ "messages[3].content" of pydantic's ("messages", 3, "content"); names of a union's parts are left out."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not text or (part.isidentifier() and part not in _TYPES and not part[0].isupper()):
            text += f".{part}" if text else part
    return text


def _model_at(model: type[RequestModel], loc: Sequence[int | str]) -> type[RequestModel] | None:
    """The model of a nested field, to name its fields."""
    found: Any = model
    for part in loc:
        if isinstance(part, int) or found is None:
            continue
        field = getattr(found, "model_fields", {}).get(part)
        if field is not None:
            found = _model_in(field.annotation)
    return found if isinstance(found, type) and issubclass(found, RequestModel) else None


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type):
        return annotation
    parts = getattr(annotation, "__args__", ())
    return next(
        (found for part in parts if isinstance(found := _model_in(part), type) and issubclass(found, BaseModel)), None
    )
