"""`Grammars`: the compiled constraints of an engine, each compiled once."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future

from nanoengine.api.errors import GrammarError, PluginError, shown
from nanoengine.api.grammars import Constraint, Grammar, GrammarBackend
from nanoengine.api.plugin_calls import name_of, plugin_call
from nanoengine.api.stats import GrammarStats
from nanoengine.params.engine_options import StructuredOutputsOptions
from nanoengine.params.preparation import THREAD

_TIMES = 1024  # of the last compilations
_LOADING_SECONDS = 60.0  # that loading the backend may take, in addition to what one constraint may take


class Grammars:
    """Compiles constraints with a backend that is made when it is first needed. Thread-safe.

    Refused constraints are kept too: who sends one again and again costs no time.
    """

    def __init__(self, make: Callable[[], GrammarBackend], options: StructuredOutputsOptions) -> None:
        """`make`: may take seconds; raises what keeps grammars from being used at all."""
        self._make, self._options = make, options
        self._backend: GrammarBackend | None = None
        self._known: OrderedDict[Constraint, Future[Grammar]] = OrderedDict()  # the least recently used one first
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._loading_since = self._loaded_at = math.inf  # monotonic
        self._seconds: deque[float] = deque(maxlen=_TIMES)
        self._compiled = self._refused = self._cached = self._in_steps = 0

    def check(self, constraint: Constraint) -> None:
        """Raises `GrammarError` for a constraint that is too large."""
        size = len(constraint.text.encode())
        if size > self._options.max_bytes:
            raise GrammarError(
                f"the constraint has {size:,} bytes, and engine option structured_outputs.max_bytes is "
                f"{self._options.max_bytes:,}: shorten it or raise max_bytes"
            )

    def get(self, constraint: Constraint) -> Grammar:
        """The compiled constraint. One that another thread compiles is waited for.

        Raises `GrammarError`, and what making the backend raises.
        """
        with self._lock:
            found = self._known.get(constraint)
            mine = found is None
            if found is None:
                found = self._known[constraint] = Future()
                self._in_steps += threading.current_thread().name != THREAD
                if len(self._known) > self._options.cache_size:
                    self._known.popitem(last=False)
            else:
                self._known.move_to_end(constraint)
                self._cached += 1
        if mine:
            self._compile(constraint, found)
        error = found.exception()
        if isinstance(error, GrammarError):  # a new one each time: each `raise` adds to an error's traceback
            raise GrammarError(str(error)) from error.__cause__
        return found.result()

    def stats(self) -> GrammarStats:
        with self._lock:
            return GrammarStats(
                compiled=self._compiled,
                refused=self._refused,
                cached=self._cached,
                compiled_in_steps=self._in_steps,
                seconds=tuple(sorted(self._seconds)),
            )

    def close(self) -> None:
        """Idempotent."""
        if self._backend is not None:
            self._backend.close()

    def _compile(self, constraint: Constraint, found: Future[Grammar]) -> None:
        try:
            self.check(constraint)
            backend = self._loaded()
            cls, start = type(backend), time.monotonic()
            try:
                with plugin_call(f"{name_of(cls)}.compile failed", cls, GrammarError):
                    grammar: object = backend.compile(constraint)
                if not isinstance(grammar, Grammar):
                    raise PluginError(f"{name_of(cls)}.compile returned {shown(grammar)}, not a nanoengine.api.Grammar")
            finally:
                with self._lock:
                    self._seconds.append(time.monotonic() - start)
        except BaseException as error:  # noqa: BLE001 - `get` raises it, in this thread too
            with self._lock:
                self._refused += isinstance(error, GrammarError)
                if not isinstance(error, GrammarError) and self._known.get(constraint) is found:
                    del self._known[constraint]  # it may go well the next time
            found.set_exception(error)
        else:
            with self._lock:
                self._compiled += 1
            found.set_result(grammar)

    def counted_from(self) -> float:
        """When the backend was loaded: what a constraint may take is counted from then on. It may load for a while."""
        longest = self._loading_since + _LOADING_SECONDS
        return 0.0 if longest == math.inf else min(self._loaded_at, longest)

    def _loaded(self) -> GrammarBackend:
        with self._making:
            if self._backend is None:
                self._loading_since, self._loaded_at = time.monotonic(), math.inf
                self._backend = self._make()
                self._loaded_at = time.monotonic()
            return self._backend
