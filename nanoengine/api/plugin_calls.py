"""Calls of a plugin's code: what such a call raises names the plugin, the file, the line and the fix.

All interfaces use these functions. Errors of `api/errors.py` are raised on unchanged, because a plugin raises them on
purpose; except `WorkerError` and `EngineClosed`, which would end the engine. Out-of-memory errors and Ctrl-C are raised
on unchanged too, because they are not the plugin's fault.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from types import FrameType
from typing import Any

from nanoengine.api.errors import (
    EngineClosed,
    NanoEngineError,
    PluginError,
    RequestError,
    WorkerError,
    described,
    is_failure,
    is_out_of_memory,
    own_value,
    shown,
)
from nanoengine.api.specs import PROJECT, Origin

_ENGINE_ENDS = (WorkerError, EngineClosed)
FILE_MODULE = "nanoengine_plugin_"  # a plugin file's module name begins so: `setup.plugins.discover.plugin_file`


@contextmanager
def plugin_call(
    what: str,
    owner: Any,
    raises: type[NanoEngineError] = PluginError,
    passing: tuple[type[Exception], ...] = (NanoEngineError,),
    others: Sequence[Any] = (),
) -> Iterator[None]:
    """A context for a call of a plugin's code at the start, or for one request.

    Args:
        what: the begin of the message, as in "pkg.module:Class.read_config failed".
        owner: the class or function that is called, or the name of its module.
        raises: type of the error that is raised instead of the plugin's exception, which becomes its cause.
        passing: types of exceptions that are raised on unchanged.
        others: classes whose code the call may run; if one of them raised the exception, a `PluginError` names it.
    """
    try:
        yield
    except BaseException as error:
        passes = isinstance(error, passing) and not isinstance(error, _ENGINE_ENDS)
        if passes or not is_failure(error) or is_out_of_memory(error):
            raise
        reached = _reached(error, (owner, *others))
        if reached is not owner:
            what, owner, raises = f"{name_of(reached)} failed", reached, PluginError
        raise raises(f"{what}: {described(error)}{place_and_fix(error, owner, what)}") from error


@contextmanager
def failing_request(code: str, what: str, owner: Any) -> Iterator[None]:
    """A context for a call of a plugin's code that fails one request, whatever it raises: `RequestError(code)`.

    what: the begin of the message, as in "draft() of drafter 'x'". owner: the class that is called.
    """
    try:
        yield
    except BaseException as error:
        if not is_failure(error):
            raise
        text = f"{what} failed: {described(error)}"
        raise RequestError(code, text + place_and_fix(error, owner, text)) from error


@contextmanager
def plugin_step(what: str, owner: Any, *others: Any) -> Iterator[None]:
    """A context for a call of a plugin's code in a step: an exception keeps its type, and gets a note about the plugin.

    These become a `PluginError`, so that they fail a request but never end the process or the engine: `sys.exit()`, a
    Rust panic, any other `BaseException` except Ctrl-C that a line of the plugin raises, `WorkerError`, `EngineClosed`,
    and exceptions that accept no note. A `PluginError` that names its plugin is raised on unchanged.

    Args:
        what: the call, as in "pkg.module:Class.forward".
        owner: the class or function that is called, or the name of its module.
        others: classes whose code the call may run; if one of them raised the exception, the note names that one.
    """
    try:
        yield
    except BaseException as error:
        named = isinstance(error, PluginError) and any(name_of(each) in str(error) for each in (owner, *others))
        if named or not _is_their_failure(error, owner, *others) or is_out_of_memory(error):
            raise
        reached = _reached(error, (owner, *others))
        if reached is not owner:
            what, owner = name_of(reached), reached
        tail = place_and_fix(error, owner, what)
        keeps = isinstance(error, Exception) and not isinstance(error, _ENGINE_ENDS)
        # an error in nanoengine's own part needs no note about a plugin
        if keeps and (is_ours(owner) or _noted(error, f"in {what}", tail.removeprefix(", "))):
            raise
        did = f"raised {described(error)}"
        if isinstance(error, SystemExit):
            code = vars(SystemExit)["code"].__get__(error)  # a subclass may override it
            did = f"called sys.exit({'' if code is None else shown(code)})"
        raise PluginError(f"{what} {did}{tail}") from error


def _is_their_failure(error: BaseException, *owners: Any) -> bool:
    """Whether `error` is a failure, or another `BaseException` that a line of the owners' code raised itself.

    What a signal handler of the caller raises comes from a line of that handler. Python's own Ctrl-C has no handler
    frame and may appear at any line, so it is never counted as theirs.
    """
    if is_failure(error) or isinstance(error, KeyboardInterrupt):
        return is_failure(error)
    return any(_is_own(file, root_of(owner)) for file, _ in _frames(error)[-1:] for owner in owners)


def _noted(error: BaseException, *notes: str) -> bool:
    """Adds notes to `error`. Returns False if its class does not allow that."""
    try:
        had = getattr(error, "__notes__", ())  # one that is raised a second time
        for note in notes:
            if note not in had:
                error.add_note(note)
    except BaseException as broken:
        if not is_failure(broken):
            raise
        return False
    return True


def _reached(error: BaseException, owners: tuple[Any, ...]) -> Any:
    """The owner whose code raised `error`: that of the innermost frame in one of their methods, else in a package."""
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
    """ "package.module:Class" for a class; a module's name is returned unchanged."""
    return owner if isinstance(owner, str) else f"{owner.__module__}:{owner.__qualname__}"


def origin_of(owner: Any) -> Origin | None:
    """The plugin file or installed package that has the class or module. None: passed in Python, or unknown."""
    module = owner if isinstance(owner, str) else str(getattr(owner, "__module__", ""))
    if module.startswith(FILE_MODULE):
        file = getattr(sys.modules.get(module), "__file__", None)
        return Origin(plugin=module, module=module, file=file)
    top = module.partition(".")[0]
    found = [e for e in entry_points(group=PROJECT) if e.module.partition(".")[0] == top and e.dist is not None]
    if not found:
        return None
    entry = next((each for each in found if f"{module}.".startswith(f"{each.module}.")), found[0])
    assert entry.dist is not None
    return Origin(plugin=entry.name, distribution=entry.dist.name, version=entry.dist.version, module=entry.value)


def place_and_fix(error: BaseException | None, owner: Any, message: str = "") -> str:
    """The end of a message: the plugin, file and line that raised `error` (else those of `owner`), and the fix.

    `message`: the message so far. If it names the plugin, the plugin is not named again.
    """
    origin = origin_of(owner)
    own = [] if error is None else [frame for frame in _frames(error) if _is_own(frame[0], root_of(owner))]
    file, line = own[-1] if own else _defined(owner)
    place = f", {file}, line {line}" if file else ""
    if is_ours(owner):
        return place
    if origin is None:
        return f"{place}; fix it there"
    known = "" if origin.file is not None or str(origin) in message else f", of {origin}"
    return f"{known}{place}" + (f"; fix it there, or {origin.fix}" if origin.fix else "")


def root_of(owner: Any) -> str:
    """The folder of the package that has the class or module; without a package, its file."""
    module = owner if isinstance(owner, str) else str(getattr(owner, "__module__", ""))
    top = ".".join(module.split(".")[: 2 if is_ours(owner) else 1])
    found = sys.modules.get(top)
    file = getattr(found, "__file__", None) or getattr(sys.modules.get(module), "__file__", None) or ""
    return os.path.dirname(file) + os.sep if hasattr(found, "__path__") and file else file


def is_ours(owner: Any) -> bool:
    """Whether a class or function, or the module of this name, is built in."""
    module = owner if isinstance(owner, str) else str(getattr(owner, "__module__", ""))
    return module.partition(".")[0] == PROJECT


def _is_own(file: str, root: str) -> bool:
    return bool(root) and (file == root or (root.endswith(os.sep) and file.startswith(root)))


def _frames(error: BaseException) -> list[tuple[str, int]]:
    return [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(own_value(error, "__traceback__"))]


def _defined(owner: Any) -> tuple[str, int]:
    """File and line of a class or function; ("", 0) if they are not known."""
    try:
        if isinstance(owner, str):
            return getattr(sys.modules.get(owner), "__file__", None) or "", 1
        return inspect.getsourcefile(owner) or "", inspect.getsourcelines(owner)[1]
    except (OSError, TypeError):
        return "", 0


def called_by(frame: FrameType) -> bool:
    """Whether `frame` is a call that led to this one. One that an interrupt has left behind is none."""
    caller: FrameType | None = sys._getframe()
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


def no_interrupt(error: BaseException) -> PluginError:
    """The error for what looks like an interrupt, on a thread that gets none."""
    raised = traceback.extract_tb(own_value(error, "__traceback__"))[-1]
    found = PluginError(f"{raised.filename}, line {raised.lineno} raised {described(error)} without an interrupt")
    found.__cause__ = error
    return found
