"""The errors that users and plugin authors see. Each names what is wrong, where, the valid choices and the fix.

This module imports no torch: the command line and the plugin listing raise these errors before torch is imported.
"""

from __future__ import annotations

import difflib
import reprlib
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any


class NanoEngineError(Exception):
    """Base class of errors that a user, a plugin or the environment causes (not a bug of the engine).

    The message has no lone surrogates, so it can always be printed, even if it quotes a prompt or a template.
    """

    def __str__(self) -> str:
        return _escaped(super().__str__())


def is_failure(error: BaseException) -> bool:
    """Whether `error` means that foreign code (a plugin, a tokenizer, a sink ...) failed, so its caller handles it.

    True for exceptions, for `sys.exit()`, for the panic of a Rust extension (pyo3 raises it as a `BaseException`), and
    for groups of only these. False for Ctrl-C, the end of a generator and other signals to the whole program, which
    must be raised on.
    """
    if isinstance(error, KeyboardInterrupt | GeneratorExit):
        return False
    if isinstance(error, Exception | SystemExit):
        return True
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_failure, error.exceptions))
    return any((cls.__module__, cls.__name__) == ("pyo3_runtime", "PanicException") for cls in type(error).__mro__)


def described(error: BaseException) -> str:
    """Any exception as text: its type, its message and its notes.

    Does not raise, even if the exception's `__str__` raises. The text has no lone surrogates, which cannot be written
    to a file.
    """
    message = text_of(error)
    try:
        notes = [text_of(note) for note in getattr(error, "__notes__", ())]
    except BaseException as broken:  # the class may define `__notes__` in any way
        if not is_failure(broken):
            raise
        notes = [f"its __notes__ raised {type(broken).__name__}"]
    name = type(error).__name__
    return (f"{name}: {message}" if message else name) + "".join(f" ({note})" for note in notes)


def text_of(value: object) -> str:
    """`str(value)` of a foreign value, such as an exception, or a text that `__str__` raised. Escapes surrogates."""
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
    """The model, its KV cache or one step does not fit the memory of the device. The message has the figures."""


class PluginError(NanoEngineError):
    """A plugin is missing, broken, incompatible, or clashes with another one."""


class ModelSourceError(NanoEngineError):
    """A model could not be found or downloaded. The message lists every attempt and what to type instead."""


class ModelError(NanoEngineError):
    """A model folder or its config.json is not supported (unknown architecture, bad or missing field)."""


class WeightsError(ModelError):
    """A checkpoint does not fit the model: tensors are missing, unexpected or of a wrong shape. All are named."""


class UnsupportedError(NanoEngineError):
    """The chosen part does not support what the engine needs; `reasons` has every reason."""

    def __init__(self, what: str, reasons: Iterable[str]) -> None:
        self._what, self.reasons = what, tuple(reasons)
        super().__init__(f"{what}: " + "; ".join(self.reasons))

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[str, tuple[str, ...]]]:
        return (type(self), (self._what, self.reasons))


class ParamsError(NanoEngineError, ValueError):
    """A sampling parameter is unknown, of the wrong type or out of range.

    The message begins with the name of the parameter, as "top_k must be ...": a server takes the name of the field from
    it."""


class TokenizerMissing(NanoEngineError):
    """Text was requested from a model that has no tokenizer."""


class EngineClosed(NanoEngineError):
    """The engine was used after `close()`, or after one of its workers failed (that error is then the `__cause__`)."""

    def __init__(self, message: str = "this engine was closed; make a new one") -> None:
        super().__init__(message)


class WorkerError(NanoEngineError):
    """A worker process of a tensor-parallel engine died, hung or raised an error. The engine and all its ranks end.

    Attributes:
        rank: the rank that failed.
        phase: what it was doing: a phase of the start ("spawn", "import", "weights", "profile", "capture" ...), "step
            N" or "idle".
        cause: in one line.
        traceback: that of the worker, or the stacks of all ranks.
        outputs: those of the requests that were running. If `LLM.generate` raises this: those of all prompts that the
            engine had received, in input order. Finished outputs are complete; the `error` of the others has this
            error as its cause.
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
    """Why one request was rejected or failed. Other requests continue.

    `generate` does not raise it: it is the `RequestOutput.error` of that request.

    Attributes:
        code: a fixed word for programs: "too_long", "does_not_fit", "invalid_prompt", "invalid_generated" (the output
            tokens that it begins with), "already_ended" (they end it), "duplicate_id", "not_supported", "bad_logits",
            "nothing_left", "processor_failed", "drafter_failed", "policy_failed", "step_failed", "out_of_memory",
            "interrupted", "worker_failed", "text_failed" (its tokens could not be decoded), "invalid_grammar" (a
            schema, regular expression or grammar that is wrong or not supported), "grammar_failed" (the tokens and the
            grammar of the output do not fit), "prepare_failed" and "prepare_timeout" (the work before the request can
            start), "engine_failed" (the engine's own code raised an error, which is a bug of the engine). Of an engine
            that is a service also "overloaded" (its queue is full), "deadline" (it had not started in time) and
            "unavailable".
        retry_after: seconds after which to ask again; None: nothing is known about that.
    """

    def __init__(self, code: str, message: str, retry_after: float | None = None) -> None:
        self.code, self.retry_after = code, retry_after
        super().__init__(message)

    def __reduce__(self) -> tuple[type[RequestError], tuple[Any, ...]]:
        return (RequestError, (self.code, str(self), self.retry_after))


class EngineUnavailable(RequestError):
    """There is no engine that takes the request: it has ended, is being restarted, or is draining."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__("unavailable", message, retry_after)

    def __reduce__(self) -> tuple[type[RequestError], tuple[Any, ...]]:
        return (EngineUnavailable, (str(self), self.retry_after))


class GrammarError(RequestError):
    """A constraint on the output is wrong, or has something that its backend does not support; the message names it."""

    def __init__(self, message: str) -> None:
        super().__init__("invalid_grammar", message)

    def __reduce__(self) -> tuple[type[RequestError], tuple[Any, ...]]:
        return (GrammarError, (str(self),))


def engine_failure(error: BaseException) -> RequestError:
    """The error of a request for which the engine's own code raised `error`. Other requests continue. An error of a
    request stays as it is."""
    if isinstance(error, RequestError):
        return error
    failure = RequestError("engine_failed", f"the engine raised {described(error)} in this request; please report it")
    failure.__cause__ = error
    return failure


def text_failure(error: BaseException) -> RequestError:
    """The error of a request for whose tokens the tokenizer raised `error`."""
    failure = RequestError("text_failed", f"the tokenizer raised {described(error)} for the tokens of this request")
    failure.__cause__ = error
    return failure


def draw_failure(restrictions: Sequence[str], *, finite: bool) -> RequestError:
    """The error of a request for which no token can be drawn.

    Args:
        restrictions: the parameters and logits processors of the request that may remove tokens.
        finite: its logits were, before the processors.
    """
    if not finite:
        return RequestError("bad_logits", "the model gave logits that are not finite for this request")
    advice = f"loosen what this request has: {', '.join(restrictions)}"
    if not restrictions:
        advice = (
            "this request restricts nothing, so a logits processor of another one changed a row that is not its own"
        )
    return RequestError(
        "nothing_left",
        "the logits processors left no token that can be drawn: every one is masked, or a processor returned NaN or "
        f"+inf; {advice}",
    )


def step_failure(error: BaseException) -> RequestError:
    """The error of a request that raised `error` when it ran alone."""
    text = f"running this request raised {described(error)}"
    if is_out_of_memory(error):
        fix = "leave more room: lower engine.kv_cache_memory or max_num_seqs, on a GPU also gpu_memory_utilization"
        failure = RequestError(
            "out_of_memory", f"{text}, in a step of a single token or of one prompt that must be whole; {fix}"
        )
    else:
        failure = RequestError("step_failed", text)
    failure.__cause__ = error
    return failure


def shown(value: Any) -> str:
    """`repr(value)` for a message, shortened. If there is none, the type (e.g. for an integer of 5,000 digits)."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxlong, short.maxother = 4, 200, 60, 200
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 20
    try:
        return short.repr(value)
    except BaseException as broken:  # its class may be any code
        if not is_failure(broken):
            raise
        return f"a value of type {type(value).__name__}"


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of a message about an unknown name: the name that was probably meant, then all valid ones.

    >>> nearest("top_pp", ["top_p", "top_k"])
    "did you mean 'top_p'? Valid: top_k, top_p"
    """
    names = sorted(set(choices))
    close = difflib.get_close_matches(word[:100], names, n=1, cutoff=0.6)  # slow for long words
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Valid: {', '.join(names) if names else '(none)'}"


_TEXTS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, of any library, means that a device or the host had too little memory."""
    torch = sys.modules.get("torch")  # if it is not loaded, the error is not torch's
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    plain = isinstance(error, RuntimeError) and type(error).__module__ in ("builtins", "torch")
    return plain and any(text in text_of(error) for text in _TEXTS)


def own_value(error: BaseException, name: str) -> Any:
    """The value of `name` (e.g. "__traceback__") that Python set, even if the exception's class overrides it."""
    return vars(BaseException)[name].__get__(error)


def forget_locals(error: BaseException) -> None:
    """Clears the frames of `error` and of its causes, so that keeping the error does not keep their memory."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(own_value(each, "__traceback__"))
        todo += [own_value(each, "__cause__"), own_value(each, "__context__")]


_A_PLUGINS = ". If a plugin provides it: install its package, or give --plugin FILE, in Python LLM(plugins=[FILE])"


def nearest_part(word: str, choices: Iterable[str]) -> str:
    """Like `nearest`; if no name is similar, the message also says how to add a plugin that provides the part."""
    found = nearest(word, choices)
    return found if found.startswith("did you mean") else f"{found}{_A_PLUGINS}"
