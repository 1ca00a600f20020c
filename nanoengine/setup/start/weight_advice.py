"""The rules that a `WeightMap` could lack, from what is missing and what is left over: a guess for its author."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nanoengine.api.sharding import ShardSpec
from nanoengine.api.weights import WeightRule
from nanoengine.setup.start.weight_rules import NUMBER, shown_rule
from nanoengine.setup.start.weight_slices import wanted_shape

_SHOWN = 4  # rules
_LEAVES = ("weight", "bias")  # which rules leave out
_OFTEN = 2  # tensors that one new prefix must explain

Missing = Sequence[tuple[str, str, ShardSpec]]  # parameter, part, how the parameter is made
Left = Sequence[tuple[str, tuple[int, ...]]]  # name in the checkpoint, shape


def advice(missing: Missing, left: Left) -> str:
    """What to write into the map so that tensors left over fill what is missing; "" where nothing fits."""
    if not missing or not left:
        return ""
    taken = {name for name, part, _ in missing if not part} & {name for name, _ in left}
    if taken:
        same = dict.fromkeys(shown_rule(_own(name), WeightRule(_own(name))) for name in sorted(taken))
        return (
            "another rule takes tensors that the model has under the names of the file: the WeightMap may lack "
            f"rules={{{', '.join(list(same)[:_SHOWN])}}}"
        )
    rename = _prefixes({name for name, _, _ in missing}, {name for name, _ in left})
    if rename:
        return f"the WeightMap may lack rename={{{rename}}}"
    rules = list(dict.fromkeys(_rules(_wanted(missing), left)))
    more = f" and {len(rules) - _SHOWN} more" if len(rules) > _SHOWN else ""
    return f"the WeightMap may lack rules={{{', '.join(rules[:_SHOWN])}}}{more}" if rules else ""


def _own(name: str) -> str:
    """A pattern for a parameter's module that fits before shorter ones: what is behind the last number, or all."""
    module, _ = _split(name)
    short = module.rpartition(f"{NUMBER}.")[2]
    return short if "." in short else module


def _prefixes(missing: Iterable[str], left: Iterable[str]) -> str:
    """The prefix of most of the names that are left, and what it would have to become; "" if there is none."""
    ends: dict[str, str] = {}
    for name in missing:
        words = name.split(".")
        ends |= {".".join(words[i:]): ".".join(words[:i]) for i in range(len(words) - 1)}
    found, left = Counter[tuple[str, str]](), list(left)
    for name in left:
        words = name.split(".")
        for i in range(len(words) - 1):
            if (end := ".".join(words[i:])) in ends:
                found[".".join(words[:i]), ends[end]] += 1
                break
    if not found:
        return ""
    (old, new), count = found.most_common(1)[0]
    number = any(word.isdecimal() for word in (*old.split("."), *new.split(".")))
    if count < max(_OFTEN, len(left) // 2) or number:
        return ""
    return f'"{old + "." * bool(old)}": "{new + "." * bool(new)}"'


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A parameter that lacks something: its module's and its own name with numbers left open, which parts."""

    module: str
    leaf: str
    parts: tuple[str, ...]
    spec: ShardSpec


def _wanted(missing: Missing) -> list[_Wanted]:
    parts: dict[str, list[str]] = {}
    specs: dict[str, ShardSpec] = {}
    for name, part, spec in missing:
        parts.setdefault(name, []).append(part)
        specs[name] = spec
    found = {}
    for name, open_ in parts.items():
        module, leaf = _split(name)
        found[module, leaf] = _Wanted(module, leaf, tuple(filter(None, dict.fromkeys(open_))), specs[name])
    return list(found.values())


def _split(name: str) -> tuple[str, str]:
    """Module and parameter, numbers left open; a parameter of a name of its own belongs to the module's."""
    words = [NUMBER if word.isdecimal() else word for word in name.split(".")]
    return (".".join(words[:-1]), words[-1]) if words[-1] in _LEAVES else (".".join(words), "")


def _rules(wanted: Sequence[_Wanted], left: Left) -> Iterator[str]:
    """One rule for each pattern that is left over and fits something by its shape; what is named alike goes first."""
    patterns, done = {_split(name): shape for name, shape in left}, set[str]()
    for (module, leaf), shape in sorted(patterns.items(), key=lambda each: each[0][1] == "bias"):  # a weight says more
        fitting = [
            (difflib.SequenceMatcher(None, module, f"{each.module}.{'.'.join(_parts(rule))}").ratio(), each, rule)
            for each in wanted
            if each.leaf in ("", leaf)
            for rule in _fitting(each, module, shape)
        ]
        if fitting:
            _, each, rule = max(fitting, key=lambda found: found[0])
            pattern = module if each.leaf == leaf else f"{module}.{leaf}"
            if pattern not in done:
                yield shown_rule(*_shortest(pattern, each.module, rule))
            done.add(pattern)


def _parts(rule: WeightRule) -> tuple[str, ...]:
    return (rule.parts,) if isinstance(rule.parts, str) else rule.parts


def _fitting(wanted: _Wanted, module: str, shape: tuple[int, ...]) -> Iterator[WeightRule]:
    """Rules by which a tensor of this shape would fill it, or one part of it, or one element of a stack."""
    spare = module.count(NUMBER) - wanted.module.count(NUMBER)
    if spare not in (0, 1):
        return
    sizes = dict(wanted.spec.parts)
    choices: list[str | tuple[str, ...]] = [*wanted.parts, tuple(sizes)]
    for parts in choices:
        given = (parts,) if isinstance(parts, str) else parts
        for transpose in (False, True):
            rule = WeightRule("", parts, transpose=transpose)
            if tuple(wanted_shape(wanted.spec, [(p, sizes[p]) for p in given], rule, stacked=spare == 1)) == shape:
                yield rule
                break


def _shortest(module: str, to: str, rule: WeightRule) -> tuple[str, WeightRule]:
    """Pattern and rule without the words that both begin with."""
    old, new = module.split("."), to.split(".")
    while len(old) > 1 and len(new) > 1 and old[0] == new[0]:
        old, new = old[1:], new[1:]
    return ".".join(old), WeightRule(".".join(new), rule.parts, transpose=rule.transpose)
