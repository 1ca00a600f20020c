"""Calls of a plugin's code: whatever they raise says whose code it was, in which file and line, and what to do.

One mechanism for all seams. An error of `api/errors.py`, which a plugin raises on purpose, goes through as it is, but
for `WorkerError` and `EngineClosed`, which mean the end of an engine; so does what is no plugin's fault: the end of
memory, Ctrl-C.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

from nanoengine.api.errors import (
    EngineClosed,
    NanoEngineError,
    PluginError,
    WorkerError,
    described,
    is_failure,
    is_out_of_memory,
    own_value,
    shown,
)
from nanoengine.api.specs import PROJECT, Origin

_ENGINE_ENDS = (WorkerError, EngineClosed)
_FILE_MODULE = "nanoengine_plugin_"  # what plugin files are loaded as, see `plugins.plugin_file`


@contextmanager
def plugin_call(
    what: str,
    owner: Any,
    raises: type[NanoEngineError] = PluginError,
    passing: tuple[type[Exception], ...] = (NanoEngineError,),
) -> Iterator[None]:
    """Around a call of a plugin's code at start, or for one request.

    Args:
        what: was called and failed, as in "pkg.module:Class.read_config failed".
        owner: class, function or name of the module whose code it is.
        raises: what is raised in place of its exception, with that as the cause. passing: what goes through.
    """
    try:
        yield
    except BaseException as error:
        passes = isinstance(error, passing) and not isinstance(error, _ENGINE_ENDS)
        if passes or not is_failure(error) or is_out_of_memory(error):
            raise
        raise raises(f"{what}: {described(error)}{place_and_fix(error, owner, what)}") from error


@contextmanager
def plugin_step(what: str, owner: Any, *others: Any) -> Iterator[None]:
    """Around a call of a plugin's code in a step: its exception keeps its type, and gets a note on whose code it is.

    `sys.exit()`, a Rust panic, whatever but Ctrl-C a line of its own raises that is no exception, what means the end of
    an engine, and what takes no note become a `PluginError`: they break a request, never the process or the engine. A
    `PluginError` that names its plugin goes through. `others`: classes that the call may reach; where the exception
    comes from one of them, the note says so.
    """
    try:
        yield
    except BaseException as error:
        named = isinstance(error, PluginError) and any(name_of(each) in str(error) for each in (owner, *others))
        if named or not _answers_for(error, owner, *others) or is_out_of_memory(error):
            raise
        reached = _reached(error, (owner, *others))
        if reached is not owner:
            what, owner = name_of(reached), reached
        tail = place_and_fix(error, owner, what)
        keeps = isinstance(error, Exception) and not isinstance(error, _ENGINE_ENDS)
        # nanoengine's own part needs no plugin's author
        if keeps and (_is_ours(owner) or _noted(error, f"in {what}", tail.removeprefix(", "))):
            raise
        did = f"raised {described(error)}"
        if isinstance(error, SystemExit):
            code = vars(SystemExit)["code"].__get__(error)  # its class may hide it
            did = f"called sys.exit({'' if code is None else shown(code)})"
        raise PluginError(f"{what} {did}{tail}") from error


def _answers_for(error: BaseException, *owners: Any) -> bool:
    """Whether it is a failure, or what else a line of theirs raised: a handler of the caller's raises its interrupts.

    Ctrl-C has no handler in Python, and may stand at any line.
    """
    if is_failure(error) or isinstance(error, KeyboardInterrupt):
        return is_failure(error)
    return any(_is_own(file, root_of(owner)) for file, _ in _frames(error)[-1:] for owner in owners)


def _noted(error: BaseException, *notes: str) -> bool:
    """Adds notes; False where its class takes none."""
    try:
        for note in notes:
            error.add_note(note)
    except BaseException as broken:
        if not is_failure(broken):
            raise
        return False
    return True


def _reached(error: BaseException, owners: tuple[Any, ...]) -> Any:
    """Whose code the exception comes from: the innermost frame of a method of theirs, or else of a package, decides."""
    frames = [frame for frame, _ in traceback.walk_tb(own_value(error, "__traceback__"))][::-1]
    for frame in frames:
        method = f"{frame.f_globals.get('__name__')}:{frame.f_code.co_qualname}"
        for owner in owners:
            if method.startswith(f"{name_of(owner)}."):
                return owner
    roots = [root_of(owner) for owner in owners]
    for frame in frames:
        for owner, root in zip(owners, roots, strict=True):
            if _is_own(frame.f_code.co_filename, root):
                return owner
    return owners[0]


def name_of(owner: Any) -> str:
    """ "package.module:Class" of a class; the name of a module."""
    return owner if isinstance(owner, str) else f"{owner.__module__}:{owner.__qualname__}"


def origin_of(owner: Any) -> Origin | None:
    """The plugin file or installed package that a class or module is of; None: handed over in Python, or unknown."""
    module = owner if isinstance(owner, str) else str(getattr(owner, "__module__", ""))
    if module.startswith(_FILE_MODULE):
        file = getattr(sys.modules.get(module), "__file__", None)
        return Origin(plugin=module, module=module, file=file)
    top = module.partition(".")[0]
    found = [e for e in entry_points(group=PROJECT) if e.module.partition(".")[0] == top and e.dist is not None]
    if not found:
        return None
    entry = next((each for each in found if f"{module}.".startswith(f"{each.module}.")), found[0])
    assert entry.dist is not None
    return Origin(plugin=entry.name, distribution=entry.dist.name, version=entry.dist.version, module=entry.value)


def place_and_fix(error: BaseException | None, owner: Any, said: str = "") -> str:
    """The tail of a message: the plugin, file and line that `error` came from (else where `owner` is), and the fix.

    `said`: the message so far, which may name the plugin already.
    """
    origin = origin_of(owner)
    own = [] if error is None else [frame for frame in _frames(error) if _is_own(frame[0], root_of(owner))]
    file, line = own[-1] if own else _defined(owner)
    place = f", {file}, line {line}" if file else ""
    if _is_ours(owner):
        return place
    if origin is None:
        return f"{place}; fix it there"
    known = "" if origin.file is not None or str(origin) in said else f", of {origin}"
    return f"{known}{place}" + (f"; fix it there, or {origin.fix}" if origin.fix else "")


def root_of(owner: Any) -> str:
    """Folder of the package that a class or module is of, or its file."""
    module = owner if isinstance(owner, str) else str(getattr(owner, "__module__", ""))
    top = ".".join(module.split(".")[: 2 if _is_ours(owner) else 1])
    found = sys.modules.get(top)
    file = getattr(found, "__file__", None) or getattr(sys.modules.get(module), "__file__", None) or ""
    return os.path.dirname(file) + os.sep if hasattr(found, "__path__") and file else file


def _is_ours(owner: Any) -> bool:
    module = owner if isinstance(owner, str) else str(getattr(owner, "__module__", ""))
    return module.partition(".")[0] == PROJECT


def _is_own(file: str, root: str) -> bool:
    return bool(root) and (file == root or (root.endswith(os.sep) and file.startswith(root)))


def _frames(error: BaseException) -> list[tuple[str, int]]:
    return [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(own_value(error, "__traceback__"))]


def _defined(owner: Any) -> tuple[str, int]:
    """File and line of a class or function; ("", 0) where they are not known."""
    try:
        if isinstance(owner, str):
            return getattr(sys.modules.get(owner), "__file__", None) or "", 1
        return inspect.getsourcefile(owner) or "", inspect.getsourcelines(owner)[1]
    except (OSError, TypeError):
        return "", 0
