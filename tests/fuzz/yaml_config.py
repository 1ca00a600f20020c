"""Configurations: YAML, groups and overrides, mutated as texts and as structures; no model is loaded."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from nanoengine.cli.config import plain, render
from nanoengine.setup.config.config import load_config
from nanoengine.setup.plugins.discover import discover

Case = tuple[dict[str, str], list[str]]
"""Files by name, of which run.yaml is composed, and overrides."""

_FILES = {
    "run.yaml": (
        "defaults:\n  - sampler: mine\n  - extra\n  - _self_\nmodel: a/b\nengine: {seed: 1, max_num_seqs: 4}\n"
        "sampler:\n  max_tokens: 3\n  stop: [x, 'y']\nprompts:\n  - ${model.source} a\n"
        "  - - {role: user, content: b}\noutput: ${oc.env:HOME,here}/r.jsonl\nchat: true\n"
    ),
    "sampler/mine.yaml": "temperature: 0.5\ntop_p: 1e-1\nseed: ${engine.seed}\n",
    "extra.yaml": "engine:\n  block_size: 16\n",
}
_OVERRIDES = (
    "engine.seed=3", "sampler=greedy", "~output", "+sampler.top_k=5", "++engine.seed=${sampler.seed}", "prompts=[a, b]",
    "prompts[0]=x", "prompts.1=y", "sampler={a: 1}", "model=c/d", "~sampler.stop", "prompts=p.CSV", "attention=torch",
    "engine.seed=", "prompts.²=1", "sampler@_global_=mine", "engine=x", "~defaults", "a=choice(1)", "chat=null",
    "~sampler", "sampler=null", "model=${oc.env:HOME}", "sampler.logit_bias={5: 1}", "~engine.seed=3", "engine=[small]",
)  # fmt: skip
_SCRAPS = (
    "&a [*a]", "*m", "&m ", "${", "}", "${a}", "${engine}", "${model}${model}", "${${model.source}}", "${oc.env:PATH}",
    "${oc.dict.keys:engine}", "${oc.select:x,3}", "${.seed}", "${....x}", "${oc.decode:'[1]'}", "${hydra:x}", "!!int x",
    "!!binary aGk=", "!!python/object:os.x y", "? [a]\n: b", "\t", "\x00", "\x85", "\u2028", "\ufeff", "???", "~", "'",
    "0x" + "f" * 400, "9" * 6000, "1:2:3", "2001-13-99", "[" * 400, "{a: " * 90, "- " * 100, "x" * 5000, "<<: *e", '"',
    "%YAML 1.2\n---\n", "---\n", "...\n", "|\n", ">-\n", "\\${x}", "@", "`", "\U0001f600", "- - -", ".inf", ".nan",
    "hydra: {}\n", "_target_: x\n", "null: 1\n", "defaults: [run]\n", "${oc.deprecated:a}", "${oc.coerce:os.system,1}",
    "# @package a.b", "1e999",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**90, 1.5, float("inf"), float("nan"), "", "a", "${engine.seed}", "${prompts}",
    [],
    [[]], {}, {"a": {"b": []}}, ["x"] * 50, {1: 2}, "-", "\ud800", "a\0b", "x" * 300,
)  # fmt: skip


def mutants(rng: random.Random) -> Iterator[Case]:
    while True:
        files = dict(_FILES)
        name = rng.choice(list(files))
        how = rng.random()
        if how < 0.15:
            files["run.yaml"] = rng.choice(_BOMBS)(rng)
        elif how < 0.5:
            files[name] = _structure(rng, files[name])
        else:
            for _ in range(rng.choice((1, 1, 2, 4))):
                files[name] = _text(rng, files[name])
        overrides = rng.sample(_OVERRIDES, rng.choice((0, 0, 1, 2)))
        if rng.random() < 0.3:
            overrides.append(_text(rng, rng.choice(_OVERRIDES)))
        yield files, overrides


def _text(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    end = min(len(text), at + rng.randrange(30))
    scrap = rng.choice(_SCRAPS) if rng.random() < 0.8 else chr(rng.choice((rng.randrange(128), rng.randrange(0xD000))))
    return rng.choice(
        (text[:at] + scrap + text[at:], text[:at] + scrap + text[end:], text[:at] + text[end:], text[:at])
    )


def _structure(rng: random.Random, text: str) -> str:
    """One value of the file replaced, moved or doubled."""
    data = yaml.safe_load(text)
    holders: list[Any] = [data]
    for each in holders:
        holders += [
            item for item in (each.values() if isinstance(each, dict) else each) if isinstance(item, dict | list)
        ]
    holder = rng.choice([each for each in holders if each])
    key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    value = rng.choice((rng.choice(_VALUES), rng.choice(holders), str(holder[key])))
    if isinstance(holder, dict) and rng.random() < 0.3:
        holder[rng.choice(("engine", "sampler", "x", 3, "${a}", "model.source", "a" * 300, "defaults"))] = value
    else:
        holder[key] = value
    return yaml.safe_dump(data, allow_unicode=False)


def _doubled(rng: random.Random, first: str, link: str) -> str:
    """A chain of keys, each of which holds the one before several times."""
    count, times = rng.randrange(2, 60), rng.randrange(1, 12)
    lines = [first]
    lines += [f"k{n}: " + link.replace("@", f"k{n - 1}") * times for n in range(1, count)]
    if rng.random() < 0.5:
        lines = lines[:1] + lines[:0:-1]
    return "\n".join(lines) + f"\nmodel: ${{k{count - 1}}}\n"


def _aliases(rng: random.Random) -> str:
    count, times = rng.randrange(2, 40), rng.randrange(1, 12)
    rows = ["k0: &k0 [x, y]"]
    rows += [f"k{n}: &k{n} [" + ", ".join([f"*k{n - 1}"] * times) + "]" for n in range(1, count)]
    return "\n".join(rows) + "\n"


def _deep(rng: random.Random) -> str:
    """Lists within each other, each holding the one before by interpolation; first or last first."""
    depth, links = rng.randrange(1, 64), [f"'${{k{n - 1}}}'" if n else 1 for n in range(rng.randrange(2, 60))]
    rows = [f"k{n}: {'[' * depth}{link}{']' * depth}" for n, link in enumerate(links)]
    return "\n".join(rows if rng.random() < 0.5 else rows[::-1]) + f"\nmodel: ${{k{len(rows) - 1}}}\n"


def _many(rng: random.Random) -> str:
    """Many texts with interpolations of middling length."""
    text = rng.choice(
        ("${model.source}", "${oc.env:HOME}", "${engine}", "${sampler.logit_bias.5}", "y" * 500 + "${.0}")
    )
    return f"model: a\nprompts: [{', '.join([repr(text * rng.randrange(1, 80))] * rng.randrange(1, 5_000))}]\n"


def _spellings(rng: random.Random) -> str:
    """One number, or nearly one, as several keys."""
    keys = (
        "10",
        "0xA",
        "012",
        "1_0",
        "10.0",
        "1e1",
        "0b1010",
        "'10'",
        "+10",
        "10.",
        "true",
        "yes",
        "1",
        "null",
        ".nan",
    )
    pairs = ", ".join(f"{key}: {rng.randrange(9)}" for key in rng.choices(keys, k=rng.randrange(1, 5)))
    return f"model: a\nsampler: {{logit_bias: {{{pairs}}}}}\n"


_BOMBS = (
    _deep,
    _many,
    _spellings,
    lambda rng: "# @package " + "a." * rng.randrange(1, 3_000) + rng.choice(("a", "", "a b")) + "\nmodel: a",
    lambda rng: "defaults: ['sampler@" + "a." * rng.randrange(1, 3_000) + "a: mine']\nmodel: a",
    lambda rng: "model: a\ny: [" + "[" * rng.randrange(1, 60) + "]" * 60 + "]" * rng.randrange(1, 5),
    lambda rng: f"defaults: [extra]\nmodel: a\nx: [{'1, ' * rng.randrange(1, 19_000)}]",
    _aliases,
    lambda rng: _aliases(rng).replace("[", "{a: 1, <<: [").replace("]", "]}"),
    lambda rng: _doubled(rng, "k0: " + "x" * rng.randrange(1, 2000), "${@}"),
    lambda rng: _doubled(rng, "k0: [1, 2]", "\n  - ${@}"),
    lambda rng: _doubled(rng, "k0: x", "${.@}"),
    lambda rng: _doubled(rng, "k0: x", "${oc.decode:${@}}"),
    lambda rng: "x: '" + "\\" * rng.randrange(1, 200_000) + rng.choice(("${x}", "a${model}", "${oc.env:HOME}")) + "'",
    lambda rng: "x: '" + rng.choice(("${model.source}", "\\${", "${oc.env:A,b}")) * rng.randrange(1, 200_000) + "'",
    lambda rng: "model: " + "[" * rng.randrange(1, 20_000),
    lambda rng: "- " * rng.randrange(1, 20_000) + "x",
    lambda rng: "model: '" + "${" * rng.randrange(1, 5_000) + "'",
    lambda rng: "model: ${oc.env:" + rng.choice("[{(\"'\\,: ") * rng.randrange(1, 5_000) + "}",
    lambda rng: "model: a\nprompts: [" + "x, " * rng.randrange(1, 5_000) + "]",
    lambda rng: f"model: a\nengine: {{seed: {'9' * rng.randrange(1, 20_000)}}}",
    lambda rng: f"model: a\n{'k' * rng.randrange(1, 200_000)}: 1",
    lambda rng: f"? {'k' * rng.randrange(1, 200_000)}\n: 1",
    lambda rng: "defaults: [" + "extra, " * rng.randrange(1, 600) + "]\nmodel: a",
    lambda rng: "defaults: [run, run]\nmodel: a",
    lambda rng: "model: " + "x" * rng.randrange(1, 300_000) + rng.choice(("", "${a}", "\\${", "${")),
)  # fmt: skip


@cache
def _registry() -> Any:
    return discover()


def warm() -> None:
    load_config("quickstart", registry=_registry())


def run(case: Case) -> None:
    files, overrides = case
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text, "utf-8", errors="surrogatepass")
    config = load_config("run.yaml", overrides, registry=_registry())
    _writable(plain(config))
    Path("again.yaml").write_text(render(config), "utf-8")
    again = load_config("again.yaml", registry=_registry())
    assert repr(plain(again)) == repr(plain(config)), "what `config show` prints composes to something else"


def _writable(config: Mapping[str, Any]) -> None:
    """As a run's record has it."""
    json.loads(json.dumps(config, default=repr))
