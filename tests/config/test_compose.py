"""Composition as Hydra 1.3 does it: the expected values were checked against Hydra itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from nanoengine.setup.config.composer import Shorthand

Composer = Callable[..., dict[str, Any]]
Refusal = Callable[..., str]

TREE: Mapping[str, str] = {
    "config.yaml": "defaults:\n  - db: mysql\n  - _self_\ntop: 1\n",
    "db/mysql.yaml": "driver: mysql\nport: 3306\n",
    "db/lite.yaml": "driver: lite\n",
    "base.yaml": "top: 0\nextra: yes\n",
}


def tree(**changes: str) -> dict[str, str]:
    """TREE with some files replaced; `db__mysql` stands for db/mysql.yaml."""
    return {**TREE, **{name.replace("__", "/") + ".yaml": text for name, text in changes.items()}}


CASES: list[tuple[str, dict[str, str], list[str], dict[str, Any]]] = [
    ("group", tree(), [], {"db": {"driver": "mysql", "port": 3306}, "top": 1}),
    ("group override", tree(), ["db=lite"], {"db": {"driver": "lite"}, "top": 1}),
    ("group deleted", tree(), ["~db"], {"top": 1}),
    ("group deleted by option", tree(), ["~db=mysql"], {"top": 1}),
    ("list of options", tree(), ["db=[mysql,lite]"], {"db": {"driver": "lite", "port": 3306}, "top": 1}),
    (
        "without _self_ the file itself comes last",
        tree(config="defaults:\n  - base\ntop: 5\n"),
        [],
        {"top": 5, "extra": True},
    ),
    (
        "_self_ first: what is chosen wins",
        tree(config="defaults:\n  - _self_\n  - base\ntop: 5\n"),
        [],
        {"top": 0, "extra": True},
    ),
    ("null option", tree(config="defaults:\n  - db: null\ntop: 1\n"), [], {"top": 1}),
    ("null option overridden", tree(config="defaults:\n  - db: null\n"), ["db=lite"], {"db": {"driver": "lite"}}),
    ("??? given outside", tree(config="defaults:\n  - db: ???\n"), ["db=lite"], {"db": {"driver": "lite"}}),
    (
        "nested groups are relative, and so is their package",
        tree(db__lite="defaults:\n  - engine: fast\n", db__engine__fast="v: 1\n"),
        ["db=lite"],
        {"db": {"engine": {"v": 1}}, "top": 1},
    ),
    (
        "nested override of a nested group",
        tree(db__lite="defaults:\n  - engine: fast\n", db__engine__fast="v: 1\n", db__engine__slow="v: 2\n"),
        ["db=lite", "db/engine=slow"],
        {"db": {"engine": {"v": 2}}, "top": 1},
    ),
    (
        "plain file beside a nested one extends it",
        tree(db__lite="defaults:\n  - mysql\nport: 1\n"),
        ["db=lite"],
        {"db": {"driver": "mysql", "port": 1}, "top": 1},
    ),
    ("append a group", tree(config="top: 1\n"), ["+db=lite"], {"db": {"driver": "lite"}, "top": 1}),
    ("set", tree(), ["top=7", "db.port=1"], {"db": {"driver": "mysql", "port": 1}, "top": 7}),
    ("add", tree(), ["+db.user=me"], {"db": {"driver": "mysql", "port": 3306, "user": "me"}, "top": 1}),
    ("force", tree(), ["++db.port=1", "++db.new=2"], {"db": {"driver": "mysql", "port": 1, "new": 2}, "top": 1}),
    ("delete", tree(), ["~db.port"], {"db": {"driver": "mysql"}, "top": 1}),
    ("delete by value", tree(), ["~db.port=3306", "~top"], {"db": {"driver": "mysql"}}),
    ("mapping merges", tree(), ["db={port: 1}"], {"db": {"driver": "mysql", "port": 1}, "top": 1}),
    ("list replaces", tree(config="l: [1, 2, 3]\n"), ["l=[9]"], {"l": [9]}),
    ("list item", tree(config="l: [1, 2, 3]\n"), ["l.2=8"], {"l": [1, 2, 8]}),
    ("later override wins", tree(), ["top=2", "top=3"], {"db": {"driver": "mysql", "port": 3306}, "top": 3}),
    (
        "interpolation",
        tree(config="a: 2\nb: ${a}\nc: x${a}y\nd: {e: '${..a}'}\n"),
        [],
        {"a": 2, "b": 2, "c": "x2y", "d": {"e": 2}},
    ),
    ("interpolation sees overrides", tree(config="a: 2\nb: ${a}\n"), ["a=5"], {"a": 5, "b": 5}),
    ("interpolation in an override", tree(config="a: 2\n"), ["+b=${a}"], {"a": 2, "b": 2}),
    ("escaped interpolation", tree(config="a: '\\${x}'\n"), [], {"a": "${x}"}),
    ("??? filled by a later file", tree(base="top: ???\n", config="defaults:\n  - base\ntop: 3\n"), [], {"top": 3}),
    (
        "??? does not undo what an earlier file gave",
        tree(base="top: ???\n", config="defaults:\n  - _self_\n  - base\ntop: 3\n"),
        [],
        {"top": 3},
    ),
    (
        "merge keys and anchors",
        tree(config="a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3\n"),
        [],
        {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}},
    ),
]


@pytest.mark.parametrize(("files", "overrides", "expected"), [pytest.param(*c[1:], id=c[0]) for c in CASES])
def test_as_hydra(composed: Composer, files: dict[str, str], overrides: list[str], expected: dict[str, Any]) -> None:
    assert composed(files, *overrides) == expected


VALUES: list[tuple[str, Any]] = [
    ("1e-3", 0.001),
    ("1e3", 1000.0),
    ("3", 3),
    ("-1", -1),
    ("true", True),
    ("null", None),
    ("", ""),
    ("'null'", "null"),
    ("'3'", "3"),
    ("a=b=c", "a=b=c"),
    ("'a, b'", "a, b"),
    ("[a, 'b, c', 1.5]", ["a", "b, c", 1.5]),
    ("[what is x=y?]", ["what is x=y?"]),
    ("{5: -1.5, 7: 2}", {5: -1.5, 7: 2}),
    ("{a: {b: [1]}}", {"a": {"b": [1]}}),
    ("/a/b c.txt", "/a/b c.txt"),
    ("http://x:80/y", "http://x:80/y"),
    ("'it''s'", "it's"),
    ("it's", "it's"),
    ('"line\\nbreak"', "line\nbreak"),
    ("héllo 日本", "héllo 日本"),
    ("\\${x}", "${x}"),
    ("results(1).jsonl", "results(1).jsonl"),
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_override_values_are_yaml(composed: Composer, text: str, value: Any) -> None:
    found = composed({"config.yaml": "x: 1\n"}, f"x={text}")["x"]
    assert found == value
    assert type(found) is type(value)


def test_list_items_may_be_named_as_messages_name_them(composed: Composer) -> None:
    assert composed({"config.yaml": "l: [1, {a: 2}]\n"}, "l[0]=9", "l[1].a=8") == {"l": [9, {"a": 8}]}


def test_a_list_may_replace_a_mapping_and_the_other_way_round(composed: Composer) -> None:
    files = {"base.yaml": "p: [1, 2]\nq: {a: 1}\n", "config.yaml": "defaults: [base]\np: {file: x}\nq: [3]\n"}
    assert composed(files) == {"p": {"file": "x"}, "q": [3]}
    assert composed(files, "p=[4]", "q={b: 2}") == {"p": [4], "q": {"b": 2}}


def test_group_that_no_list_has_is_added_at_the_end_and_wins(composed: Composer) -> None:
    files = tree(config="db:\n  driver: mine\n  user: me\n")
    assert composed(files, "db=lite") == {"db": {"driver": "lite", "user": "me"}}


def test_shorthand_takes_what_no_file_has(composed: Composer) -> None:
    shorthands = {"db": Shorthand("driver", lambda option: "/" in option, ["known"])}
    assert composed(tree(), "db=./path", shorthands=shorthands)["db"] == {"driver": "./path"}
    assert composed(tree(), "db=lite", shorthands=shorthands)["db"] == {"driver": "lite"}
    listed = tree(config="defaults:\n  - db: ./path\n")
    assert composed(listed, shorthands=shorthands)["db"] == {"driver": "./path"}
    plain = tree(config="db: anything\n")
    assert composed(plain, shorthands=shorthands)["db"] == {"driver": "anything"}


REFUSED: list[tuple[str, dict[str, str], list[str], list[str]]] = [
    ("unknown option", tree(), ["db=mysq"], ["override 'db=mysq'", "'mysq'", "did you mean 'mysql'?"]),
    (
        "unknown option in a file",
        tree(config="defaults:\n  - db: mysq\n"),
        [],
        ["config.yaml:2", "did you mean 'mysql'?"],
    ),
    ("unknown group", tree(config="defaults:\n  - dd: mysql\n"), [], ["config.yaml:2", "no config group 'dd'", "db"]),
    ("unknown plain file", tree(config="defaults:\n  - bas\n"), [], ["config.yaml:2", "did you mean 'base'?"]),
    (
        "must be chosen",
        tree(config="defaults:\n  - db: ???\n"),
        [],
        ["config.yaml:2", "db must be chosen", "lite, mysql"],
    ),
    ("must be given", tree(config="a: 1\nb: ???\n"), [], ["config.yaml:2", "b: must be given"]),
    (
        "chosen twice",
        tree(config="defaults:\n  - db: lite\n  - db: mysql\n"),
        [],
        ["config.yaml:2", "config.yaml:3", "twice"],
    ),
    ("two selfs", tree(config="defaults:\n  - _self_\n  - _self_\n"), [], ["config.yaml:3", "_self_ stands twice"]),
    ("override entry", tree(config="defaults:\n  - override db: lite\n"), [], ["config.yaml:2", "'override' before"]),
    ("optional entry", tree(config="defaults:\n  - optional db: lite\n"), [], ["config.yaml:2", "'optional' before"]),
    ("optional file", tree(config="defaults:\n  - optional base\n"), [], ["config.yaml:2", "'optional' before"]),
    ("group from the root", tree(db__lite="defaults:\n  - /db: x\n"), ["db=lite"], ["lite.yaml:2", "from the root"]),
    ("unknown word", tree(config="defaults:\n  - maybe db: lite\n"), [], ["config.yaml:2", "'maybe db'"]),
    ("no entry", tree(config="defaults:\n  - {a: b, c: d}\n"), [], ["config.yaml:2", "no entry"]),
    ("number as an entry", tree(config="defaults:\n  - 3\n"), [], ["config.yaml:2", "no entry"]),
    ("no list", tree(config="defaults:\n  db: lite\n"), [], ["config.yaml:1", "must be a list"]),
    ("yes as an option", tree(config="defaults:\n  - db: off\n"), [], ["config.yaml:2", "quotes"]),
    ("interpolated option", tree(config="defaults:\n  - db: ${x}\n"), [], ["config.yaml:2", "interpolation inside"]),
    ("interpolated file", tree(config="defaults:\n  - ${x}\n"), [], ["config.yaml:2", "interpolation inside"]),
    ("package", tree(config="defaults:\n  - db@a.b: lite\n"), [], ["config.yaml:2", "'db@a.b'", "the section 'db'"]),
    ("global package", tree(config="defaults:\n  - db@_global_: lite\n"), [], ["config.yaml:2", "packages (@)"]),
    ("package of a file", tree(config="defaults:\n  - base@x\n"), [], ["config.yaml:2", "packages (@)"]),
    ("package override", tree(), ["db@s=mysql"], ["override 'db@s=mysql'", "packages (@)"]),
    ("header", tree(db__lite="# @package _global_\nd: 1\n"), ["db=lite"], ["lite.yaml:1", "'# @package _global_'"]),
    ("header of the main file", tree(config="\n# @x\n#@package a b\n"), [], ["config.yaml:3", "'#@package a b'"]),
    ("draws itself in", tree(db__lite="defaults: [lite]\n"), ["db=lite"], ["lite.yaml:1", "draws itself in"]),
    ("hydra settings", tree(config="hydra: {run: 1}\n"), [], ["config.yaml:1", "Hydra itself"]),
    (
        "_target_ deep inside",
        tree(config="a:\n  - b:\n      _target_: os.system\n"),
        [],
        ["config.yaml", "a[0].b._target_"],
    ),
    ("_target_ override", tree(), ["+a._target_=x"], ["+a._target_=x", "_target_"]),
    ("_target_ in an override's value", tree(), ["+a={b: {_target_: x}}"], ["_target_"]),
    ("hydra override", tree(), ["hydra.run.dir=x"], ["hydra.run.dir=x", "Hydra itself"]),
    ("hydra group", tree(), ["hydra/launcher=x"], ["Hydra itself"]),
    ("defaults override", tree(), ["defaults=[]"], ["group=option"]),
    ("no override", tree(), ["top"], ["'top' is no override"]),
    ("yaml style", tree(), ["top: 3"], ["is no override"]),
    ("no key", tree(), ["=3"], ["'' is no key"]),
    ("blank in the key", tree(), ["a b=3"], ["'a b' is no key"]),
    ("empty part of a key", tree(), ["a..b=3"], ["'a..b' is no key"]),
    ("+ on what is there", tree(), ["+top=3"], ["'+top=3'", "there already (1)"]),
    ("+ of a group that is there", tree(), ["+db=lite"], ["config.yaml:2", "+db=lite", "twice"]),
    ("++ of a group", tree(), ["++db=lite"], ["++ is not supported for a group"]),
    ("~ of nothing", tree(), ["~db.user"], ["db.user is not in"]),
    ("~ of another value", tree(), ["~db.port=1"], ["db.port is 3306"]),
    ("sweep", tree(), ["top=1,2"], ["sweep", "[1,2]"]),
    ("sweep of options", tree(), ["db=lite,mysql"], ["sweep"]),
    ("function", tree(), ["top=range(1,3)"], ["range() is not supported"]),
    ("cast", tree(), ["top=int(3.0)"], ["int() is not supported"]),
    ("comment cut off", tree(), ["top=a #b"], ["only 'a'", "quotes"]),
    ("broken yaml", tree(), ["top=[1"], ["'top=[1'", "not valid YAML"]),
    ("open quote", tree(), ["top='abc"], ["not valid YAML"]),
    ("mapping without a blank", tree(), ["top={a:1}"], ["'a:1'", "blank after the colon"]),
    ("option that is a mapping's number", tree(), ["db=1.5"], ["'1.5'"]),
    ("list index", tree(config="l: [1]\n"), ["l[3]=1"], ["l[3]=1", "out of range"]),
    ("list key", tree(config="l: [1]\n"), ["l.x=1"], ["l.x=1"]),
    ("unknown interpolation", tree(config="a: 1\nb:\n  c: ${nope}\n"), [], ["config.yaml:3", "b.c", "nope"]),
    ("broken interpolation", tree(config="a: 1\nb: 'x ${'\n"), [], ["config.yaml:2", "b", "\\${"]),
    ("resolver of Hydra", tree(config="a: ${hydra:runtime.cwd}\n"), [], ["config.yaml:1", "hydra"]),
    ("interpolation in a ring", tree(config="a: ${b}\nb: ${a}\n"), [], ["config.yaml"]),
    ("group without a group", tree(), ["nope/x=1"], ["no config group 'nope/x'", "db"]),
    ("way out of the folder", tree(), ["db=../base"], ["'../base'"]),
]


@pytest.mark.parametrize(("files", "overrides", "words"), [pytest.param(*c[1:], id=c[0]) for c in REFUSED])
def test_refused_by_name(refusal: Refusal, files: dict[str, str], overrides: list[str], words: list[str]) -> None:
    message = refusal(files, *overrides)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
