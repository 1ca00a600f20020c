"""YAML that means too much, or nothing: refused by file and line, before anything is built of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from nanoengine.api.errors import ConfigError
from nanoengine.setup.config.config import load_config
from nanoengine.setup.plugins.discover import discover

TEXTS = "\n".join(["a0: xy", *(f"a{n}: ${{a{n - 1}}}${{a{n - 1}}}" for n in range(1, 40)), "model: ${a39}"])
CHAIN = "\n".join(["model: ${a0}", *(f"a{n}: ${{a{n + 1}}}" for n in range(1000)), "a1000: x"])


def nested(depth: int, inner: str) -> str:
    return "[" * depth + inner + "]" * depth


REFUSED: list[tuple[str, str, list[str]]] = [
    (
        "aliases of aliases",
        "a: &a [x, y]\nb: &b [*a, *a]\n",
        ["f.yaml:1:", "anchors and aliases (&x, *x), here of 'a'"],
    ),
    ("an alias of nothing", "a: 1\nb: [*a]\n", ["f.yaml:2:", "anchors and aliases"]),
    ("an anchor within itself", "model: a/b\nx: &a\n  y: *a\n", ["f.yaml:2:", "anchors and aliases"]),
    ("a merge key", "model: a/b\nx:\n  <<: {y: 1}\n", ["f.yaml:3:", "merge keys (<<) are not supported"]),
    ("deep lists", "model: a\nx: " + "[" * 100_000, ["f.yaml:2:", "more than 64 deep"]),
    ("deep blocks", "x:\n" + "".join(" " * n + "- \n" for n in range(1, 90)), ["f.yaml:65:", "more than 64 deep"]),
    ("deep mappings", "x: " + "{a: " * 5_000, ["f.yaml:1:", "more than 64 deep"]),
    ("a long number", f"model: a\nengine: {{seed: {'9' * 5_000}}}", ["f.yaml:2:", "a number of 5000 characters"]),
    ("a long hexadecimal number", f"engine: {{seed: 0x{'f' * 50_000}}}", ["f.yaml:1:", "a number of 50002 characters"]),
    ("a long number of base 60", "x: " + "1:" * 20_000 + "1", ["f.yaml:1:", "a number of 40001 characters"]),
    ("a quoted number", f"x: !!int '{'9' * 5_000}'", ["f.yaml:1:", "the tag", "int", "is not supported"]),
    ("a long key", f"? {'k' * 1_000_000}\n: 1\n", ["f.yaml:1:", "a key of 1000000 characters"]),
    ("a list as a key", "model: a\n? [a, b]\n: 1\n", ["f.yaml:2:", "cannot be a key"]),
    ("an alias as a key", "model: a\n*m : 1\n", ["f.yaml:2:", "anchors and aliases"]),
    ("no key", "model: a\nengine:\n  null: 1\n", ["f.yaml:3:", "null is no key"]),
    ("a key twice", "model: a\nengine:\n  seed: 1\n  seed: 2\n", ["f.yaml:4:", "duplicate key 'seed'"]),
    ("a number as a key twice", "sampler: {logit_bias: {5: 1, 5: 2}}\n", ["f.yaml:1:", "duplicate key '5'"]),
    ("binary", "model: a\nx: !!binary aGVsbG8=\n", ["f.yaml:2:", "the tag", "binary", "is not supported"]),
    ("a set", "x: !!set {a}\n", ["f.yaml:1:", "is not supported"]),
    ("a tag of one's own", "x: !thing {a: 1}\n", ["f.yaml:1:", "the tag '!thing' is not supported"]),
    ("a Python object", "x: !!python/object/apply:os.system [ls]\n", ["f.yaml:1:", "is not supported"]),
    ("no integer", "model: a\nx: 0b_\n", ["f.yaml:2:", "'0b_' is no int"]),
    ("a NUL", "model: a\nx: 'a\0b'\n", ["f.yaml:2: not YAML: it holds a NUL byte"]),
    ("a control character", "model: a\u2028\nx: \x07\n", ["f.yaml:3: not YAML: it holds a control", "U+0007"]),
    (
        "one key in two spellings",
        "sampler:\n  logit_bias: {10: 1,\n    0xA: 2}\n",
        ["f.yaml:3:", "key '10', spelt 0xA"],
    ),
    ("octal and decimal", "sampler: {logit_bias: {8: 1, 010: 2}}\n", ["f.yaml:1:", "duplicate key '8', spelt 010"]),
    ("an integer with _", "sampler: {logit_bias: {10: 1, 1_0: 2}}\n", ["f.yaml:1:", "duplicate key '10', spelt 1_0"]),
    ("an integer as a float", "sampler: {logit_bias: {10: 1, 10.0: 2}}\n", ["f.yaml:1:", "duplicate key '10.0'"]),
    ("a number as a text", "sampler: {logit_bias: {0xA: 1, '10': 2}}\n", ["f.yaml:1:", "duplicate key '10'"]),
    ("within a list", "x:\n  - {10: 1, 0xA: 2}\n", ["f.yaml:2:", "duplicate key '10'"]),
    ("a truth value as a key", "model: a\nno: 2\n", ["f.yaml:2: the key no is a truth value to YAML"]),
    ("a number as a key", "model: a\n0x10: 2\n", ["f.yaml:2: unknown key '16'"]),
    ("null as a key", "model: a\n~: 2\n", ["f.yaml:2: null is no key"]),
    ("a list by interpolation", "model: a\nprompts: ${x}\nx: [a]\n", ["f.yaml:2: prompts: x is a list"]),
    ("too many values", "prompts: [" + "x," * 20_001 + "]", ["f.yaml:1:", "more than 20,000 values"]),
    ("texts that double", TEXTS, ["f.yaml:", "interpolations make more than 100,000 values"]),
    ("a long chain", CHAIN, ["f.yaml:", "more than 50 interpolations refer to one another"]),
    (
        "a ring",
        "model: ${output}\noutput: ${model}x\n",
        ["f.yaml:1:", "model -> output -> model"],
    ),
    ("its own parent", "model: a\nengine: {seed: '${engine}'}\n", ["f.yaml:2: engine.seed: engine is a mapping"]),
    ("above the root", "model: ${....x}\n", ["f.yaml:1:", "begins above the configuration"]),
    ("open braces", "model: '" + "${" * 20_000 + "'\n", ["f.yaml:1: model: '${", "has no closing }", r"\${"]),
    ("nested braces", "model: '" + "${" * 400 + "}'\n", ["f.yaml:1: model: ", "within an interpolation"]),
    ("a long interpolation", "model: ${" + "x" * 1_001 + "}\n", ["f.yaml:1: model", "more than 1,000 characters"]),
    ("a long resolver", "model: ${" + "x" * 900 + ":y}\n", ["f.yaml:1: model: the resolver 'xxx"]),
    ("no environment", "model: ${oc.env:NO_SUCH_VARIABLE}\n", ["f.yaml:1:", "has no variable 'NO_SUCH_VARIABLE'"]),
    (
        "a module's import",
        "model: ${oc.coerce:antigravity.x,1}\n",
        ["f.yaml:1:", "the resolver 'oc.coerce' is not supported"],
    ),
]


@pytest.fixture(scope="module")
def registry() -> Any:
    return discover()


@pytest.mark.parametrize(("text", "words"), [pytest.param(*each[1:], id=each[0]) for each in REFUSED])
def test_refused_by_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Any, text: str, words: list[str]
) -> None:
    (tmp_path / "f.yaml").write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config("f.yaml", registry=registry)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)[:500]
    assert len(str(caught.value)) < 1000
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.seed=" + "9" * 5_000, "a number of 5000 characters"),
        ("prompts=" + "[" * 50_000, "more than 64 deep"),
        ("prompts=&a [*a]", "anchors and aliases"),
        ("prompts=[*b]", "anchors and aliases"),
        ("model=!!binary aGk=", "is not supported"),
        ("output=0b_", "'0b_' is no int"),
        ("output=" + "${" * 20_000, "has no closing }"),
        ("model=\udcff", "bytes that are not UTF-8"),
        ('prompts=["\\ud83d"]', "not valid YAML"),
        ("engine." + "a." * 60 + "b=1", "unknown key"),
        ("prompts[" + "9" * 150 + "]=x", "set prompts as a whole"),
        ("engine." + "a." * 200 + "b=1", "no key is so long, or so deep"),
        ("prompts[" + "9" * 5_000 + "]=x", "no key is so long, or so deep"),
        ("prompts.²=x", "prompts is a list, which has no key '²'"),
        ("engine.seed.x=${engine}", "engine is a mapping"),
        ("sampler={3: x}", "unknown key"),
        ("sampler.seed=[1, 2", "not valid YAML"),
        ("model=a\0b", "not YAML"),
        ("model=" + "x" * 300 + "\t,", "needs --multirun"),
        ("sampler=" + "x" * 100_000, "no 'xxx"),
    ],
)
def test_refused_by_override(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Any, override: str, words: str
) -> None:
    (tmp_path / "f.yaml").write_text("model: a/b\nprompts: [x]\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config("f.yaml", [override], registry=registry)
    assert words in str(caught.value)
    assert "override '" in str(caught.value)


MADE = "interpolations make more than 100,000 values, or too long texts"
BIAS = "".join(f"{n}: 1, " for n in range(8_000))
SOON: list[tuple[str, str, str]] = [
    ("many texts of interpolations", "x: [" + f"'{'${model.source}' * 60}'," * 4000 + "]", MADE),
    ("one text of interpolations", f"x: '{'${model.source}' * 200_000}'", MADE),
    ("long texts of the environment", "x: [" + "'${oc.env:NANOENGINE_TEST_LONG}'," * 15_000 + "]", MADE),
    ("many long texts with one", f"y: {'y' * 90_000}\nx: [" + "'${y}'," * 200 + "]", MADE),
    ("many backslashes", "x: ['" + "\\" * 1_000_000 + "a${model.source}']", "unknown key 'x'"),
    ("many escaped ones", "x: ['" + "\\${" * 500_000 + "']", "unknown key 'x'"),
    ("blanks in a default", "x: '${oc.env:A," + " " * 900 + "b\"}'", "is no key, nor oc.env"),
    ("many deep lists", "x: [" + (nested(60, "1") + ",") * 320 + "]", "unknown key 'x'"),
    ("many values", "x: [" + "1," * 19_990 + "]", "unknown key 'x'"),
    ("a key among many", f"y: {{{BIAS}}}\nx: [" + "'${model.source}${y.nope}'," * 1500 + "]", "there is no y.nope"),
]


@pytest.mark.parametrize(("text", "words"), [pytest.param(*each[1:], id=each[0]) for each in SOON])
def test_what_is_within_each_bound_ends_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Any, text: str, words: str
) -> None:
    """Each took from 4 s to minutes; the fuzz script bounds the time."""
    (tmp_path / "f.yaml").write_text(f"model: a/b\n{text}\n")
    monkeypatch.setenv("NANOENGINE_TEST_LONG", "x" * 10_000)
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "f.yaml", registry=registry)


@pytest.mark.parametrize("layers", [2, 5])
def test_files_that_replace_each_other_s_values_are_bounded_together(
    tmp_path: Path, registry: Any, layers: int
) -> None:
    bias = ", ".join(f"{n}: [1]" for n in range(6_000))
    for layer in range(layers):
        (tmp_path / f"big{layer}.yaml").write_text(f"x: {{{bias}}}\n")
    (tmp_path / "f.yaml").write_text(f"defaults: [{', '.join(f'big{layer}' for layer in range(layers))}]\nmodel: a/b\n")
    words = "unknown key 'x'" if layers == 2 else "big3.yaml:.*more than 40,000 values in all"
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "f.yaml", registry=registry)


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "link"])
def test_what_is_no_file_is_named_so(tmp_path: Path, registry: Any, kind: str) -> None:
    path = tmp_path / "other.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("other.yaml" if kind == "loop" else "nowhere.yaml")
    (tmp_path / "f.yaml").write_text("model: a/b\ndefaults:\n  - other\n")
    why = {"folder": "is a folder", "pipe": "is a pipe or device"}.get(kind, "is a link to nothing")
    with pytest.raises(ConfigError, match=rf"f\.yaml:3: .*other\.yaml {why}"):
        load_config(tmp_path / "f.yaml", registry=registry)
    with pytest.raises(ConfigError, match=f"{why}|Too many levels of symbolic links"):
        load_config(path, registry=registry)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"model: a/b\n# caf\xe9\n", "f.yaml: line 2 is not UTF-8 .*; save it as UTF-8"),
        ("model: a/b\n".encode("utf-16"), "line 1 is not UTF-8 .*; it is UTF-16; save it as UTF-8"),
        ("model: a/b\n".encode("utf-16-le"), "f.yaml:1: not YAML: it holds a NUL byte .*save it as UTF-8"),
    ],
)
def test_what_is_not_utf_8_has_its_line(tmp_path: Path, registry: Any, data: bytes, words: str) -> None:
    (tmp_path / "f.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "f.yaml", registry=registry)


def test_what_is_much_but_plain_passes(tmp_path: Path, registry: Any) -> None:
    line = "x" * 900_000
    prompts = f"['{line}', '{line}${{model.source}}', '{line}', '${{engine.seed}} ${{model.source}}']"
    text = f"model: a/b\nengine: {{seed: 1}}\nprompts: {prompts}\n"
    (tmp_path / "f.yaml").write_text(text)
    found = load_config(tmp_path / "f.yaml", registry=registry).prompts
    assert found == (line, f"{line}a/b", line, "1 a/b")
