"""The values of `${...}`: the expected values were checked against omegaconf 2.4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Composer = Callable[..., dict[str, Any]]

TREE = "num: 7\nrate: 0.5\nyes: true\nnone: null\nname: ab\nsection:\n  inner: in\n  deep: {x: dx}\n"
TREE += "  list: ['@']\nx: '@'\n"


@pytest.fixture
def resolve(composed: Composer, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Any, Any]]:
    """The value of a text at the root, and of the same text in a list of `section`."""
    for name, value in {"A": "va", "EMPTY": "", "ODD": "${name} \\${x} 'q'", "NUMBER": "3"}.items():
        monkeypatch.setenv(f"NANO_{name}", value)

    def run(text: str) -> tuple[Any, Any]:
        text = text.replace("ENV_", "oc.env:NANO_").replace("'", "''")
        found = composed({"config.yaml": TREE.replace("@", text).replace("yes:", "'yes':")})
        return found["x"], found["section"]["list"][0]

    return run


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # a text that is one interpolation keeps the value's type
        ("${num}", 7), ("${rate}", 0.5), ("${yes}", True), ("${none}", None), ("${name}", "ab"), ("${ name }", "ab"),
        ("${section.inner}", "in"), ("${section.deep.x}", "dx"),
        # in a longer text it is written out
        ("a${num}b", "a7b"), ("${num}${name}", "7ab"), ("${rate} ${yes} ${none}", "0.5 True None"), (" ${num}", " 7"),
        ("$${name}", "$ab"), ("{${name}}", "{ab}"), ("$", "$"), ("a $x {y}", "a $x {y}"),
        # a backslash makes it a text; where two precede it, one is left
        (r"\${name}", "${name}"), (r"\\${name}", r"\ab"), (r"\\\${name}", r"\${name}"), (r"\\\\${name}", r"\\ab"),
        (r"a\b ${name}", r"a\b ab"), (r"\${", "${"), (r"\${name} ${name}", "${name} ab"), (r"${name}\${", "ab${"),
        # the environment: always a text
        ("${ENV_A}", "va"), ("${ENV_A}/x", "va/x"), ("${ENV_EMPTY}", ""), ("${ENV_NUMBER}", "3"), ("${ENV_A,d}", "va"),
        ("${ENV_ODD}", "${name} \\${x} 'q'"), ("${ENV_NONE,d}", "d"), ("${ENV_NONE, d e }", "d e"),
        ("${ENV_NONE,null}", None), ("${ENV_NONE,'a, b'}", "a, b"), ('${ENV_NONE,"a, b"}', "a, b"),
        ("${ENV_NONE,3}", "3"), ("${ENV_NONE,}", ""), ("${oc.env: NANO_A}", "va"),
        ("${ENV_NONE,'null'}", "null"), ("${ENV_NONE,/a/b-c.txt}", "/a/b-c.txt"),
    ],
)  # fmt: skip
def test_values(resolve: Callable[[str], tuple[Any, Any]], text: str, value: Any) -> None:
    for found in resolve(text):
        assert found == value
        assert type(found) is type(value)


def test_dots_count_from_the_container_of_the_text(composed: Composer) -> None:
    text = "a: 1\nb: {a: 2, c: {a: 3, d: '${.a} ${..a} ${...a}', e: ['${..a}']}}\nf: ${.a}\n"
    found = composed({"config.yaml": text})
    assert found["b"]["c"]["d"] == "3 2 1"
    assert found["b"]["c"]["e"] == [3]
    assert found["f"] == 1


def test_references_follow_each_other_and_see_later_files_and_overrides(composed: Composer) -> None:
    files = {"config.yaml": "defaults: [_self_, base]\na: ${b}\nb: ${c}x\nc: 1\n", "base.yaml": "c: 2\n"}
    assert composed(files) == {"a": "2x", "b": "2x", "c": 2}
    assert composed(files, "c=3", "b=${c}${c}") == {"a": "33", "b": "33", "c": 3}


def test_an_interpolation_that_is_replaced_or_deleted_is_not_looked_up(composed: Composer) -> None:
    assert composed({"config.yaml": "a: ${nope}\nb: ${oc.env:NO_SUCH_NAME}\n"}, "a=1", "~b") == {"a": 1}
