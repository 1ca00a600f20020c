"""Composition as Hydra 1.3 does it (the expected values were checked against Hydra itself), and what is refused."""

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
    """TREE with some files replaced; `db__mysql` means db/mysql.yaml."""
    return {**TREE, **{name.replace("__", "/") + ".yaml": text for name, text in changes.items()}}


CASES: list[tuple[str, dict[str, str], list[str], dict[str, Any]]] = [
    ("group", tree(), [], {"db": {"driver": "mysql", "port": 3306}, "top": 1}),
    ("group override", tree(), ["db=lite"], {"db": {"driver": "lite"}, "top": 1}),
    ("group deleted", tree(), ["~db"], {"top": 1}),
    ("group deleted and chosen again", tree(), ["~db", "db=lite"], {"db": {"driver": "lite"}, "top": 1}),
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
    ("append a group", tree(config="top: 1\n"), ["+db=lite"], {"db": {"driver": "lite"}, "top": 1}),
    ("append a group with ++", tree(config="top: 1\n"), ["++db=lite"], {"db": {"driver": "lite"}, "top": 1}),
    ("group overridden with ++", tree(), ["++db=lite"], {"db": {"driver": "lite"}, "top": 1}),
    ("group that is a section's body deleted", tree(config="db: {driver: x}\ntop: 1\n"), ["~db"], {"top": 1}),
    ("set", tree(), ["top=7", "db.port=1"], {"db": {"driver": "mysql", "port": 1}, "top": 7}),
    ("add", tree(), ["+db.user=me"], {"db": {"driver": "mysql", "port": 3306, "user": "me"}, "top": 1}),
    ("force", tree(), ["++db.port=1", "++db.new=2"], {"db": {"driver": "mysql", "port": 1, "new": 2}, "top": 1}),
    ("delete", tree(), ["~db.port"], {"db": {"driver": "mysql"}, "top": 1}),
    ("delete twice", tree(), ["~db.port", "~top"], {"db": {"driver": "mysql"}}),
    ("mapping merges", tree(), ["db={port: 1}"], {"db": {"driver": "mysql", "port": 1}, "top": 1}),
    ("list replaces", tree(config="l: [1, 2, 3]\n"), ["l=[9]"], {"l": [9]}),
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
    ("??? in a list is a text", tree(config="l: ['???', {a: '???'}]\n"), [], {"l": ["???", {"a": "???"}]}),
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
    # mistakes
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
        "chosen twice",
        tree(config="defaults:\n  - db: lite\n  - db: mysql\n"),
        [],
        ["config.yaml:2 and ", "config.yaml:3", "db is chosen twice", "write db=OPTION on the command line"],
    ),
    (
        "chosen twice by overrides",
        tree(),
        ["db=lite", "db=mysql"],
        ["override 'db=lite' and override 'db=mysql': db is chosen twice; leave one out"],
    ),
    ("two selfs", tree(config="defaults:\n  - _self_\n  - _self_\n"), [], ["config.yaml:3", "_self_ is chosen twice"]),
    ("a file twice", tree(config="defaults: [base,\n  base]\n"), [], ["config.yaml:2", "base is chosen twice"]),
    ("unknown word", tree(config="defaults:\n  - maybe db: lite\n"), [], ["config.yaml:2", "'maybe db'"]),
    ("no entry", tree(config="defaults:\n  - {a: b, c: d}\n"), [], ["config.yaml:2", "no entry"]),
    ("number as an entry", tree(config="defaults:\n  - 3\n"), [], ["config.yaml:2", "no entry"]),
    ("no list", tree(config="defaults:\n  db: lite\n"), [], ["config.yaml:1", "must be a list"]),
    ("yes as an option", tree(config="defaults:\n  - db: off\n"), [], ["config.yaml:2", "quotes"]),
    ("a number as an option", tree(config="defaults:\n  - db: 1\n"), [], ["config.yaml:2", "quotes"]),
    ("no override", tree(), ["top"], ["'top' is no override"]),
    ("yaml style", tree(), ["top: 3"], ["is no override"]),
    ("no key", tree(), ["=3"], ["'' is no key"]),
    ("a number is no key", tree(), ["3=3"], ["'3' is no key"]),
    ("blank in the key", tree(), ["a b=3"], ["'a b' is no key"]),
    ("empty part of a key", tree(), ["a..b=3"], ["'a..b' is no key"]),
    ("+ on what is there", tree(), ["+top=3"], ["'+top=3'", "there already (1)"]),
    ("+ of a group that is there", tree(), ["+db=lite"], ["config.yaml:2", "+db=lite", "twice"]),
    ("~ of nothing", tree(), ["~db.user"], ["db.user is not in"]),
    ("~ of a group that is not there", tree(config="top: 1\n"), ["~db"], ["override '~db'", "db is not in"]),
    ("comment cut off", tree(), ["top=a #b"], ["only 'a'", "quotes"]),
    ("broken yaml", tree(), ["top=[1"], ["'top=[1'", "not valid YAML"]),
    ("open quote", tree(), ["top='abc"], ["not valid YAML"]),
    ("mapping without a blank", tree(), ["top={a:1}"], ["'a:1'", "blank after the colon"]),
    ("option that is a number", tree(), ["db=1.50"], ["'1.50'"]),
    ("list key", tree(config="l: [1]\n"), ["l.x=1"], ["l.x=1"]),
    ("key below an interpolation", tree(config="a: ${b}\n"), ["a.x=1"], ["a is '${b}'", "set a as a whole"]),
    ("way out of the folder", tree(), ["db=../base"], ["'../base'"]),
    ("way out by the group", tree(config="defaults:\n  - ..: base\n"), [], ["'..' is no name of a group"]),
    # Hydra's and YAML's own that are not supported
    ("??? as an option", tree(config="defaults:\n  - db: ???\n"), [], ["config.yaml:2", "db=OPTION", "or ~db"]),
    ("no option", tree(config="defaults:\n  - db: null\n"), [], ["config.yaml:2", "null chooses no option", "or ~db"]),
    ("no option, overridden", tree(), ["db=null"], ["override 'db=null'", "null chooses no option of db"]),
    ("??? as a value", tree(config="a: 1\nb: {c: '???'}\n"), [], ["config.yaml:2", "b.c: ???", "leave the key out"]),
    ("??? on the command line", tree(), ["db.port=???"], ["'db.port=???'", "db.port: ???", "leave the key out"]),
    ("list of options", tree(config="defaults:\n  - db: [lite]\n"), [], ["config.yaml:2", "choose one option of db"]),
    ("list of options overridden", tree(), ["db=[mysql,lite]"], ["override 'db=", "choose one option of db"]),
    ("defaults list in a group's file", tree(db__lite="\ndefaults: [mysql]\n"), ["db=lite"],
     ["lite.yaml:2: only the file that is run may have a defaults list", "override 'db=lite' names this file"]),
    ("defaults list in a plain file", tree(base="defaults: []\n", config="defaults: [base]\n"), [],
     ["base.yaml:1: only the file that is run", "config.yaml:1 names", "config show"]),
    ("a file within itself", tree(config="top: 1\ndefaults: [config]\n"), [], ["config.yaml:2: only the file"]),
    ("path of a file", tree(config="defaults:\n  - db/lite\n"), [], ["config.yaml:2", "'db/lite'", "- group: option"]),
    ("group within a group", tree(config="defaults:\n  - db/x: lite\n"), [], ["config.yaml:2", "'db/x'", "a path"]),
    ("group within a group overridden", tree(), ["db/x=1"], ["override 'db/x=1'", "groups within groups"]),
    ("group from the root", tree(config="defaults:\n  - /db: lite\n"), [], ["config.yaml:2", "'/db'", "a path"]),
    ("override entry", tree(config="defaults:\n  - override db: lite\n"), [], ["config.yaml:2", "'override' before"]),
    ("optional entry", tree(config="defaults:\n  - optional db: lite\n"), [], ["config.yaml:2", "'optional' before"]),
    ("optional file", tree(config="defaults:\n  - optional base\n"), [], ["config.yaml:2", "'optional' before"]),
    ("interpolated option", tree(config="defaults:\n  - db: ${x}\n"), [], ["config.yaml:2", "interpolation in"]),
    ("interpolated file", tree(config="defaults:\n  - ${x}\n"), [], ["config.yaml:2", "interpolation in"]),
    ("package", tree(config="defaults:\n  - db@a.b: lite\n"), [], ["config.yaml:2", "'db@a.b'", "the section 'db'"]),
    ("global package", tree(config="defaults:\n  - db@_global_: lite\n"), [], ["config.yaml:2", "packages (@)"]),
    ("package of a file", tree(config="defaults:\n  - base@x\n"), [], ["config.yaml:2", "packages (@)"]),
    ("package override", tree(), ["db@s=mysql"], ["override 'db@s=mysql'", "packages (@)"]),
    ("header", tree(db__lite="# @package _global_\nd: 1\n"), ["db=lite"], ["lite.yaml:1", "'# @package _global_'"]),
    ("header of the main file", tree(config="\n# @x\n#@package a b\n"), [], ["config.yaml:3", "'#@package a b'"]),
    ("hydra settings", tree(config="hydra: {run: 1}\n"), [], ["config.yaml:1", "Hydra itself"]),
    (
        "_target_ deep inside",
        tree(config="a:\n  - b:\n      _target_: os.system\n"),
        [],
        ["config.yaml:3", "a[0].b._target_"],
    ),
    ("_target_ override", tree(), ["+a._target_=x"], ["+a._target_=x", "_target_"]),
    ("_target_ in an override's value", tree(), ["+a={b: {_target_: x}}"], ["a.b._target_"]),
    ("hydra override", tree(), ["hydra.run.dir=x"], ["hydra.run.dir=x", "Hydra itself"]),
    ("hydra group", tree(), ["hydra/launcher=x"], ["Hydra itself"]),
    ("defaults override", tree(), ["defaults=[]"], ["group=option"]),
    ("~ with a value", tree(), ["~db.port=3306"], ["'~db.port=3306'", "write ~db.port"]),
    ("~ of a group with an option", tree(), ["~db=mysql"], ["'~db=mysql'", "write ~db"]),
    ("sweep", tree(), ["top=1,2"], ["sweep", "[1,2]"]),
    ("sweep of options", tree(), ["db=lite,mysql"], ["sweep"]),
    ("function", tree(), ["top=sort(1,3)"], ["sort() is not supported"]),
    ("cast", tree(), ["top=int(3.0)"], ["int() is not supported"]),
    ("item of a list", tree(config="l: [1]\n"), ["l[0]=1"], ["'l[0]=1'", "an item of a list", "set l as a whole"]),
    ("item of a list, dotted", tree(config="a: {l: [1]}\n"), ["a.l.0.x=1"], ["'a.l.0.x=1'", "set a.l as a whole"]),
    ("anchor", tree(config="a: 1\nb: &x 2\n"), [], ["config.yaml:2", "anchors and aliases", "'x'", "${key}"]),
    ("alias", tree(config="a: 1\nb: *x\n"), [], ["config.yaml:2", "anchors and aliases", "goes in quotes"]),
    ("merge key", tree(config="a: 1\nb:\n  <<: {c: 1}\n"), [], ["config.yaml:3", "merge keys (<<)", "write the keys"]),
    ("tag", tree(config="a: 1\nb: !!str 2\n"), [], ["config.yaml:2", "tag", "str", "goes in quotes"]),
    # interpolation
    ("unknown interpolation", tree(config="a: 1\nb:\n  c: ${nope}\n"), [], ["config.yaml:3: b.c: ", "no nope", "\\${"]),
    ("near interpolation", tree(config="top: 1\nb: ${.tpo}\n"), [], ["config.yaml:2: b", "no tpo; did you mean 'top'"]),
    ("broken interpolation", tree(config="a: 1\nb: 'x ${'\n"), [], ["config.yaml:2: b: ", "no closing }", "\\${"]),
    ("empty interpolation", tree(config="a: ${}\n"), [], ["config.yaml:1: a: '' is no key", "\\${"]),
    ("an interpolation in a ring", tree(config="a: ${b}\nb: ${a}\n"), [], ["config.yaml:1", "a -> b -> a"]),
    ("its own parent", tree(config="a: {b: '${a.b}'}\n"), [], ["config.yaml:1", "a.b -> a.b"]),
    ("above the root", tree(config="a: ${..b}\n"), [], ["config.yaml:1", "'..b' begins above the configuration"]),
    ("a mapping", tree(config="a: {b: 1}\nc: ${a}\n"), [], ["config.yaml:2: c: a is a mapping", "a single value"]),
    ("a list", tree(config="a: [1]\nc: x${a}\n"), [], ["config.yaml:2: c: a is a list", "a single value"]),
    ("an item", tree(config="a: [1]\nc: ${a[0]}\n"), [], ["config.yaml:2: c: ", "'a[0]'", "an item of a list"]),
    ("an item, dotted", tree(config="a: [1]\nc: ${a.0}\n"), [], ["config.yaml:2: c: a.0 is not there: a is"]),
    ("below an interpolation", tree(config="a: ${b}\nb: 1\nc: ${a.x}\n"), [], ["config.yaml:3", "tion '${b}'"]),
    ("one within another", tree(config="a: 1\nc: ${x.${a}}\n"), [], ["config.yaml:2", "within an interpolation"]),
    ("resolver of Hydra", tree(config="a: ${hydra:runtime.cwd}\n"), [], ["config.yaml:1", "resolver 'hydra'"]),
    ("time without a format", tree(config="a: ${now:}\n"), [], ["config.yaml:1", "${now:%Y-%m-%d}"]),
    ("oc.select", tree(config="a: ${oc.select:top,1}\n"), [], ["config.yaml:1", "resolver 'oc.select'", "${key}"]),
    ("oc.decode", tree(config="a: ${oc.decode:'1'}\n"), [], ["config.yaml:1", "resolver 'oc.decode'"]),
    ("default with a comma", tree(config="a: '${oc.env:NO_SUCH,x,y}'\n"), [], ["config.yaml:1", "goes in quotes"]),
    ("no variable", tree(), ["top=${oc.env:NO_SUCH_NAME}"],
     ["override 'top=", "no variable 'NO_SUCH_NAME'", "${oc.env:NO_SUCH_NAME,DEFAULT}"]),
]  # fmt: skip


@pytest.mark.parametrize(("files", "overrides", "words"), [pytest.param(*c[1:], id=c[0]) for c in REFUSED])
def test_refused_by_name(refusal: Refusal, files: dict[str, str], overrides: list[str], words: list[str]) -> None:
    message = refusal(files, *overrides)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
