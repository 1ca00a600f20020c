"""The keys by which Triton finds a kernel in its cache.

Triton makes a function's key from its source, the keys of the functions that it calls, and the constants that all of
them use. But it collects the constants of those whose keys it has made before (3.6 and 3.7), so a key depends on what
was launched before, and what another process compiled is compiled again. Keys that are made callees first do not.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any


def make_key(function: Any) -> None:
    """Have Triton make the key of this function of Triton's, and before it those of the functions that it calls."""
    if getattr(function, "hash", None) is not None:
        return
    try:
        from triton.runtime.jit import JITCallable

        _make(function, JITCallable, set())
    except Exception:  # noqa: BLE001 - of another version of Triton, which makes the key when it is wanted
        return


def make_keys(module: types.ModuleType) -> None:
    """Those of a module's own functions, whose launches may come in any order."""
    for found in list(vars(module).values()):
        if getattr(found, "__module__", "") == module.__name__ and hasattr(found, "used_global_vals"):
            make_key(found)


def _make(function: Any, kind: type, met: set[int]) -> None:
    if id(function) in met or getattr(function, "hash", None) is not None:
        return
    met.add(id(function))
    for called in _called(function, kind):
        _make(called, kind, met)
    function.cache_key  # noqa: B018 - which keeps it


def _called(function: Any, kind: type) -> Iterator[Any]:
    """Functions of Triton's that a function names: by itself, or in a module or a class."""
    names = function.fn.__code__.co_names
    for name in names:
        found = function.fn.__globals__.get(name)
        if isinstance(found, (types.ModuleType, type)):
            yield from (each for each in (getattr(found, name, None) for name in names) if isinstance(each, kind))
        elif isinstance(found, kind):
            yield found
