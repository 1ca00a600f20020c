"""A `WeightMap` compiled: names of a checkpoint to parameters, and back for messages and layers' sources.

Patterns are kept in a tree of their words from the end, so that a name costs its own words, whatever the number of
rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nanoengine.api.errors import ModelError
from nanoengine.api.weights import WeightMap, WeightRule

NUMBER = "{}"
_PLAIN = WeightRule("")


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a checkpoint's name means.

    parameter: full name. index: the tensor's place in a stack, None where it is no part of one. rule: what fits it.
    pattern: of the rule; "" where none fits.
    """

    parameter: str
    index: int | None = None
    rule: WeightRule = _PLAIN
    pattern: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        return parts_of(self.rule)


@dataclass(slots=True)
class _Node:
    """`words`: what may be before. `here`: the rules whose pattern ends its search here."""

    words: dict[str, _Node] = field(default_factory=dict)
    here: list[tuple[str, WeightRule]] = field(default_factory=list)


class Rules:
    """The rules of one map. Raises `ModelError` for a rule that cannot be."""

    def __init__(self, weights: WeightMap) -> None:
        self.weights = weights
        self._lengths = sorted({len(prefix) for prefix in weights.rename}, reverse=True)
        fused = {pattern: WeightRule(to, part) for pattern, (to, part) in weights.fuse.items()}
        given = {
            pattern: WeightRule(rule) if isinstance(rule, str) else rule for pattern, rule in weights.rules.items()
        }
        self._rules, self._from = {**fused, **given}, _Node()
        for pattern, rule in self._rules.items():
            check_rule(pattern, rule)
            _node(self._from, pattern).here.append((pattern, rule))

    @cached_property
    def _to(self) -> _Node:
        """The rules by what they lead to."""
        root = _Node()
        for pattern, rule in self._rules.items():
            _node(root, rule.to).here.append((pattern, rule))
        return root

    def skips(self, name: str) -> bool:
        return name.endswith(self.weights.skip) or name.startswith(self.weights.skip_prefixes)

    def renamed(self, name: str) -> str:
        """With its prefix replaced."""
        rename = self.weights.rename
        for length in self._lengths:
            if name[:length] in rename:
                return rename[name[:length]] + name[length:]
        return name

    def resolve(self, name: str) -> Resolved:
        """A checkpoint's tensor -> what it fills."""
        words = self.renamed(name).split(".")
        found = [*_matches(self._from, words, len(words)), *_matches(self._from, words, len(words) - 1)]
        if not found:
            return Resolved(".".join(words))
        match = max(found, key=lambda each: (each.end - each.start, -len(each.numbers)))
        pattern, rule = match.rules[-1]
        to = _filled(rule.to, match.numbers)
        rest = match.numbers[rule.to.count(NUMBER) :]
        parameter = ".".join((*words[: match.start], *to, *words[match.end :]))
        return Resolved(parameter, rest[0] if rest else None, rule, pattern)

    def sources(self, parameter: str, part: str = "") -> list[str]:
        """Names behind `rename` that fill a parameter, or one part of it; an index is `{}`. Without a rule its own.

        First those of the rule that has most words of the parameter, of several in the order of the rules.
        """
        words, order = parameter.split("."), {pattern: at for at, pattern in enumerate(self._rules)}
        found = []
        for end in (len(words), len(words) - 1):
            for match in _matches(self._to, words, end):
                for pattern, rule in match.rules:
                    if not part or not rule.parts or part in parts_of(rule):
                        source = _filled(pattern, match.numbers)
                        name = ".".join((*words[: match.start], *source, *words[end:]))
                        found.append((match.start, order[pattern], name))
        return [name for _, _, name in sorted(found)] or [parameter]


def checkpoint_name(parameter: str, part: str, weights: WeightMap) -> str:
    """The checkpoint's name of a parameter's part, behind `WeightMap.rename`."""
    return Rules(weights).sources(parameter, part)[0]


def parts_of(rule: WeightRule) -> tuple[str, ...]:
    return (rule.parts,) if isinstance(rule.parts, str) else rule.parts


def check_rule(pattern: str, rule: WeightRule) -> None:
    """Raises `ModelError` for a rule that means nothing."""
    spare, words = pattern.count(NUMBER) - rule.to.count(NUMBER), f".{pattern}.{rule.to}."
    wrong = None
    if not pattern or not rule.to or ".." in words:
        wrong = "a name is words with dots between them"
    elif not 0 <= spare <= 1:
        wrong = "each {} of `to` is one of the pattern, which may have one more: the index"
    elif rule.permute and sorted(rule.permute) != list(range(len(rule.permute))):
        wrong = f"permute must be an order of 0 to {len(rule.permute) - 1}"
    elif rule.groups < 1:
        wrong = "groups must be at least 1"
    elif rule.interleaved and rule.groups != 1:
        wrong = "interleaved says how many groups there are"
    if wrong:
        raise ModelError(f"WeightMap: {shown_rule(pattern, rule)}: {wrong}")


def shown_rule(pattern: str, rule: WeightRule) -> str:
    """A rule as a model writes it."""
    if rule == WeightRule(rule.to):
        return f'"{pattern}": "{rule.to}"'
    defaults = WeightRule("")
    given = [repr(rule.to)] + ([repr(rule.parts)] if rule.parts else [])
    for name in ("transpose", "groups", "interleaved", "permute", "scale"):
        if (value := getattr(rule, name)) != getattr(defaults, name):
            given.append(f"{name}={value!r}")
    return f'"{pattern}": WeightRule({", ".join(given)})'.replace("'", '"')


@dataclass(frozen=True, slots=True)
class _Match:
    """`rules` fit words[start:end]; `numbers`: what their `{}` are, in order."""

    start: int
    end: int
    numbers: tuple[int, ...]
    rules: Sequence[tuple[str, WeightRule]]


def _node(root: _Node, pattern: str) -> _Node:
    for word in reversed(pattern.split(".")):
        node = root.words.get(word)
        if node is None:
            node = root.words[word] = _Node()
        root = node
    return root


def _matches(root: _Node, words: Sequence[str], end: int) -> Iterator[_Match]:
    """All patterns that fit words[:end] at its end."""
    waiting: list[tuple[_Node, int, tuple[int, ...]]] = [(root, end, ())]
    while waiting:
        node, start, numbers = waiting.pop()
        if node.here:
            yield _Match(start, end, numbers, node.here)
        if start == 0:
            continue
        word = words[start - 1]
        if word in node.words:
            waiting.append((node.words[word], start - 1, numbers))
        if word.isdecimal() and NUMBER in node.words:
            waiting.append((node.words[NUMBER], start - 1, (int(word), *numbers)))


def _filled(pattern: str, numbers: Sequence[int]) -> Iterator[str]:
    """The words of a pattern with the first numbers in their places; further ones stay open."""
    given = iter(numbers)
    for word in pattern.split("."):
        yield str(next(given, NUMBER)) if word == NUMBER else word
