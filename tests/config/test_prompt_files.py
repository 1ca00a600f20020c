"""Prompts in JSONL files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanoengine.core.errors import ConfigError
from nanoengine.core.setup.prompts import PromptFile, read_prompts


def test_rows_in_order(tmp_path: Path) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    rows = ["plain", "line\u2028separator", "${not} interpolated", conversation]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"q": row, "more": 1}, ensure_ascii=False) for row in rows) + "\n\n", "utf-8")
    found = read_prompts(PromptFile(file=str(path), field="q"))
    assert found == [*rows[:3], tuple(conversation)]


def test_crlf_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert read_prompts(PromptFile(file=str(path))) == ["a", "b"]


def test_prompts_of_the_configuration_are_taken_as_they_are() -> None:
    assert read_prompts(("a", "b")) == ["a", "b"]
    assert read_prompts(None) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "x"', ["p.jsonl:2", "not JSON"]),
        ('"x"', ["p.jsonl:2", "must be an object"]),
        ('{"promt": "x"}', ["p.jsonl:2", "no key 'prompt'", "did you mean 'promt'?"]),
        ('{"prompt": 3}', ["p.jsonl:2", "prompt must be text"]),
        ('{"prompt": null}', ["p.jsonl:2", "prompt must be text"]),
        ('{"prompt": []}', ["p.jsonl:2", "prompt must be text"]),
        ('{"prompt": [{"role": "user"}]}', ["p.jsonl:2", "needs 'content'"]),
        ('{"prompt": [{"role": "user", "content": "a", "tool": 1}]}', ["p.jsonl:2", "unknown key 'tool'"]),
    ],
)
def test_bad_row_names_file_and_line(tmp_path: Path, line: str, words: list[str]) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError) as caught:
        read_prompts(PromptFile(file=str(path)))
    assert [word for word in words if word not in str(caught.value)] == []


def test_missing_file_names_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=str(tmp_path / "nope.jsonl")):
        read_prompts(PromptFile(file="nope.jsonl"))
