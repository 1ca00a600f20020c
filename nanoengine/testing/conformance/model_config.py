"""What a model makes of config.json: each field is read or refused, and a wrong one raises a `ModelError`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from nanoengine.api import Model, ModelError
from nanoengine.api.errors import described, is_failure
from nanoengine.api.parallel import SingleRank
from nanoengine.layers.config_keys import HARMLESS, REFUSED, Recorded, unread_keys
from nanoengine.layers.hf_config import shown
from nanoengine.setup.start.build_model import build_model
from nanoengine.testing.conformance.failure import ConformanceError, require

_FIX = (
    "read it, or reject values that are not supported with nanoengine.layers.hf_config.Fields.refuse; a field that "
    "changes no result: Fields.unused, or harmless=[...] of check_model"
)
_Path = tuple[str, ...]


def check_config(model: type[Model], hf: Mapping[str, Any], harmless: Sequence[str]) -> None:
    """Checks that a missing field, or one with a wrong type, raises a `ModelError`; also in objects in the file.

    A text, true or false is a choice: one that may be anything, and changes nothing, is ignored. The core decides about
    `HARMLESS` and `REFUSED` fields.
    """
    usual = _read(model, recorded := Recorded(hf), "as it is")
    for path in _paths(hf):
        value, name = _value(hf, path), ".".join(path)
        _read(model, _changed(hf, path), f"without {name!r}")
        wrong: Any = 17 if isinstance(value, str) else "wrong"
        found = _read(model, _changed(hf, path, wrong), f"with {name} = {wrong!r}")
        ignored = isinstance(value, str | bool) and found is not None and found == usual
        require(
            not ignored or _may_be_ignored(recorded, path, harmless),
            f"{model.__name__} ignores config.json's {name} = {shown(value)}: with {wrong!r} its config is the same; "
            + _FIX,
        )


def _may_be_ignored(read: Recorded, path: _Path, harmless: Sequence[str]) -> bool:
    """Whether a field, or an object that it is in, is the core's business, changes no result, or the model said so."""
    for depth, name in enumerate(path):
        above: Recorded = _value(read, path[:depth])
        if name in HARMLESS or name in REFUSED or name in above.unused or ".".join(path[: depth + 1]) in harmless:
            return True
    return False


def check_unread(model: type[Model], hf: Mapping[str, Any], harmless: Sequence[str]) -> None:
    """Checks that the model reads every field that may change its results."""
    recorded = Recorded(hf)
    build_model(model, recorded, tp=SingleRank(), dtype=torch.float32, device="meta")
    unread = [line for line in unread_keys(recorded) if line.partition(" = ")[0] not in harmless]
    require(not unread, f"{model.__name__}.read_config never reads config.json's {', '.join(unread)}; {_FIX}")


def _read(model: type[Model], hf: Mapping[str, Any], how: str) -> Any:
    """The model's config; None if it raises a `ModelError`."""
    try:
        return model.read_config(hf)
    except ModelError:
        return None
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ConformanceError(
            f"{model.__name__}.read_config {how} raised {described(error)}; "
            "a wrong config.json must raise a ModelError that names the field"
        ) from error


def _paths(hf: Mapping[str, Any], above: _Path = ()) -> Iterator[_Path]:
    """Every field, and the fields of objects in it."""
    for name, value in hf.items():
        yield (*above, name)
        if isinstance(value, Mapping):
            yield from _paths(value, (*above, name))


def _value(hf: Mapping[str, Any], path: _Path) -> Any:
    value: Any = hf
    for name in path:
        value = value[name]
    return value


def _changed(hf: Mapping[str, Any], path: _Path, *value: Any) -> dict[str, Any]:
    """A copy with another value in a field; without a value: without the field."""
    name, *rest = path
    if rest:
        return {**hf, name: _changed(hf[name], tuple(rest), *value)}
    found = {key: other for key, other in hf.items() if key != name}
    return {**found, name: value[0]} if value else found
