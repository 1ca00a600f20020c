"""Grammars by xgrammar: JSON schemas, regular expressions, choices, EBNF and Lark grammars, structural tags.

Compiling runs in a process that is killed when it takes too long. Objects of a schema have no properties but the named
ones, as in vLLM.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoengine.api import Constraint, Grammar, GrammarBackend, GrammarContext, GrammarError, Matcher
from nanoengine.api.errors import RequestError
from nanoengine.plugins.grammars.ebnf import is_ebnf
from nanoengine.plugins.grammars.plain_regexes import plain_regex
from nanoengine.plugins.grammars.plain_schemas import plain
from nanoengine.plugins.grammars.structural_tags import map_tag_schemas, old_tags

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_CHILD = Path(__file__).with_name("xgrammar_child.py")
_PROCESSES = 2
_START_SECONDS = 60.0
_CLOSED = "the grammar backend was closed"


class XGrammar(GrammarBackend):
    def __init__(self, ctx: GrammarContext) -> None:
        from nanoengine.plugins.grammars.xgrammar_child import tokenizer_info

        self._ctx, self._setup = ctx, (ctx.tokenizer_json, ctx.vocab_size, sorted(ctx.end_ids))
        try:
            self._info = tokenizer_info(*self._setup)
        except Exception as error:
            raise GrammarError(f"xgrammar does not support this model's tokenizer: {error}") from error
        self._tokens = _ids_with_text(self._info, ctx)
        self._places, self._idle = threading.Semaphore(_PROCESSES), deque([_Child(self._setup)])
        self._closed = False

    def compile(self, constraint: Constraint) -> Grammar:
        import xgrammar

        call = _call(constraint)
        with self._places:
            if self._closed:
                raise GrammarError(_CLOSED)
            child = self._idle.pop() if self._idle else _Child(self._setup)
            try:
                answer = child.ask(json.dumps(call).encode(), self._ctx.timeout)
            except BaseException:
                child.end()
                raise
            self._idle.append(child)
            if self._closed:  # meanwhile
                self.close()
        if answer[:1] != b"+":
            message = re.sub(r"^\[[\d:]+\] \S+\.\w+:\d+: ", "", answer[1:].decode("utf-8", "replace"))  # its own file
            raise GrammarError(f"xgrammar does not accept the {constraint.kind.replace('_', ' ')}: {message:.300}")
        return _Grammar(xgrammar.CompiledGrammar.deserialize_json(answer[1:].decode(), self._info), self._tokens)

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().end()


def _ids_with_text(info: Any, ctx: GrammarContext) -> npt.NDArray[np.int32]:
    """A mask of the ids that have a token and are not special."""
    import numpy as np

    bits = np.zeros(ctx.mask_width * 32, np.uint8)
    known = [bool(text) for text in info.decoded_vocab]
    bits[: len(known)] = known
    bits[list(info.special_token_ids)] = 0
    return np.packbits(bits, bitorder="little").view(np.int32)


def _call(constraint: Constraint) -> tuple[str, list[Any], dict[str, Any]]:
    """Method, arguments and keywords of the `GrammarCompiler`. Raises `GrammarError` for what would be weakened."""
    if constraint.whitespace_pattern is not None:
        raise GrammarError("xgrammar does not support whitespace_pattern: leave it out, or use the backend llguidance")
    text = constraint.text
    if constraint.kind == "json":
        text = json.dumps(plain(json.loads(text)))
        compact = {} if constraint.any_whitespace else {"separators": (",", ":")}
        return "compile_json_schema", [text], {"any_whitespace": constraint.any_whitespace, **compact}
    if constraint.kind == "structural_tag":
        return "compile_structural_tag", [_as_format(map_tag_schemas(json.loads(text), plain))], {}
    if constraint.kind == "regex":
        return "compile_regex", [plain_regex(text)], {}
    if constraint.kind == "choice":
        texts = [json.dumps(each, ensure_ascii=False) for each in json.loads(text)]  # it reads no surrogate pairs
        return "compile_grammar", ["root ::= " + " | ".join(texts)], {}
    return ("compile_grammar" if is_ebnf(text) else "compile_lark"), [text], {}


def _as_format(tag: Any) -> Any:
    """A structural tag in the form with `format`."""
    if "format" in tag:
        return tag
    tags = [
        {"type": "tag", "begin": begin, "end": end, "content": {"type": "json_schema", "json_schema": schema}}
        for begin, schema, end in old_tags(tag)
    ]
    found = {"type": "triggered_tags", "triggers": tag.get("triggers", []), "tags": tags}
    return {"type": "structural_tag", "format": found}


class _Child:
    """A child process, and this process' end of its socket."""

    def __init__(self, setup: Sequence[Any]) -> None:
        """Raises `GrammarError` if it cannot be started."""
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                process_group=0,  # so that Ctrl-C in a terminal does not reach it
            )
        self._connection = Connection(ours.detach())
        try:
            if self._exchange(json.dumps(setup).encode(), _START_SECONDS) != b"ready":
                raise EOFError
        except (OSError, EOFError) as error:
            self.end()
            raise GrammarError(f"the process that compiles grammars did not start: does {_CHILD} run?") from error

    def ask(self, request: bytes, seconds: float) -> bytes:
        """The answer. After an error the process cannot be used again."""
        try:
            return self._exchange(request, seconds)
        except TimeoutError as error:
            text = f"xgrammar took longer than {seconds:g} s to compile the constraint (structured_outputs.timeout)"
            raise RequestError("prepare_timeout", text) from error
        except (OSError, EOFError) as error:
            raise GrammarError("xgrammar ended its process over this constraint") from error

    def end(self) -> None:
        """Kills the process and waits for it. Idempotent."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _exchange(self, request: bytes, seconds: float) -> bytes:
        self._connection.send_bytes(request)
        if not self._connection.poll(seconds):
            raise TimeoutError
        return self._connection.recv_bytes()


class _Grammar(Grammar):
    def __init__(self, compiled: Any, tokens: npt.NDArray[np.int32]) -> None:
        self._compiled, self._tokens = compiled, tokens

    def matcher(self) -> Matcher:
        import xgrammar

        return _Matcher(xgrammar.GrammarMatcher(self._compiled), self._tokens)


class _Matcher(Matcher):
    def __init__(self, matcher: Any, tokens: npt.NDArray[np.int32]) -> None:
        self._matcher, self._tokens = matcher, tokens

    def consume(self, token_ids: Sequence[int]) -> int:
        for count, token in enumerate(token_ids):
            if not self._matcher.accept_token(token):
                return count
        return len(token_ids)

    def rollback(self, count: int) -> None:
        if count:
            self._matcher.rollback(count)

    def mask(self, out: npt.NDArray[np.int32]) -> None:
        self._matcher.fill_next_token_bitmask(out.reshape(1, -1))
        out &= self._tokens  # where everything is allowed, it sets all bits, also of ids that have no token

    @property
    def is_accepting(self) -> bool:
        return bool(self._matcher.is_completed())
