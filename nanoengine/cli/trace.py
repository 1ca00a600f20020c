"""`nanoengine run --trace FILE`: the run's steps as a timeline, beside its results."""

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
    """`others`: files that the run reads or writes, by what to call them.

    Raises `ConfigError` where the trace cannot be written, or would overwrite one of them or what is no trace, before
    anything is loaded.
    As with `output`, folders that are missing are no mistake: `traced` makes them.
    """
    try:
        target = path.expanduser()
        check_writable(target)
        check_names(target)
        check_unlocked(target)
        begins = _beginning(target)
    except (OSError, ValueError, RuntimeError) as error:  # a bad name; a home folder that nobody has
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(f"cannot write trace {path}: {why}") from error
    for what, other in others.items():
        if other is not None and Path(other).expanduser().absolute() == target.absolute():
            raise ConfigError(f"--trace {path} is {what}, which it would overwrite; give another file")
    if begins not in (b"", _BEGIN):
        raise ConfigError(f"--trace {path} is there and holds no trace; give another file, or delete it")


def _beginning(target: Path) -> bytes:
    """Nothing of a file that is not there, of a pipe or of a device."""
    if not target.is_file():
        return b""
    with target.open("rb") as file:
        return file.read(len(_BEGIN))


@contextmanager
def traced(llm: LLM, path: Path, about: Mapping[str, Any]) -> Iterator[None]:
    """Raises `ConfigError` where the file cannot be opened; at the end `ResultsLost`, if it has not got every step."""
    try:
        path.expanduser().parent.mkdir(parents=True, exist_ok=True)
        file = TraceFile(path, about)
    except OSError as error:
        raise ConfigError(f"cannot write trace {path}: {error.strerror or error}") from error
    try:
        with llm.observe(file):
            yield
    except BaseException:
        with suppress(OSError):  # what ended the run says more
            file.close()
        raise
    try:
        file.close()
    except OSError as error:
        said = f"cannot write trace {path}: {error.strerror or error}; it ends early, and the results are whole"
        raise ResultsLost(said) from error
