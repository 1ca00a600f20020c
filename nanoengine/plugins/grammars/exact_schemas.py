"""Writes some keywords of a JSON schema in a form that llguidance does not take more widely than JSON Schema means it.

Its `date` has a February 29 in each year, its `time` a leap second at each minute; `\\s` in a pattern is that of Rust,
where ECMAScript also counts U+FEFF. A leap second is not accepted at all, as which ones there are is not in the text.
"""

from __future__ import annotations

import json
import re
from typing import Any

from nanoengine.api import GrammarError
from nanoengine.api.json_schema import map_schemas

_DATE = (
    "(?:(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8])))"
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_TIME = "(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]+)?(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9]))"
_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[Tt]{_TIME}$"}
_DRAFT_7_ASSERTS = ("contentEncoding", "contentMediaType")  # in newer drafts they are comments


def exact(schema: Any) -> Any:
    """A copy of the schema with these keywords rewritten.

    Raises `GrammarError` for a dialect with keywords that llguidance does not read: they would be ignored.
    """
    dialect = str(schema.get("$schema", "")) if isinstance(schema, dict) else ""
    if "json-schema.org/draft-03" in dialect:
        raise GrammarError("JSON Schema draft 3 is not supported: write the schema in draft 4 or newer")
    asserts = _DRAFT_7_ASSERTS if "json-schema.org/draft-07" in dialect else ()

    def change(each: dict[str, Any]) -> dict[str, Any]:
        found = [name for name in asserts if name in each]
        if found:
            raise GrammarError(f"{found[0]} of JSON Schema draft 7 is not supported: leave it out")
        return _exact(each)

    return map_schemas(schema, change)


def allowed_escapes(schema: Any) -> str | None:
    """The escapes that texts of this schema may have, as llguidance names them; None: all.

    Without \\u where names are open: with them a name of a property could be written again, and then be taken for
    another one. llguidance leaves characters out that it may not write, so with those this is a `GrammarError`.
    """
    open_names, control = False, False

    def look(each: dict[str, Any]) -> dict[str, Any]:
        nonlocal open_names, control
        named = any(name in each for name in ("properties", "patternProperties", "minProperties"))
        open_names |= named and each.get("additionalProperties") is not False
        texts = [each.get("const"), each.get("enum"), _names(each.get("properties"))]
        patterns = [str(each.get("pattern", "")), *_names(each.get("patternProperties"))]
        control |= bool(_CONTROL.search(json.dumps(texts))) or any(map(_CONTROL_IN_PATTERN.search, patterns))
        return each

    map_schemas(schema, look)
    if not open_names:
        return None
    if control:
        raise GrammarError(
            "a control character in a text or pattern is not supported next to properties that the schema does not "
            "name: write additionalProperties: false, also in the schemas inside"
        )
    return 'nrbtf\\"'


def _names(properties: Any) -> list[str]:
    return list(properties) if isinstance(properties, dict) else []


_CONTROL = re.compile(r"\\u00(?:[01]|7f)|\x7f")  # in JSON, where \n and others are short
_CONTROL_IN_PATTERN = re.compile(
    r"[\x00-\x07\x0b\x0e-\x1f\x7f]|\\(?:x(?:[01]|7[fF])|u(?:00[01]|007[fF]|\{0*(?:1?[0-9a-fA-F]|7[fF])\})|[0acv])"
)


def _exact(schema: dict[str, Any]) -> dict[str, Any]:
    _check_number_of_properties(schema)
    if isinstance(schema.get("pattern"), str):
        schema["pattern"] = _ecmascript(schema["pattern"])
    by_pattern = schema.get("patternProperties")
    if isinstance(by_pattern, dict):
        schema["patternProperties"] = {_ecmascript(name): each for name, each in by_pattern.items()}
    pattern = _FORMATS.get(schema["format"]) if isinstance(schema.get("format"), str) else None
    if pattern is None:
        return schema
    del schema["format"]
    if "pattern" not in schema:
        return {**schema, "pattern": pattern}
    return {**schema, "allOf": [*schema.get("allOf", ()), {"pattern": pattern}]}


def _check_number_of_properties(schema: dict[str, Any]) -> None:
    """Raises `GrammarError` where properties could be counted twice: other names than the schema's may be repeated."""
    least, required = schema.get("minProperties"), schema.get("required")
    named = len(set(map(str, required))) if isinstance(required, list) else 0
    if isinstance(least, int) and least > named + 1:
        raise GrammarError(
            f"minProperties {least} is not supported with {named} required properties, as the same name could be "
            f"counted twice: name {least - 1} of them in `required`"
        )


def json_space(pattern: str) -> str:
    """A pattern of white space, in which `\\s` is the white space that JSON has."""
    return _ecmascript(pattern, r" \t\n\r")


def _ecmascript(pattern: str, space: str = r"\s\x{FEFF}") -> str:
    """The pattern with ECMAScript's white space, which includes U+FEFF, or another one."""
    out, i, in_class = [], 0, False
    while i < len(pattern):
        two = pattern[i : i + 2]
        if two == "\\s":
            out.append(space if in_class else f"[{space}]")
        elif two == "\\S":
            out.append(f"[^{space}]")
        elif two[0] == "\\":
            out.append(two)
        else:
            in_class = two[0] == "[" or (in_class and two[0] != "]")
            out.append(two[0])
            i -= 1
        i += 2
    return "".join(out)
