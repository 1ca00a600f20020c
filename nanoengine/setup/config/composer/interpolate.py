"""`${key}` and `${oc.env:NAME}` in plain containers: omegaconf's grammar, each value resolved once.

omegaconf itself resolves a value each time that another one refers to it, so that thirty keys, each of the one before
it twice, take for ever and more memory than there is. Here what has been resolved is kept, and its size counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse
from omegaconf.grammar_visitor import GrammarVisitor

from nanoengine.api.errors import described, is_failure, nearest, shown
from nanoengine.setup.config.composer.bounds import MAX_DEPTH
from nanoengine.setup.config.composer.grammar import ESCAPE_HINT, Grammar
from nanoengine.setup.config.composer.yaml_file import KeyPath, dotted, parts

_MAX_COPIED = 100_000  # values that interpolation makes; a text counts as one for each 100 characters
_MAX_CHAIN = 50  # values that refer to one another
_MAX_DECODED = 10_000  # characters that `oc.decode` reads
_TOO_DEEP = f"interpolation makes lists and mappings within each other more than {MAX_DEPTH} deep"
_MAX_NAMED = 200  # keys in a message
_ABSENT = object()


class Interpolation(Exception):
    """Why a value has no meaning. `path`: of the value; `missing`: it, or what it refers to, is "???"."""

    def __init__(self, path: KeyPath, why: str, *, missing: bool = False) -> None:
        super().__init__(why)
        self.path, self.missing = path, missing


def resolved(root: Mapping[Any, Any], wanted: Mapping[Any, Any], grammar: Grammar) -> dict[Any, Any]:
    """`wanted` with every interpolation done. Raises `Interpolation`.

    Args:
        root: what keys refer to; it has at least the keys of `wanted`.
        grammar: holds the tree of every text with an interpolation.
    """
    walk = _Walk(root, grammar)
    return {key: walk.only(value, (key,)) for key, value in wanted.items()}


@dataclass
class _Walk:
    root: Mapping[Any, Any]
    grammar: Grammar
    known: dict[KeyPath, Any] = field(default_factory=dict)  # of texts that hold an interpolation
    chain: list[KeyPath] = field(default_factory=list)  # those that are being resolved
    keys: dict[int, dict[str, Any]] = field(default_factory=dict)  # of mappings of `root`, by their text
    copied: int = 0
    depth: int = 0  # of the lists and mappings that are being resolved

    def only(self, wanted: Any, path: KeyPath) -> Any:
        """The resolved value at `path`, with no key that `wanted` has not."""
        if isinstance(wanted, Mapping):
            return {key: self.only(item, (*path, key)) for key, item in wanted.items()}
        return self.value(self.raw(path), path)

    def raw(self, path: KeyPath) -> Any:
        value: Any = self.root
        for part in path:
            value = value[part]
        return value

    def value(self, raw: Any, path: KeyPath) -> Any:
        """What stands at `path`, resolved."""
        if isinstance(raw, Mapping | list):
            return self._container(raw, path)
        if raw == "???":
            raise Interpolation(path, "must be given", missing=True)
        if not isinstance(raw, str) or "${" not in raw:
            return raw
        if path not in self.known:
            self.known[path] = self._text(raw, path)
        return self.known[path]

    def _container(self, raw: Mapping[Any, Any] | list[Any], path: KeyPath) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Interpolation(self.chain[-1] if self.chain else path, _TOO_DEEP)
        try:
            if isinstance(raw, Mapping):
                return {key: self.value(item, (*path, key)) for key, item in raw.items()}
            return [self.value(item, (*path, index)) for index, item in enumerate(raw)]
        finally:
            self.depth -= 1

    def _text(self, text: str, path: KeyPath) -> Any:
        if path in self.chain:
            ring = " -> ".join(map(dotted, [*self.chain[self.chain.index(path) :], path]))
            raise Interpolation(path, f"it refers to itself: {ring}")
        if len(self.chain) >= _MAX_CHAIN:
            raise Interpolation(path, f"more than {_MAX_CHAIN} interpolations refer to one another")
        self.chain.append(path)
        try:
            found = self._visit(self.grammar.trees[text], path)
        except (OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
            raise Interpolation(path, str(error).split("\n")[0][:300] + ESCAPE_HINT) from error
        finally:
            self.chain.pop()
        if len(path) + self._copied(found, path) > MAX_DEPTH:
            raise Interpolation(path, _TOO_DEEP)
        return str(found) if isinstance(found, str) else found  # not omegaconf's own kind of text

    def _copied(self, value: Any, path: KeyPath) -> int:
        """Counts what an interpolation made; gives how deep it is."""
        depth, level = 0, [value]
        while level:
            self.copied += sum(1 + len(each) // 100 if isinstance(each, str) else 1 for each in level)
            if self.copied > _MAX_COPIED:
                raise Interpolation(path, f"interpolations make more than {_MAX_COPIED:,} values, or too long texts")
            holders = [each for each in level if isinstance(each, Mapping | list)]
            level = [item for each in holders for item in (each.values() if isinstance(each, Mapping) else each)]
            depth += bool(holders)
        return depth

    def _visit(self, tree: Any, path: KeyPath) -> Any:
        def resolver(name: str, args: tuple[Any, ...], args_str: tuple[str, ...]) -> Any:
            return self._resolver(name, args, args_str, path)

        visitor = GrammarVisitor(lambda key, memo: self._reference(key, path), resolver, memo=None)
        return visitor.visit(tree)

    def _reference(self, key: Any, path: KeyPath) -> Any:
        """What `${key}` in the text at `path` stands for."""
        if key.relative_dots > len(path):
            raise Interpolation(path, f"${{{key.raw}}} begins above the configuration")
        base = path[: len(path) - key.relative_dots] if key.relative_dots else ()
        return self._at(base, key.parts, key.raw, path)

    def _at(self, base: KeyPath, keys: tuple[str, ...], written: str, asker: KeyPath, default: Any = _ABSENT) -> Any:
        node, here, plain = self.raw(base), base, False
        for part in keys:
            key = self._key_in(node, part)
            if key is _ABSENT:
                if default is not _ABSENT:
                    return default
                where, known = f"in {dotted(here)}, " if here else "", _instead(node, part)
                raise Interpolation(asker, f"Interpolation key {written!r} not found: {where}{known}{ESCAPE_HINT}")
            node, here = node[key], (*here, key)
            if not plain and isinstance(node, str) and "${" in node:
                node, plain = self.value(node, here), True
        if node == "???":
            raise Interpolation(asker, f"{dotted(here)} must be given", missing=True)
        inside = here == asker[: len(here)] and len(here) < len(asker)
        if inside and not plain:
            raise Interpolation(asker, f"{written!r} holds this very key")
        if not plain and isinstance(node, Mapping | list):
            node = self.value(node, here)
            self._copied(node, asker)  # here too: who asks may drop it
            return node
        return node if plain else self.value(node, here)

    def _key_in(self, node: Any, part: str) -> Any:
        """`part` as a key of `node`, as a number where the node has it so; `_ABSENT` if it has not."""
        if isinstance(node, Mapping) and part not in node:
            if id(node) not in self.keys:  # nodes live as long as `root`, or as what was resolved of it
                self.keys[id(node)] = {str(key): key for key in node}
            return self.keys[id(node)].get(part, _ABSENT)
        if isinstance(node, list):
            return int(part) if part.isdecimal() and int(part) < len(node) else _ABSENT
        return part if isinstance(node, Mapping) else _ABSENT

    def _resolver(self, name: str, args: tuple[Any, ...], args_str: tuple[str, ...], path: KeyPath) -> Any:
        """What `${name:args}` stands for."""
        known: dict[str, Callable[..., Any]] = {
            "oc.env": _environment,
            "oc.select": lambda key, default=None: self._select(key, path, default),
            "oc.decode": lambda text: self._decode(text, path),
            "oc.create": lambda value: value,
            "oc.dict.keys": lambda key: list(self._mapping(key, path)),
            "oc.dict.values": lambda key: list(self._mapping(key, path).values()),
        }
        if name not in known and (name.startswith("oc.") or not OmegaConf.has_resolver(name)):
            raise Interpolation(path, f"Unsupported interpolation type {name!r}; {nearest(name, known)}{ESCAPE_HINT}")
        try:
            return known[name](*args) if name in known else _registered(name, args, args_str)
        except BaseException as error:  # a registered resolver is anybody's code
            if isinstance(error, Interpolation) or not is_failure(error):
                raise
            raise Interpolation(path, f"${{{name}:...}}: {described(error)[:300]}") from error

    def _select(self, key: Any, path: KeyPath, default: Any = _ABSENT) -> Any:
        if not isinstance(key, str):
            raise TypeError(f"a key is a text, not {shown(key)}")
        dots = len(key) - len(key.lstrip("."))
        if dots > len(path):
            raise Interpolation(path, f"{key!r} begins above the configuration")
        return self._at(path[: len(path) - dots] if dots else (), tuple(parts(key)), key, path, default)

    def _mapping(self, key: Any, path: KeyPath) -> Mapping[Any, Any]:
        found = self._select(key, path)
        if not isinstance(found, Mapping):
            raise TypeError(f"{key!r} is no mapping")
        return found

    def _decode(self, text: Any, path: KeyPath) -> Any:
        if text is None:
            return None
        if not isinstance(text, str):
            raise TypeError(f"it takes a text, not {shown(text)}")
        if len(text) > _MAX_DECODED:
            raise ValueError(f"a text of {len(text):,} characters, at most {_MAX_DECODED:,}")
        if why := self.grammar.check(text) or self.grammar.count(len(text)):
            raise ValueError(why)
        return self._visit(parse(text, parser_rule="singleElement", lexer_mode="VALUE_MODE"), path)


def _environment(name: Any, default: Any = _ABSENT) -> str | None:
    if not isinstance(name, str):
        raise TypeError(f"the name of a variable is a text, not {shown(name)}")
    if name in os.environ:
        return os.environ[name]
    if default is _ABSENT:
        raise LookupError(f"the environment has no variable {name!r}; a default is written ${{oc.env:{name},DEFAULT}}")
    return None if default is None else str(default)


def _registered(name: str, args: tuple[Any, ...], args_str: tuple[str, ...]) -> Any:
    """What a resolver of `OmegaConf.register_new_resolver` returns; it sees its arguments, not the configuration."""
    nothing = OmegaConf.create({})
    resolver: Any = OmegaConf._get_resolver(name)
    found = resolver(nothing, nothing, None, args, args_str)
    return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found


def _instead(node: Any, part: str) -> str:
    """Why there is no `part` in `node`, and what is."""
    if isinstance(node, Mapping):
        return nearest(part, islice(map(str, node), _MAX_NAMED))
    if isinstance(node, list):
        return f"a list of {len(node)}, counted from 0"
    return "no list or mapping"
