"""`SamplingParams`, with vLLM's names and defaults. Core fields are checked here, fields of processors when resolved.

The valid fields depend on the processors that plugins register. So `SamplingParams` accepts any keyword, and
`ParamsResolver` (one per engine) checks it when a request is submitted. Imports no torch.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nanoengine.api.errors import ParamsError, described, is_failure, shown
from nanoengine.params.field_types import conform
from nanoengine.params.sampling_fields import (
    CORE_TYPES,
    CoreFields,
)
from nanoengine.params.signatures import SamplingSignature


class SamplingParams(SamplingSignature):
    """How to sample: `SamplingParams(temperature=0.8, top_p=0.95, max_tokens=64)`.

    Keywords are the parameters of the engine itself (n, seed, max_tokens, stop ...), and those of the logits processors
    (temperature, top_p, bad_words ...), also of plugins. docs/reference.md lists them.

    The engine's own are checked here. The others are checked when a request is submitted, because only the engine knows
    its processors. Immutable: `replace` returns a changed copy. A processor's parameter can be read only if it was
    given.
    """

    __slots__ = ("_core", "_key", "_processor")
    __signature__ = inspect.signature(SamplingSignature)
    _core: CoreFields
    _key: Hashable
    _processor: dict[str, Any]

    if not TYPE_CHECKING:  # which reads the signatures of `SamplingSignature`

        def __init__(self, /, *by_place: object, **fields: Any) -> None:
            self._set(by_place, fields)

        def replace(self, /, *by_place: object, **changes: Any) -> SamplingParams:
            return self._replaced(by_place, changes)

        __init__.__doc__, replace.__doc__ = SamplingSignature.__init__.__doc__, SamplingSignature.replace.__doc__
        replace.__signature__ = inspect.signature(SamplingSignature.replace)

    def _set(self, by_place: Sequence[object], fields: dict[str, Any]) -> None:
        _keywords_only("SamplingParams", by_place)
        core = {name: conform(name, fields.pop(name), kind) for name, kind in CORE_TYPES.items() if name in fields}
        object.__setattr__(self, "_core", CoreFields(**core))
        object.__setattr__(self, "_processor", {name: _own(name, value) for name, value in fields.items()})
        object.__setattr__(self, "_key", None)

    @property
    def core(self) -> CoreFields:
        """The fields of the engine itself, checked."""
        return self._core

    @property
    def processor_fields(self) -> Mapping[str, Any]:
        """The fields that are not core fields, not checked."""
        return types.MappingProxyType(self._processor)

    @property
    def key(self) -> Hashable:
        """Equal for equal parameters only. Computed once, because a batch compares thousands of them."""
        if self._key is None:
            core = tuple(_frozen(getattr(self._core, name)) for name in CORE_TYPES)
            object.__setattr__(self, "_key", (core, _frozen(self._processor)))
        return self._key

    def _replaced(self, by_place: Sequence[object], changes: Mapping[str, Any]) -> SamplingParams:
        _keywords_only("replace", by_place)
        return SamplingParams(**{**self._fields(), **changes})

    def given_fields(self) -> dict[str, Any]:
        """The core fields that differ from their defaults, and the fields of logits processors that were given."""
        plain = CoreFields()
        return {k: v for k, v in self._fields().items() if k in self._processor or v != getattr(plain, k)}

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self._core, name) for name in CORE_TYPES} | self._processor

    def __getattr__(self, name: str) -> Any:
        if name in CORE_TYPES:
            return getattr(self._core, name)
        if not name.startswith("_") and name in self._processor:
            return self._processor[name]
        raise AttributeError(
            f"SamplingParams has no value for {name!r}: it was not given, and only the engine knows the default"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"SamplingParams is immutable: use params.replace({name}=...)")

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if isinstance(other, SamplingParams) else NotImplemented

    def __repr__(self) -> str:
        return f"SamplingParams({', '.join(f'{k}={v!r}' for k, v in self.given_fields().items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self._fields(),))


def _keywords_only(name: str, by_place: Sequence[object]) -> None:
    if by_place:
        raise ParamsError(
            f"{name} takes keywords only, but {shown(by_place[0])} has no name: write for example "
            f"{name}(temperature=0.8, max_tokens=64)"
        )


def _rebuild(fields: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**fields)


def _own(name: str, value: Any) -> Any:
    """A copy that the caller cannot change. Raises `ParamsError` if it cannot be copied: a lock, a recursive list."""
    try:
        parts = value if isinstance(value, list | tuple) else [value]
        found = copy.deepcopy(value, {id(each): each for each in parts if callable(each)})  # which may have a state
        hash(_frozen(found))
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ParamsError(f"{name}: {shown(value)} cannot be a parameter: {described(error)}") from error
    return found


_ATOMS = frozenset({type(None), bool, int, float})


def _frozen(value: Any) -> Hashable:
    """A key that is equal for equal values only. Types count: for the checks True is not 1."""
    if type(value) in _ATOMS:
        return (type(value), value)
    if isinstance(value, Mapping):  # every mapping is read as a dict
        return (dict, tuple((_frozen(k), _frozen(v)) for k, v in value.items()))
    if isinstance(value, str | bytes) and type(value) in (str, bytes):
        return value
    if isinstance(value, np.ndarray):
        return (np.ndarray, value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, list | tuple | set | frozenset | range):
        return (type(value), *map(_frozen, value))
    return (type(value), value if isinstance(value, Hashable) else object())  # not hashable: equal to nothing
