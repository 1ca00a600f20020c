"""The process that runs chat templates: a script that imports jinja2 and the standard library, but not nanoengine.

A template is code that comes with a model. Here its time and memory are limited: the operating system limits the
process, and its parent (templates.py) kills it when it takes too long. The standard input is a socket. The process
reads requests from it and writes answers to it, one after the other:

    request: 8 bytes of length, a marshalled (template, variables, seconds)
    answer: 1 byte (b"+" text, b"-" error message, b"m" out of memory), 8 bytes of length, UTF-8 (surrogates allowed)

A template can use what transformers provides: the immutable sandbox, `trim_blocks` and `lstrip_blocks`, loop controls,
`{% generation %}`, `raise_exception`, `strftime_now`, and a `tojson` that escapes nothing.
"""

import functools
import json
import marshal
import os
import resource
import select
import signal
import sys
import traceback
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

_SOCKET = 0  # standard input
_PARENT_SECONDS = 5.0  # how often an idle process checks that its parent is alive
_GRACE_SECONDS = 1.0  # after the deadline the process ends itself, if no parent has killed it
_TEMPLATES = 32


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training. Here it has no effect."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Dict:
    """`dict(...)` without the class `dict`, from which a template could get other classes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> Any:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that rejects names which begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may call a variable "self"
        self, *rest = args
        given = dict(*rest, **kwargs)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a name in a namespace must not begin with an underscore: {name!r}")


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(_TEMPLATES)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def _where(error: BaseException) -> str:
    """The innermost line of the template, for the message; "" if the message names it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else None)
    return "" if line is None or f"line {line}" in str(error) else f" (line {line} of the template)"


def _answer(template: str, variables: dict[str, Any]) -> tuple[bytes, bytes]:
    try:
        return b"+", _compiled(template).render(variables).encode("utf-8", "surrogatepass")
    except MemoryError:
        return b"m", b""
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        shown = str(error) if isinstance(error, jinja2.exceptions.TemplateError) else f"{type(error).__name__}: {error}"
        return b"-", (shown + _where(error)).encode("utf-8", "surrogatepass")


def _read(size: int) -> bytes:
    parts = []
    while size:
        part = os.read(_SOCKET, min(size, 1 << 20))
        if not part:
            os._exit(0)  # the parent has closed its end
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(_SOCKET, view) :]


def _limit(memory: int) -> None:
    """Limits the process to `memory` bytes more than it has now. It cannot write files or start processes."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
    except OSError:
        pages = 0
    for kind, limit in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        hard = resource.getrlimit(kind)[1]
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (soft, soft))


def _serve() -> bool:
    """Answers one request. Returns whether the process can answer another one."""
    try:
        template, variables, seconds = marshal.loads(_read(int.from_bytes(_read(8), "little")))
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_SECONDS)  # SIGALRM ends the process
        kind, text = _answer(template, variables)
    except MemoryError:
        kind, text = b"m", b""
    _write(kind + len(text).to_bytes(8, "little"))
    _write(text)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return kind != b"m"  # after an out-of-memory error the memory may be fragmented


def main(memory: int) -> None:
    parent = os.getppid()
    for template in ("{{ strftime_now('%d %b %Y')|trim }}", "{{ 1 + '' }}"):
        _answer(template, {})  # imports now what jinja2 imports on first use
    _limit(memory)
    _write(b"ready")
    while True:
        while not select.select([_SOCKET], [], [], _PARENT_SECONDS)[0]:
            if os.getppid() != parent:  # the parent has ended, but a fork of it may keep the socket open
                return
        if not _serve():
            return


if __name__ == "__main__":
    main(int(sys.argv[1]))
