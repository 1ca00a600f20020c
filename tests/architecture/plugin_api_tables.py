"""What docs/plugin-api.md must say of each name of `nanoengine.api`: one table row a public member."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

Row = tuple[str, str]  # (name or signature, type and default)


def rows_of(cls: type[Any]) -> list[Row]:
    """(first cell, second cell) of every public member that `cls` itself declares, as the document writes them."""
    if issubclass(cls, enum.Enum):
        return [(name, repr(member.value)) for name, member in cls.__members__.items()]
    annotations = inspect.get_annotations(cls)
    rows = {name: (name, _typed(cls, name, str(kind))) for name, kind in annotations.items() if _public(name)}
    for name, value in vars(cls).items():
        if isinstance(value, property):
            rows[name] = (name, str(value.fget.__annotations__["return"]))
        elif _is_method(cls, name, value):
            rows[name] = _method(name, value)
    rows |= {name: (name, kind) for name, kind in _instance_attributes(cls) if name not in rows and _public(name)}
    return list(rows.values())


def _public(name: str) -> bool:
    return not name.startswith("_")


def _typed(cls: type[Any], name: str, kind: str) -> str:
    """The annotation, and the default where there is one."""
    found = (
        {field.name: field for field in dataclasses.fields(cls)}.get(name) if dataclasses.is_dataclass(cls) else None
    )
    if found is None:
        return f"{kind} = {_shown(vars(cls)[name])}" if name in vars(cls) else kind
    if found.default_factory is not dataclasses.MISSING:
        return f"{kind} = {found.default_factory()!r}"
    return kind if found.default is dataclasses.MISSING else f"{kind} = {_shown(found.default)}"


def _shown(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, frozenset):
        return f"{{{', '.join(_shown(item) for item in value)}}}" if value else "frozenset()"
    if callable(value):
        return "…"
    return "WeightMap()" if type(value).__name__ == "WeightMap" else repr(value)


def _is_method(cls: type[Any], name: str, value: Any) -> bool:
    if not isinstance(value, staticmethod | classmethod) and not inspect.isfunction(value):
        return False
    if name == "__init__":  # generated ones are the fields; a Protocol's is not its own
        return not dataclasses.is_dataclass(cls) and not getattr(cls, "_is_protocol", False)
    return _public(name)


def _method(name: str, value: Any) -> Row:
    function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    signature = inspect.signature(function)
    shown = [p.name for p in signature.parameters.values() if p.name not in ("self", "cls")]
    return f"{name}({', '.join(shown)})", "" if name == "__init__" else str(signature.return_annotation)


def _instance_attributes(cls: type[Any]) -> Iterator[Row]:
    """Public `self.x = …` of a written `__init__`."""
    init = vars(cls).get("__init__")
    if dataclasses.is_dataclass(cls) or not inspect.isfunction(init) or getattr(cls, "_is_protocol", False):
        return
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(init)))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr, ""
