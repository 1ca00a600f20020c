"""`${key}`, `${.key}`, `${oc.env:NAME,DEFAULT}` and `${now:%Y-%m-%d}` in the texts of a configuration, as in Hydra.

A reference means a single value, not a list or mapping, and contains no other reference. So what it makes stays small,
and each text is read once, in time that grows with its length.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from nanoengine.api.errors import nearest, shown
from nanoengine.setup.config.composer.yaml_file import KeyPath, dotted

_MAX_MADE = 100_000  # values that interpolation makes; a text counts as one more for each 100 characters
_MAX_CHAIN = 50  # values that refer to one another
_MAX_BODY = 1_000  # characters between { and }
_MAX_NAMED = 200  # keys in a message
_KEY = re.compile(r"(\.*)([\w-]+(?:\.[\w-]+)*)")
_ENVIRONMENT = re.compile(r"""oc\.env:\s*([^\s,:'"]+)\s*(?:,\s*('[^']*'|"[^"]*"|[^'",]*))?""")
_NOW = re.compile(r"now:\s*(.*)", re.DOTALL)
_RESOLVER = re.compile(r"([\w.]+):.*", re.DOTALL)
_ESCAPE_HINT = r". A text that holds ${ is written with a backslash: \${"


class Interpolation(Exception):
    """Why a value has no meaning. `path`: of the value."""

    def __init__(self, path: KeyPath, why: str) -> None:
        super().__init__(why)
        self.path = path


def resolved(config: Mapping[Any, Any], root: Mapping[Any, Any]) -> dict[Any, Any]:
    """`config` with every interpolation done; keys are looked up in `root`, which has at least those of `config`.

    Raises `Interpolation`.
    """
    found: dict[Any, Any] = _Resolver(root).value(config, ())
    return found


@dataclass
class _Resolver:
    root: Mapping[Any, Any]
    known: dict[KeyPath, Any] = field(default_factory=dict)  # of texts that hold an interpolation
    chain: list[KeyPath] = field(default_factory=list)  # those that are being resolved
    made: int = 0
    now: datetime = field(default_factory=datetime.now)  # one moment for the whole configuration

    def value(self, raw: Any, path: KeyPath) -> Any:
        """`raw`, which is at `path`, resolved."""
        if isinstance(raw, Mapping):
            return {key: self.value(item, (*path, key)) for key, item in raw.items()}
        if isinstance(raw, list):
            return [self.value(item, (*path, index)) for index, item in enumerate(raw)]
        if not isinstance(raw, str) or "${" not in raw:
            return raw
        if path not in self.known:
            self.known[path] = self._text(raw, path)
        return self.known[path]

    def _text(self, text: str, path: KeyPath) -> Any:
        if path in self.chain:
            ring = " -> ".join(map(dotted, [*self.chain[self.chain.index(path) :], path]))
            raise Interpolation(path, f"it refers to itself: {ring}")
        if len(self.chain) >= _MAX_CHAIN:
            raise Interpolation(path, f"more than {_MAX_CHAIN} interpolations refer to one another")
        self.chain.append(path)
        found: list[Any] = []
        for piece, refers in _pieces(text, path):
            found.append(self._referred(piece, path) if refers else piece)
        self.chain.pop()
        return found[0] if len(found) == 1 else "".join(map(str, found))

    def _referred(self, body: str, path: KeyPath) -> Any:
        """The value of `${body}` in the text at `path`."""
        if found := _ENVIRONMENT.fullmatch(body):
            value = _environment(found[1], found[2], path)
        elif found := _NOW.fullmatch(body):
            value = self._time(found[1], path)
        elif found := _KEY.fullmatch(body):
            value = self._at(found[1], found[2].split("."), path)
        else:
            raise Interpolation(path, _unsupported(body) + _ESCAPE_HINT)
        self.made += 1 + (len(value) // 100 if isinstance(value, str) else 0)
        if self.made > _MAX_MADE:
            raise Interpolation(path, f"interpolations make more than {_MAX_MADE:,} values, or too long texts")
        return value

    def _time(self, form: str, path: KeyPath) -> str:
        """The local time as `strftime` writes it."""
        try:
            made = self.now.strftime(form)
        except ValueError as error:
            raise Interpolation(path, f"now: {shown(form)}: {error}; write for example ${{now:%Y-%m-%d}}") from error
        if not made:
            raise Interpolation(path, "now has no format; write for example ${now:%Y-%m-%d}")
        return made

    def _at(self, dots: str, parts: list[str], asker: KeyPath) -> Any:
        """The single value that `${parts}` names, from the `len(dots)`-th container above `asker`, or from the root."""
        if len(dots) > len(asker):
            raise Interpolation(asker, f"'{dots}{'.'.join(parts)}' begins above the configuration")
        here: KeyPath = asker[: len(asker) - len(dots)] if dots else ()
        node: Any = self.root
        for part in here:
            node = node[part]
        for part in parts:
            if not isinstance(node, Mapping):
                what = f"the interpolation {shown(node)}" if isinstance(node, str) and "${" in node else "no mapping"
                raise Interpolation(
                    asker, f"{dotted((*here, part))} is not there: {dotted(here)} is {what}{_ESCAPE_HINT}"
                )
            here = (*here, part)
            if part not in node:
                known = nearest(part, [key for key in node if isinstance(key, str)][:_MAX_NAMED])
                now = "the time is ${now:%Y-%m-%d}. " if parts == ["now"] else ""
                raise Interpolation(asker, f"there is no {dotted(here)}; {now}{known}{_ESCAPE_HINT}")
            node = node[part]
        if isinstance(node, Mapping | list):
            kind = "list" if isinstance(node, list) else "mapping"
            raise Interpolation(asker, f"{dotted(here)} is a {kind}; an interpolation takes a single value")
        return self.value(node, here)


def _pieces(text: str, path: KeyPath) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is the inside of `${}`) of a text that holds an interpolation."""
    at = 0
    while (opening := text.find("${", at)) >= 0:
        before = text[at:opening]
        plain = before.rstrip("\\")
        slashes = len(before) - len(plain)
        plain += "\\" * (slashes // 2)
        if slashes % 2:
            yield plain + "${", False
            at = opening + 2
            continue
        if plain:
            yield plain, False
        closing = text.find("}", opening)
        if closing < 0:
            raise Interpolation(path, f"{shown(text[opening : opening + 40])} has no closing }}{_ESCAPE_HINT}")
        if closing - opening > _MAX_BODY:
            raise Interpolation(path, f"an interpolation has more than {_MAX_BODY:,} characters{_ESCAPE_HINT}")
        yield text[opening + 2 : closing].strip(), True
        at = closing + 1
    if at < len(text):
        yield text[at:], False


def _environment(name: str, default: str | None, path: KeyPath) -> str | None:
    if name in os.environ:
        return os.environ[name]
    if default is None:
        fix = f"a default is written ${{oc.env:{name},DEFAULT}}"
        raise Interpolation(path, f"the environment has no variable {name!r}; {fix}")
    plain = default.strip()
    return None if plain == "null" else plain[1:-1] if plain[:1] in ("'", '"') else plain


def _unsupported(body: str) -> str:
    """Why `${body}` is nothing that can be looked up."""
    if "{" in body:
        return f"{shown(body)}: an interpolation, or a mapping, within an interpolation is not supported"
    if "[" in body:
        return f"{shown(body)}: an item of a list cannot be referred to, only a single value by its keys"
    resolver = _RESOLVER.fullmatch(body)
    if resolver and resolver[1] != "oc.env":
        known = "${key}, ${oc.env:NAME,DEFAULT} and ${now:FORMAT} are"
        return f"the resolver {shown(resolver[1])} is not supported; {known}"
    return f"{shown(body)} is no key, nor oc.env:NAME,DEFAULT (a default with commas goes in quotes)"
