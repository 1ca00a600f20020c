"""Every error a user or a plugin author can meet, each naming what, where, the valid choices and the fix.

Torch-free: the command line and the plugin listing raise these before torch is imported.
"""

from __future__ import annotations

import difflib
import reprlib
import sys
import traceback
from collections.abc import Iterable
from typing import Any


class NanoEngineError(Exception):
    """Base of all errors that are somebody's mistake (not the engine's own broken invariant).

    The message has no lone surrogates: what quotes a caller's or a template's words can be printed.
    """

    def __str__(self) -> str:
        return _escaped(super().__str__())


def is_failure(error: BaseException) -> bool:
    """Whether foreign code (a plugin, a tokenizer, a sink …) failed, so that its seam answers for it.

    True for exceptions, `sys.exit()`, the panic of a Rust extension, which pyo3 raises as a `BaseException`, and groups
    of these alone. False for Ctrl-C, the end of a generator and whatever else means the caller: a seam must let those
    through.
    """
    if isinstance(error, KeyboardInterrupt | GeneratorExit):
        return False
    if isinstance(error, Exception | SystemExit):
        return True
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_failure, error.exceptions))
    return any((cls.__module__, cls.__name__) == ("pyo3_runtime", "PanicException") for cls in type(error).__mro__)


def described(error: BaseException) -> str:
    """Any exception in words: its type, its message, and the notes that were added on its way.

    Raises nothing, whatever the exception's own `__str__` does. The text has no lone surrogates, which no file takes.
    """
    message = text_of(error)
    try:
        notes = [text_of(note) for note in getattr(error, "__notes__", ())]
    except BaseException as broken:  # a class may define `__notes__` as it likes
        if not is_failure(broken):
            raise
        notes = [f"its __notes__ raised {type(broken).__name__}"]
    name = type(error).__name__
    return (f"{name}: {message}" if message else name) + "".join(f" ({note})" for note in notes)


def text_of(value: object) -> str:
    """`str(value)` of a foreign value, such as an exception; in its place that this raised. Surrogates are escaped."""
    try:
        text = str(value)
    except BaseException as broken:
        if not is_failure(broken):
            raise
        text = f"its __str__ raised {type(broken).__name__}"
    return _escaped(text)


def _escaped(text: str) -> str:
    return str.encode(text, "utf-8", "backslashreplace").decode()


class ConfigError(NanoEngineError):
    """A configuration file, override or engine option is wrong."""


class DeviceMemoryError(ConfigError):
    """The model, its KV cache or one step does not fit the device's memory; the figures say by how much."""


class PluginError(NanoEngineError):
    """A plugin is missing, broken, incompatible, or clashes with another one."""


class ModelSourceError(NanoEngineError):
    """A model could not be found or fetched; lists every attempt and what to type instead."""


class ModelError(NanoEngineError):
    """A model folder or its config.json cannot be served (unknown architecture, bad or missing field)."""


class WeightsError(ModelError):
    """A checkpoint does not fit the model: tensors missing, unexpected or misshapen, each named."""


class UnsupportedError(NanoEngineError):
    """The chosen part cannot do what the rest of the plan needs; carries every reason."""

    def __init__(self, what: str, reasons: Iterable[str]) -> None:
        self._what, self.reasons = what, tuple(reasons)
        super().__init__(f"{what}: " + "; ".join(self.reasons))

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[str, tuple[str, ...]]]:
        return (type(self), (self._what, self.reasons))


class ParamsError(NanoEngineError, ValueError):
    """A sampling parameter is unknown, of the wrong type or out of range."""


class TokenizerMissing(NanoEngineError):
    """Text was asked of a model that came without a tokenizer."""


class EngineClosed(NanoEngineError):
    """The engine was used after `close()`, or after one of its workers failed (which is its `__cause__` then)."""

    def __init__(self, message: str = "this engine was closed; make a new one") -> None:
        super().__init__(message)


class WorkerError(NanoEngineError):
    """A worker process of a tensor-parallel engine died, hung or raised. It ends that engine; all ranks are ended.

    Attributes:
        rank: which of them. phase: what it was doing: a phase of the start ("spawn", "import", "weights", "profile",
            "capture" …), "step N" or "idle". cause: in one line. traceback: the worker's, or all ranks' stacks.
        outputs: of the requests that were running; where `LLM.generate` raises this, of all prompts that the engine
            had by then, in input order. Those that had finished are whole; of the others this is the `error`'s cause.
    """

    def __init__(self, rank: int, size: int, phase: str, cause: str, traceback: str = "") -> None:
        self.rank, self.size, self.phase, self.cause, self.traceback = rank, size, phase, cause, traceback
        self.outputs: list[Any] = []
        super().__init__(f"{self.summary}\n{traceback}".rstrip())

    @property
    def summary(self) -> str:
        """The message without the traceback."""
        return f"rank {self.rank} of {self.size} failed ({self.phase}): {self.cause}"

    def __reduce__(self) -> tuple[type[WorkerError], tuple[int, int, str, str, str]]:
        return (WorkerError, (self.rank, self.size, self.phase, self.cause, self.traceback))


class RequestError(NanoEngineError):
    """Why one request was refused or broke, while the others go on.

    It is not raised by `generate`: it stands in `RequestOutput.error`, in that request's place.

    Attributes:
        code: a stable word for programs: "too_long", "does_not_fit", "invalid_prompt", "duplicate_id",
            "bad_logits", "nothing_left", "processor_failed", "step_failed", "out_of_memory", "interrupted",
            "worker_failed", "text_failed" (its tokens could not be made text), "engine_failed" (the engine itself
            raised over it, which is a bug of the engine).
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str]]:
        return (RequestError, (self.code, str(self)))


def engine_failure(error: BaseException) -> RequestError:
    """Of a request over which the engine's own code raised `error`: it fails, and the others go on."""
    failure = RequestError("engine_failed", f"the engine raised {described(error)} over this request; please report it")
    failure.__cause__ = error
    return failure


def shown(value: Any) -> str:
    """`repr(value)` for a message, of bounded length; its type where it has none, as an integer of 5,000 digits."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxlong, short.maxother = 4, 200, 60, 200
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 20
    try:
        return short.repr(value)
    except BaseException as broken:  # it may be anybody's
        if not is_failure(broken):
            raise
        return f"a value of type {type(value).__name__}"


def nearest(word: str, choices: Iterable[str]) -> str:
    """The tail of a message on an unknown name: the likely meant one, then all valid ones.

    >>> nearest("top_pp", ["top_p", "top_k"])
    "did you mean 'top_p'? Valid: top_k, top_p"
    """
    names = sorted(set(choices))
    close = difflib.get_close_matches(word[:100], names, n=1, cutoff=0.6)  # its time grows with the word
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Valid: {', '.join(names) if names else '(none)'}"


_TEXTS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little memory, by whichever library's error."""
    torch = sys.modules.get("torch")  # where it is not loaded, it has raised nothing
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    plain = isinstance(error, RuntimeError) and type(error).__module__ in ("builtins", "torch")
    return plain and any(text in text_of(error) for text in _TEXTS)


def own_value(error: BaseException, name: str) -> Any:
    """What Python itself set, as "__traceback__": a foreign class may hide it behind code of its own."""
    return vars(BaseException)[name].__get__(error)


def forget_locals(error: BaseException) -> None:
    """Lets go of what the frames behind `error` and its causes hold, so that keeping the error keeps no memory."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(own_value(each, "__traceback__"))
        todo += [own_value(each, "__cause__"), own_value(each, "__context__")]


_A_PLUGINS = ". If it is a plugin's: install its package, or give --plugin FILE, in Python LLM(plugins=[FILE])"


def nearest_part(word: str, choices: Iterable[str]) -> str:
    """`nearest`; where no name is near, it is no slip of the pen: then also what brings a plugin's part."""
    found = nearest(word, choices)
    return found if found.startswith("did you mean") else f"{found}{_A_PLUGINS}"
