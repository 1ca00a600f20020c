"""Prompts files: rows of every format, broken as files are broken by exports, editors and attackers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanoengine.setup.config.prompts import PromptFile, read_prompts

Case = tuple[str, bytes, dict[str, Any]]
"""The file's name, what it holds, and the other fields of `PromptFile`."""

_TEXTS = (
    "a question",
    "",
    " ",
    "é\u2028日",
    'it\'s, "so"',
    "a\nb",
    "a\r\nb",
    "\0",
    "\ufeff",
    "x" * 70_000,
    "${a}",
    "-",
    "NaN",
)
_ROWS: tuple[Any, ...] = (
    {"prompt": "a", "id": 7}, {"messages": [{"role": "user", "content": "a"}], "id": "x"}, {"prompt": [1, 2]}, "a", 3,
    {"prompt": "a", "prompt_token_ids": [1]}, {"prompt": {"a": 1}}, {"prompt": "\ud83d"}, {"messages": []},
    {"prompt": "a", "x": {"y": []}}, {"messages": [{"role": 3}]}, {"q": "a"}, {"prompt": "a", "index": 1},
)  # fmt: skip
_SCRAPS = (
    b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\n\n", b"\r", b'"', b",", b"{", b"}", b"[" * 2000, b'{"a":' * 900, b"1e999",
    b"NaN", b"9" * 5000, b"\\ud800", b'"prompt"', b"id,prompt\n", b"\xc3", b"\xed\xa0\x80", b"-Infinity", b"\t", b"'",
)  # fmt: skip
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "field": (None, None, "prompt", "q", "messages", "id", ""),
    "format": (None, None, "text", "jsonl", "csv"),
    "carry": (None, None, [], ["id"], ["nope"], ["index"]),
}


def mutants(rng: random.Random) -> Iterator[Case]:
    while True:
        kind = rng.choice(("jsonl", "csv", "txt"))
        name = rng.choice((f"p.{kind}", f"P.{kind.upper()}", "p", "p.json"))
        data = b"".join(_row(rng, kind) for _ in range(rng.randrange(6)))
        if kind == "csv":
            data = rng.choice((b"id,prompt\n", b"prompt\n", b"prompt,prompt\n", b"", b"id;prompt\n")) + data
        for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
            data = _broken(rng, data)
        options = {key: rng.choice(values) for key, values in _OPTIONS.items()}
        yield name, data, {key: value for key, value in options.items() if value is not None}


def _row(rng: random.Random, kind: str) -> bytes:
    end = rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r", b""))
    text = rng.choice(_TEXTS)
    if kind == "jsonl":
        row = rng.choice(_ROWS) if rng.random() < 0.7 else {"prompt": text, "id": rng.randrange(9)}
        return json.dumps(row).encode() + end
    if kind == "csv":
        quoted = '"' + text.replace('"', '""') + '"'
        return ",".join([quoted] * rng.choice((1, 2, 2, 2, 3))).encode() + end
    return text.encode() + end


def _broken(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.randrange(20))
    scrap = rng.choice(_SCRAPS) if rng.random() < 0.7 else bytes([rng.randrange(256)])
    return rng.choice((data[:at] + scrap + data[at:], data[:at] + data[end:], data[:at], data + data[at:end], data * 2))


def run(case: Case) -> None:
    name, data, options = case
    Path(name).write_bytes(data)
    rows = read_prompts(PromptFile(file=name, **options), taken=("index", "prompt", "prompt_token_ids"))
    assert rows
    for row in rows:  # it is written into the results as it is
        written = json.dumps({**row.fields, "prompt": row.prompt}, allow_nan=False, ensure_ascii=False)
        assert json.loads(written.encode("utf-8", "backslashreplace"))["prompt"] == json.loads(json.dumps(row.prompt))
