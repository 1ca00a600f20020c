"""YAML that stands for too much, or for nothing: refused by file and line, before anything is built of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nanoengine.api.errors import ConfigError
from nanoengine.setup.config.config import load_config
from nanoengine.setup.plugins.discover import discover

ALIASES = "\n".join(["a0: &a0 [x, y]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))])
MERGED = "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60))])
TEXTS = "\n".join(["a0: xy", *(f"a{n}: ${{a{n - 1}}}${{a{n - 1}}}" for n in range(1, 40)), "model: ${a39}"])
LISTS = "\n".join(["a0: [x]", *(f"a{n}: ['${{a{n - 1}}}', '${{a{n - 1}}}']" for n in range(1, 40)), "prompts: ${a39}"])
CHAIN = "\n".join(["model: ${a0}", *(f"a{n}: ${{a{n + 1}}}" for n in range(1000)), "a1000: x"])


def nested(depth: int, inner: str) -> str:
    return "[" * depth + inner + "]" * depth


DEEP_ALIASES = "model: a\n" + "".join(f"z{n}: &z{n} {nested(30, f'*z{n - 1}' if n else '1')}\n" for n in range(40))
DEEP = [f"z{n}: " + nested(60, f"'${{z{n - 1}}}'" if n else "1") for n in range(45)]
DEEP_TEXTS = "\n".join(DEEP)
LAST_FIRST = "\n".join(reversed(DEEP))

REFUSED: list[tuple[str, str, list[str]]] = [
    ("aliases of aliases", ALIASES, ["f.yaml:12:", "aliases repeat more than 10,000 values"]),
    ("merge keys of merge keys", MERGED, ["f.yaml:", "aliases repeat more than 10,000 values"]),
    ("a long text again and again", f"a: &a {'x' * 10_000}\nb: [{'*a, ' * 1000}]\n", ["f.yaml:2:", "aliases repeat"]),
    ("an anchor within itself", "model: a/b\nx: &a\n  y: *a\n", ["f.yaml:3:", "*a stands within &a"]),
    ("a list within itself", "x: &a [*a]\n", ["f.yaml:1:", "it would hold itself"]),
    ("deep lists", "model: a\nx: " + "[" * 100_000, ["f.yaml:2:", "more than 64 deep"]),
    ("deep blocks", "x:\n" + "".join(" " * n + "- \n" for n in range(1, 90)), ["f.yaml:65:", "more than 64 deep"]),
    ("deep mappings", "x: " + "{a: " * 5_000, ["f.yaml:1:", "more than 64 deep"]),
    ("a long number", f"model: a\nengine: {{seed: {'9' * 5_000}}}", ["f.yaml:2:", "a number of 5000 characters"]),
    ("a long hexadecimal number", f"engine: {{seed: 0x{'f' * 50_000}}}", ["f.yaml:1:", "a number of 50002 characters"]),
    ("a long number of base 60", "x: " + "1:" * 20_000 + "1", ["f.yaml:1:", "a number of 40001 characters"]),
    ("a quoted number", f"x: !!int '{'9' * 5_000}'", ["f.yaml:1:", "a number of 5000 characters"]),
    ("a long key", f"? {'k' * 1_000_000}\n: 1\n", ["f.yaml:1:", "a key of 1000000 characters"]),
    ("a list as a key", "model: a\n? [a, b]\n: 1\n", ["f.yaml:2:", "cannot be a key"]),
    ("an alias as a key", "model: &m a\n*m : 1\n", ["f.yaml:2:", "*m is no key"]),
    ("no key", "model: a\nengine:\n  null: 1\n", ["f.yaml:3:", "null is no key"]),
    ("a key twice", "model: a\nengine:\n  seed: 1\n  seed: 2\n", ["f.yaml:4:", "duplicate key 'seed'"]),
    ("a number as a key twice", "sampler: {logit_bias: {5: 1, 5: 2}}\n", ["f.yaml:1:", "duplicate key '5'"]),
    ("binary", "model: a\nx: !!binary aGVsbG8=\n", ["f.yaml:2:", "the tag", "binary", "is not supported"]),
    ("a set", "x: !!set {a}\n", ["f.yaml:1:", "is not supported"]),
    ("a tag of one's own", "x: !thing {a: 1}\n", ["f.yaml:1:", "the tag '!thing' is not supported"]),
    ("a Python object", "x: !!python/object/apply:os.system [ls]\n", ["f.yaml:1:", "is not supported"]),
    ("no integer", "model: a\nx: !!int abc\n", ["f.yaml:2:", "'abc' is no int"]),
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
    ("within a merged mapping", "x:\n  <<: {10: 1, 0xA: 2}\n", ["f.yaml:2:", "duplicate key '10'"]),
    ("a truth value as a key", "model: a\nno: 2\n", ["f.yaml:2: the key no is a truth value to YAML"]),
    ("a number as a key", "model: a\n0x10: 2\n", ["f.yaml:2: unknown key '16'"]),
    ("null as a key", "model: a\n~: 2\n", ["f.yaml:2: null is no key"]),
    ("a list's item that is not there", "model: '${prompts[9]}'\nprompts: [a]\n", ["f.yaml:1:", "a list of 1"]),
    ("aliases within each other", DEEP_ALIASES, ["f.yaml:4:", "more than 64 deep"]),
    ("depth by interpolation", "model: a\n" + DEEP_TEXTS, ["f.yaml:3: z1[0]", "more than 64 deep"]),
    ("depth by interpolation, the last first", LAST_FIRST, ["f.yaml:", "interpolation makes", "more than 64 deep"]),
    ("too many values", "prompts: [" + "x," * 20_001 + "]", ["f.yaml:1:", "more than 20,000 values"]),
    ("texts that double", TEXTS, ["f.yaml:", "interpolations make more than 100,000 values"]),
    ("lists that double", LISTS, ["f.yaml:", "interpolations make more than 100,000 values"]),
    ("a long chain", CHAIN, ["f.yaml:", "more than 50 interpolations refer to one another"]),
    (
        "a ring",
        "model: ${output}\noutput: ${model}x\n",
        ["f.yaml:1:", "model -> output -> model"],
    ),
    ("its own parent", "model: a\nengine: {seed: '${engine}'}\n", ["f.yaml:2:", "holds this very key"]),
    ("above the root", "model: ${....x}\n", ["f.yaml:1:", "begins above the configuration"]),
    ("open braces", "model: '" + "${" * 20_000 + "'\n", ["f.yaml:1: model: a text has interpolations of", r"\${"]),
    ("a long text with one", "model: " + "x" * 200_000 + "${a}\n", ["f.yaml:1: model: a text with ${ in it has"]),
    ("no environment", "model: ${oc.env:NO_SUCH_VARIABLE}\n", ["f.yaml:1:", "has no variable 'NO_SUCH_VARIABLE'"]),
    ("a long text to decode", "model: ${oc.decode:${oc.env:NANOENGINE_TEST_LONG}}\n", ["f.yaml:1:", "at most 10,000"]),
    ("brackets to decode", "model: ${oc.decode:${oc.env:NANOENGINE_TEST_DEEP}}\n", ["f.yaml:1:", "RecursionError"]),
    ("a module's import", "model: ${oc.coerce:antigravity.x,1}\n", ["f.yaml:1:", "'oc.coerce'"]),
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
    monkeypatch.setenv("NANOENGINE_TEST_LONG", "x" * 100_000)
    monkeypatch.setenv("NANOENGINE_TEST_DEEP", "[" * 9_000)
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
        ("prompts=&a [*a]", "it would hold itself"),
        ("prompts=[&a [x], *b]", "not valid YAML"),
        ("model=!!binary aGk=", "is not supported"),
        ("model=!!int x", "'x' is no int"),
        ("output=" + "${" * 20_000, "a text has interpolations of"),
        ("model=\udcff", "bytes that are not UTF-8"),
        ('prompts=["\\ud83d"]', "not valid YAML"),
        ("engine." + "a." * 60 + "b=1", "unknown key"),
        ("engine." + "a." * 200 + "b=1", "no key is so long, or so deep"),
        ("prompts[" + "9" * 5_000 + "]=x", "no key is so long, or so deep"),
        ("prompts.²=x", "prompts is a list, which has no key '²'"),
        ("engine.seed.x=${engine}", "'engine' holds this very key"),
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


ALL = "more than 20,000 characters in all"
BIAS = "".join(f"{n}: 1, " for n in range(8_000))
SOON: list[tuple[str, str, str]] = [
    ("many long texts of interpolations", "x: [" + f"'{'${model}' * 60}'," * 4000 + "]", ALL),
    ("many interpolations", "x: [" + "'${oc.env:HOME}'," * 15_000 + "]", ALL),
    ("many long texts with one", "x: [" + f"'{'y' * 90_000}${{a}}'," * 20 + "]", ALL),
    ("much to decode", "x: [" + "'${oc.decode:${oc.env:NANOENGINE_TEST_LONG}}'," * 400 + "]", ALL),
    ("many deep lists", "x: [" + (nested(60, "1") + ",") * 320 + "]", "unknown key 'x'"),
    ("many values", "x: [" + "1," * 19_990 + "]", "unknown key 'x'"),
    ("integer keys", f"y: {{{BIAS}}}\nx: [" + "'${y.5}'," * 1500 + "]", "unknown key"),
    ("copied and dropped", "y: [" + "1," * 9000 + "]\nx: '" + "${oc.select:model,${y}}" * 40 + "'", "100,000 values"),
]


@pytest.mark.parametrize(("text", "words"), [pytest.param(*each[1:], id=each[0]) for each in SOON])
def test_what_is_within_each_bound_ends_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Any, text: str, words: str
) -> None:
    """Each took from 4 s to minutes; the fuzz script bounds the time."""
    (tmp_path / "f.yaml").write_text(f"model: a/b\n{text}\n")
    monkeypatch.setenv("NANOENGINE_TEST_LONG", "'" + "x" * 900 + "'")
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "f.yaml", registry=registry)


@pytest.mark.parametrize("layers", [2, 5])
def test_files_that_replace_each_other_s_values_are_bounded_together(
    tmp_path: Path, registry: Any, layers: int
) -> None:
    bias = ", ".join(f"{n}: [1]" for n in range(6_000))
    (tmp_path / "big.yaml").write_text(f"x: {{{bias}}}\n")
    (tmp_path / "f.yaml").write_text(f"defaults: [{', '.join(['big'] * layers)}]\nmodel: a/b\n")
    words = "unknown key 'x'" if layers == 2 else "big.yaml:.*more than 40,000 values in all"
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
    said = {"folder": "is a folder", "pipe": "is a pipe or device"}.get(kind, "is a link to nothing")
    with pytest.raises(ConfigError, match=rf"f\.yaml:3: .*other\.yaml {said}"):
        load_config(tmp_path / "f.yaml", registry=registry)
    with pytest.raises(ConfigError, match=f"{said}|Too many levels of symbolic links"):
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


def test_defaults_lists_that_double_are_refused(tmp_path: Path, registry: Any) -> None:
    (tmp_path / "f.yaml").write_text("defaults: [f0, f0]\nmodel: a/b\n")
    for n in range(30):
        (tmp_path / f"f{n}.yaml").write_text(f"defaults: [f{n + 1}, f{n + 1}]\n" if n < 29 else "chat: true\n")
    with pytest.raises(ConfigError, match="defaults lists draw in more than 500 files"):
        load_config(tmp_path / "f.yaml", registry=registry)


def test_what_is_much_but_plain_passes(tmp_path: Path, registry: Any) -> None:
    line = "x" * 900_000
    prompts = f"['{line}', &p '{line}', *p, '${{engine.seed}} ${{model.source}}']"
    text = f"model: a/b\nengine: &e {{seed: 1}}\nprompts: {prompts}\n"
    (tmp_path / "f.yaml").write_text(text)
    found = load_config(tmp_path / "f.yaml", registry=registry).prompts
    assert found == (line, line, line, "1 a/b")


def test_interpolation_is_omegaconf_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Any) -> None:
    monkeypatch.setenv("NANOENGINE_TEST", "${not} again")
    OmegaConf.register_resolver("nanoengine_test.twice", lambda text: f"{text}{text}")
    texts: dict[str, Any] = {
        "${engine.seed}x": "7x", "a${.2}": "aplain", "plain": "plain", "${oc.env:NANOENGINE_TEST}": "${not} again",
        "${oc.env:NO_SUCH_VARIABLE,x}": "x", "${oc.select:nothing,y}": "y", "${oc.select:model.source}": "a/b",
        "${oc.decode:'${model.source}'}": "a/b", r"\${x}": "${x}", r"\\${model.source}": r"\a/b",
        "${model.${oc.decode:source}}": "a/b", "${prompts[2]}": "plain", "${nanoengine_test.twice:ab}": "abab",
        "${engine.max_num_seqs} x": "256 x",
    }  # fmt: skip
    try:
        lines = "".join(f'  - "{text}"\n'.replace("\\", "\\\\") for text in texts)
        (tmp_path / "f.yaml").write_text("model: a/b\nengine: {seed: 7}\nprompts:\n" + lines)
        found = load_config(tmp_path / "f.yaml", registry=registry).prompts
    finally:
        OmegaConf.clear_resolver("nanoengine_test.twice")
    assert found is not None
    assert found == tuple(texts.values())
