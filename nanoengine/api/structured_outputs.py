"""`StructuredOutputsParams`: what an output must match, with vLLM's names."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nanoengine.api.errors import ParamsError, shown
from nanoengine.api.grammars import Constraint
from nanoengine.api.json_schema import close_objects

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "json": (
        (str, Mapping, bool),
        "a JSON schema: a mapping or JSON text; of a pydantic model Model.model_json_schema()",
    ),
    "regex": ((str,), "a string"),
    "choice": ((Sequence,), "a list of strings"),
    "grammar": ((str,), "a string"),
    "json_object": ((bool,), "True or False"),
    "structural_tag": ((str, Mapping), "a mapping or JSON text"),
    "disable_any_whitespace": ((bool,), "True or False"),
    "disable_additional_properties": ((bool,), "True or False"),
    "whitespace_pattern": ((str,), "a string"),
    "reasoning": ((str, int), "a token's text or its id"),
}
_OF_JSON = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What an output must match: exactly one of the first six.

    Attributes:
        json: a JSON schema, as a dict or as JSON text. regex: a regular expression for the whole output. choice: texts,
            of which the output is one. grammar: a grammar in Lark's or in EBNF (GBNF) notation. json_object: any JSON
            object. structural_tag: free text with tags whose content follows a schema, as a dict or as JSON text.
        disable_any_whitespace: no white space between the tokens of JSON. whitespace_pattern: a regular expression of
            the white space there. disable_additional_properties: objects of a schema have only the properties that it
            names, unless it says otherwise.
        reasoning: a token (its text, as "</think>", or its id): the constraint begins after it. None: at once, or the
            engine's option.

    Raises `ParamsError` where none or more than one is given, one of a wrong type, or one that cannot be right.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    reasoning: str | int | None = None

    _constraint: ClassVar[Constraint]  # an instance's own

    def __post_init__(self) -> None:
        self._check_types()
        given = [name for name in KINDS if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "none is given"
            raise ParamsError(f"structured_outputs must have exactly one of {', '.join(KINDS)}: {what}")
        kind = given[0]
        options = [name for name in _OF_JSON if getattr(self, name)]
        if options and kind not in ("json", "json_object", "structural_tag"):
            raise ParamsError(f"structured_outputs.{options[0]} is for JSON, and has no effect on {kind}: leave it out")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ParamsError(
                "structured_outputs: disable_any_whitespace and whitespace_pattern contradict: leave one out"
            )
        if self.choice is not None and not self.choice:
            raise ParamsError("structured_outputs.choice must be a list with at least one text, not an empty one")
        if self.grammar is not None and not self.grammar.strip():
            raise ParamsError("structured_outputs.grammar is empty: give a grammar in Lark's or EBNF notation")
        object.__setattr__(self, "_constraint", self._made())  # once: a schema may be large

    def _check_types(self) -> None:
        for name, (kinds, words) in _TYPES.items():
            value = getattr(self, name)
            right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
            if right and name == "choice":
                right = not isinstance(value, str | bytes) and all(isinstance(text, str) for text in value)
            if value is not None and not right:
                raise ParamsError(f"structured_outputs.{name} must be {words}, not {shown(value)}")

    def __hash__(self) -> int:
        return hash((self.constraint(), self.reasoning))

    def constraint(self) -> Constraint:
        """The constraint for a grammar backend."""
        return self._constraint

    def _made(self) -> Constraint:
        """Raises `ParamsError` for JSON that is none, or is no schema."""
        if self.regex is not None:
            return Constraint(kind="regex", text=self.regex)
        if self.choice is not None:
            return Constraint(kind="choice", text=_dumped("choice", list(self.choice)))
        if self.grammar is not None:
            return Constraint(kind="grammar", text=self.grammar)
        space: dict[str, Any] = {
            "any_whitespace": not self.disable_any_whitespace,
            "whitespace_pattern": self.whitespace_pattern,
        }
        if self.structural_tag is not None:
            tag = _parsed("structural_tag", self.structural_tag)
            if not isinstance(tag, Mapping):
                raise ParamsError(f"structured_outputs.structural_tag must be a JSON object, not {shown(tag)}")
            return Constraint(kind="structural_tag", text=_dumped("structural_tag", self._closed(tag)), **space)
        schema = {"type": "object"} if self.json is None else _parsed("json", self.json)
        if not isinstance(schema, Mapping | bool):
            raise ParamsError(f"structured_outputs.json must be a JSON schema: an object, not {shown(schema)}")
        return Constraint(kind="json", text=_dumped("json", self._closed(schema)), **space)

    def _closed(self, value: Any) -> Any:
        """With `disable_additional_properties`: a schema, or the schemas of a structural tag, closed."""
        if not self.disable_additional_properties:
            return value
        if self.structural_tag is None:
            return close_objects(value)
        return _map_values(value, {"schema": close_objects, "json_schema": close_objects})


def _map_values(value: Any, changes: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_map_values(each, changes) for each in value]
    if isinstance(value, Mapping):
        return {k: changes[k](v) if k in changes else _map_values(v, changes) for k, v in value.items()}
    return value


def _parsed(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json_module.loads(value)
    except (ValueError, RecursionError) as error:
        raise ParamsError(f"structured_outputs.{name} is no JSON: {error}: {shown(value)}") from error


def _dumped(name: str, value: Any) -> str:
    try:
        text = json_module.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()  # raises for half of a surrogate pair
    except (TypeError, ValueError, RecursionError) as error:
        raise ParamsError(
            f"structured_outputs.{name} is no JSON: {error}; of a pydantic model give Model.model_json_schema()"
        ) from error
    return text
