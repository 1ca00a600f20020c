"""Prompts in text, JSONL and CSV files, and on standard input."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from nanoengine.api.errors import ConfigError
from nanoengine.setup.config.prompts import Prompt, PromptFile, PromptRow, check_prompts
from nanoengine.setup.config.prompts import read_prompts as read_rows


def read_prompts(prompts: Any) -> list[Prompt]:
    return [row.prompt for row in read_rows(prompts)]


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
        ('{"promt": "x"}', ["p.jsonl:2", "no key 'prompt', nor 'messages'", "did you mean 'promt'?"]),
        ('{"prompt": "x", "messages": []}', ["p.jsonl:2", "both 'prompt' and 'messages'", "prompts.field"]),
        ('{"messages": [{"role": "user", "contents": "a"}]}', ["p.jsonl:2", "messages[0]", "'contents'"]),
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


MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
FILES: list[tuple[str, str, dict[str, Any], list[Any]]] = [
    ("p.txt", "one\n\n  two, 'x'  \r\nthree\u2028four", {}, ["one", "  two, 'x'  ", "three\u2028four"]),
    ("p.jsonl", json.dumps({"messages": MESSAGES}) + '\n{"prompt": "b"}\n', {}, [tuple(MESSAGES), "b"]),
    ("p.jsonl", '{"prompt": "a", "messages": 3}\n', {"field": "prompt"}, ["a"]),
    ("p.csv", 'id,prompt\n1,"a, ""b""\nc"\n\n2,\n3,d\n', {}, ['a, "b"\nc', "", "d"]),
    ("p.csv", "q;x,prompt\na,b\n", {"field": "q;x"}, ["a"]),
    ("P.CSV", "prompt\n" + "x" * 200_000 + "\n", {}, ["x" * 200_000]),
    ("p.list", "a\n", {"format": "text"}, ["a"]),
    ("p.list", '{"prompt": "a"}\n', {}, ["a"]),
]


@pytest.mark.parametrize(("name", "text", "options", "expected"), FILES)
def test_formats(tmp_path: Path, name: str, text: str, options: dict[str, Any], expected: list[Any]) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    limit = csv.field_size_limit()
    assert read_prompts(PromptFile(file=str(path), **options)) == expected
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "text", "options", "words"),
    [
        ("p.csv", "id,promt\n1,a\n", {}, ["p.csv:1", "no column 'prompt'", "did you mean 'promt'?"]),
        ("p.csv", "", {}, ["p.csv: no prompts: it holds nothing", "read as csv", "a row below the header"]),
        ("p.csv", "prompt\n", {}, ["p.csv: no prompts: it holds only a header"]),
        ("p.txt", "", {}, ["p.txt: no prompts: it holds nothing", "read as text", "a line that is not blank"]),
        ("p.txt", " \n\n", {}, ["it holds only blank lines", "as jsonl or csv", "write some into it, or name another"]),
        ("p.jsonl", "\n", {}, ["it holds only blank lines", "read as jsonl", "'prompt' or 'messages'"]),
        ("p.csv", 'id,prompt\n1,"a\nb"\n2\n', {}, ["p.csv:4", "2 columns"]),
        ("p.csv", "id,prompt\n1,a,b\n", {}, ["p.csv:2", "2 columns"]),
        ("p.csv", 'prompt\n"a\n', {}, ["p.csv: not CSV", "from line 2"]),
        ("p.txt", "a\n", {"field": "q"}, ["p.txt", "prompts.field is 'q'", "no fields"]),
        ("p.txt", "a\n\udcff", {}, ["cannot read the prompts of", "p.txt: line 2 is not UTF-8"]),
        ("p.txt", "\udcff\udcfea\0", {}, ["line 1 is not UTF-8", "it is UTF-16; save it as UTF-8"]),
        ("p.txt", "a\nb\0c\n", {}, ["p.txt:2", "NUL byte"]),
        ("p.csv", "prompt\na\n\0\n", {}, ["p.csv:3", "NUL byte"]),
        ("p.csv", "id,prompt,id\n1,a,2\n", {}, ["p.csv:1: two columns are called 'id'"]),
        ("p.csv", "\n\nid\n1\n", {}, ["p.csv:3: no column 'prompt'"]),
        ("p.csv", "id,prompt\n1,a\nid,prompt\n2,b\n", {}, ["p.csv:3: the row is the header again"]),
        ("p.csv", "id,prompt\n1,a\n ID, Prompt\n2,b\n", {}, ["p.csv:3: the row is the header again"]),
        ("p.csv", "id,prompt\n1,a\n\ufeffid,prompt\n2,b\n", {}, ["p.csv:3: the line begins with a byte order mark"]),
        ("p.txt", "a\r\n\ufeffb\n", {}, ["p.txt:2: the line begins with a byte order mark", "were two files joined?"]),
        ("p.txt", "\ufeff\ufeffb\n", {}, ["p.txt:1: the line begins with a byte order mark"]),
        ("p.jsonl", '{"prompt": "a"}\n\ufeff{"prompt": "b"}\n', {}, ["p.jsonl:2: the line begins with a byte order"]),
        ("p.csv", "id,prompt\n1\n", {}, ["p.csv:2: the row has 1 columns, the header has 2"]),
        ("p.csv", "id,prompt\n1,a\n", {"carry": ["name"]}, ["p.csv:2: no key 'name', which prompts.carry names"]),
        ("p.csv", "index,prompt\n1,a\n", {}, ["p.csv:2: 'index' is a key of the results", "carry: [id]"]),
        ("p.txt", "a\n", {"carry": ["id"]}, ["prompts.carry is ['id'], but a text file has no fields"]),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, options: dict[str, Any], words: list[str]) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        read_rows(PromptFile(file=str(tmp_path / name), **options), taken=TAKEN)
    assert [word for word in words if word not in str(caught.value)] == []


TAKEN = ("index", "prompt_token_ids", "prompt")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": ' + "[" * 100_000, "nested more than 64 deep"),
        ('{"prompt": "a", "x": ' + "[" * 65 + "]" * 65 + "}", "nested more than 64 deep"),
        ('{"prompt": "a", "x": NaN}', "NaN is no JSON number"),
        ('{"prompt": "a", "x": -Infinity}', "-Infinity is no JSON number"),
        ('{"prompt": "a", "x": 1e999}', "the number 1e999 is too large"),
        ('{"prompt": "a", "x": ' + "9" * 5000 + "}", "not JSON"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
        ('{"prompt": "a", "x": {"y": 1, "y": 2}}', "the key 'y' is there twice"),
        ('{"prompt": "half \\ud83d pair"}', "\\ud83d is half of a surrogate pair"),
        ('{"prompt": "a", "id": "\\ud800"}', "\\ud800 is half of a surrogate pair"),
        ('{"prompt": "a", "x": {"y": ["\\udfff"]}}', "\\udfff is half of a surrogate pair"),
        ('{"prompt": "a", "x": [{"\\udfff": 1}]}', "\\udfff is half of a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "messages[0]: content: \\udc00 is half"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "'prompt_token_ids' is a key of the results"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "text or messages, not token ids"),
        ('{"prompt": [1, 2]}', "prompt must be text, or a list of chat messages"),
        ('{"prompt": ["a", {"role": "user"}]}', "prompt must be text, or a list of chat messages"),
        ('{"prompt": ' + json.dumps(["x" * 1000] * 1000) + "}", "prompt must be text"),
        ('\ufeff{"prompt": "a"}', "the line begins with a byte order mark"),
        ('{"prompt": "a\tb"}', "not JSON: Invalid control character"),
    ],
)
def test_a_row_that_cannot_be_names_file_and_line(tmp_path: Path, row: str, words: str) -> None:
    path = tmp_path / "P.JSONL"
    path.write_text('{"prompt": "fine"}\n\n' + row + "\n", "utf-8")
    with pytest.raises(ConfigError) as caught:
        read_rows(PromptFile(file=str(path)), taken=TAKEN)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 6000


def test_other_fields_come_with_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "id": 12345678901234567890, "tags": {"x": [null, 1.5]}}\n{"prompt": "b"}\n')
    expected = [PromptRow("a", {"id": 12345678901234567890, "tags": {"x": [None, 1.5]}}), PromptRow("b")]
    assert read_rows(PromptFile(file=str(path)), taken=TAKEN) == expected
    assert read_rows(PromptFile(file=str(path), carry=[])) == [PromptRow("a"), PromptRow("b")]
    (tmp_path / "p.csv").write_text("id,prompt,index\n07,a,1\n")
    assert read_rows(PromptFile(file=str(tmp_path / "p.csv"), carry=["id"]), taken=TAKEN) == [
        PromptRow("a", {"id": "07"})
    ]


@pytest.mark.parametrize("name", ["p.JSONL", "P.Csv", "p.TXT"])
def test_an_ending_may_be_in_capitals(name: str) -> None:
    assert check_prompts(name, lambda _: "here") == PromptFile(file=name)


@pytest.mark.parametrize(
    ("options", "data", "expected"),
    [
        ({}, b"a\nb\n", ["a", "b"]),
        ({"format": "csv"}, b"prompt\na\n", ["a"]),
        ({"format": "jsonl"}, b'{"prompt": "a"}\n', ["a"]),
    ],
)
def test_standard_input(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], data: bytes, expected: list[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_prompts(PromptFile(file="-", **options)) == expected


def test_standard_input_without_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ConfigError, match=r"standard input: no prompts: it holds nothing.*pipe some in"):
        read_prompts(PromptFile(file="-"))


def test_standard_input_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(ConfigError, match="cannot read the prompts of standard input"):
        read_prompts(PromptFile(file="-"))


def test_a_missing_file_is_reported_with_the_folder_it_was_looked_up_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_prompts(PromptFile(file="q.txt"))
    whence = f"(q.txt is looked up from {tmp_path}, where the command runs)"
    assert str(caught.value) == f"cannot read the prompts: no such file: {tmp_path}/q.txt {whence}"
    with pytest.raises(ConfigError, match=rf"{tmp_path}: Is a directory$"):
        read_prompts(PromptFile(file=str(tmp_path)))
