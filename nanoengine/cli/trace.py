"""`nanoengine run --trace`: writes the steps of the run as a timeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoengine.api.errors import ConfigError
from nanoengine.cli.common import ResultsLost
from nanoengine.cli.results import check_names, check_unlocked, check_writable
from nanoengine.observe.trace import TraceFile

if TYPE_CHECKING:
    from nanoengine.llm import LLM

_BEGIN = b'[\n{"ph":"i","name":"trace"'


def check_trace(path: Path, others: Mapping[str, str | Path | None]) -> None:
    """Checks the trace file before a model is loaded. Missing folders are allowed: `traced` makes them.

    `others`: files that the run reads or writes, by their description for messages. Raises `ConfigError` if the trace
    cannot be written, or would overwrite one of these or a file that is not a trace.
    """
    try:
        target = path.expanduser()
        check_writable(target)
        check_names(target)
        check_unlocked(target)
        begins = _beginning(target)
    except (OSError, ValueError, RuntimeError) as error:  # an invalid name; a user without a home folder
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(f"cannot write trace {path}: {why}") from error
    for what, other in others.items():
        if other is not None and Path(other).expanduser().absolute() == target.absolute():
            raise ConfigError(f"--trace {path} is {what}, which it would overwrite; give another file")
    if begins not in (b"", _BEGIN):
        raise ConfigError(f"--trace {path} exists and is not a trace; give another file, or delete it")


def _beginning(target: Path) -> bytes:
    """The first bytes of a file; nothing for a missing file, a pipe or a device."""
    if not target.is_file():
        return b""
    with target.open("rb") as file:
        return file.read(len(_BEGIN))


@contextmanager
def traced(llm: LLM, path: Path, about: Mapping[str, Any]) -> Iterator[None]:
    """A context that writes a trace. Raises `ConfigError` if it cannot be opened, `ResultsLost` if it is incomplete."""
    try:
        path.expanduser().parent.mkdir(parents=True, exist_ok=True)
        file = TraceFile(path, about)
    except OSError as error:
        raise ConfigError(f"cannot write trace {path}: {error.strerror or error}") from error
    try:
        with llm.observe(file):
            yield
    except BaseException:
        with suppress(OSError):  # the error that ended the run is more useful
            file.close()
        raise
    try:
        file.close()
    except OSError as error:
        text = f"cannot write trace {path}: {error.strerror or error}; it is incomplete, but the results are complete"
        raise ResultsLost(text) from error
