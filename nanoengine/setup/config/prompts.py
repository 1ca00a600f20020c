"""The prompts of a run: in the configuration, in a file that it names (text, JSONL or CSV), or on standard input."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_type_hints

from nanoengine.api.errors import ConfigError, ParamsError, nearest, shown
from nanoengine.observe.files import decoded
from nanoengine.params.field_types import conform
from nanoengine.setup.config.composer.yaml_file import KeyPath, dotted

Message = Mapping[str, str]
Prompt = str | tuple[Message, ...]
"""A text, or a conversation: messages with `role` and `content`."""

STDIN = "-"
"""The file name of standard input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFile:
    """Prompts in a file.

    Attributes:
        file: its path, or "-" for standard input.
        field: the key (JSONL) or column (CSV) that holds the prompt; default: `prompt`, or `messages` in JSONL.
        format: "text" (one prompt a line), "jsonl" (one object a line) or "csv" (with a header); default: by the
            file's name (.txt, .csv, else JSONL), and text for standard input.
        carry: the other keys or columns that go into the rows of the results; default: all of them.
    """

    file: str
    field: str | None = None
    format: Literal["text", "jsonl", "csv"] | None = None
    carry: list[str] | None = None


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt. `fields`: what else its row in the file holds; of CSV all are texts."""

    prompt: Prompt
    fields: Mapping[str, Any] = field(default_factory=dict)


Prompts = tuple[Prompt, ...] | PromptFile
_MESSAGE_KEYS = ("role", "content")
_FORMATS = {".txt": "text", ".jsonl": "jsonl", ".csv": "csv"}
_A_PROMPT = {
    "text": "a line that is not blank",
    "jsonl": "a line with an object that has 'prompt' or 'messages'",
    "csv": "a row below the header",
}
_MARK = re.compile("(?:^|[\n\r])\ufeff")
_DEEPEST = 64  # nested lists and objects of a row: what reads results may recurse
_HINT = "; in YAML, a text with ': ' or ' #' in it, or one that looks like a number, goes in quotes"


def check_prompts(value: Any, origin: Callable[[KeyPath], str]) -> Prompts | None:
    """The `prompts` section. `origin(path)` is where a key below it was given. Raises `ConfigError`."""
    if value is None:
        return None
    if isinstance(value, str) and (value == STDIN or Path(value).suffix.lower() in _FORMATS):
        return PromptFile(file=value)
    if isinstance(value, Mapping):
        return _prompt_file(value, origin)
    if isinstance(value, str) and value.lower().endswith(".json"):
        raise ConfigError(
            f"{origin(())}: prompts: {value}: a list in JSON is not read, but one object a line is: name it .jsonl"
        )
    if not isinstance(value, list):
        raise ConfigError(
            f"{origin(())}: prompts must be a list, a file ({', '.join(_FORMATS)}), '-' for standard input, or "
            f"{{file: prompts.jsonl, field: prompt}}, not {shown(value)}"
        )
    return tuple(_prompt(item, f"{origin((i,))}: prompts[{i}]", _HINT) for i, item in enumerate(value))


def read_prompts(prompts: Prompts | None, taken: Collection[str] = ()) -> list[PromptRow]:
    """All prompts; reads the file, if they are in one. Raises `ConfigError` naming file and line; a file has some.

    `taken`: names of fields that a row may not bring, since the results have keys of these names.
    """
    if not isinstance(prompts, PromptFile):
        return [PromptRow(prompt) for prompt in prompts or ()]
    name, text = _text(prompts.file)
    found = _rows(text, name, prompts, taken) if text.strip() else []
    if not found:
        raise ConfigError(_nothing_in(text, name, prompts))
    return found


def _nothing_in(text: str, name: str, prompts: PromptFile) -> str:
    """The message for a file without prompts: what was found, how it was read, and what to do."""
    kind = file_format(prompts)
    what = "only a header" if text.strip() else "only blank lines" if text else "nothing"
    others = " or ".join(each for each in _A_PROMPT if each != kind)
    fix = "pipe some in" if prompts.file == STDIN else "write some into it, or name another file"
    return (
        f"{name}: no prompts: it holds {what}. It is read as {kind}, where a prompt is {_A_PROMPT[kind]}: {fix} "
        f"('prompts: {{file: {json.dumps(prompts.file)}, format: ...}}' reads it as {others})"
    )


def _rows(text: str, name: str, prompts: PromptFile, taken: Collection[str]) -> list[PromptRow]:
    kind = file_format(prompts)
    if kind == "csv":
        return [_carrying(prompts, taken, *row) for row in _csv_rows(text, name, prompts.field or "prompt")]
    # Not splitlines(): a text, and JSON too, may hold U+2028 and its like.
    lines = [(f"{name}:{n}", line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if kind == "text":
        for what, given in (("field", prompts.field), ("carry", prompts.carry)):
            if given is not None:
                raise ConfigError(f"{name}: prompts.{what} is {shown(given)}, but a text file has no fields")
        return [PromptRow(line) for _, line in lines]
    return [_carrying(prompts, taken, *_json_row(line, where, prompts.field)) for where, line in lines]


def _carrying(
    prompts: PromptFile, taken: Collection[str], where: str, prompt: Prompt, others: Mapping[str, Any]
) -> PromptRow:
    """The row with those of its other fields that go into the results."""
    carry = others if prompts.carry is None else prompts.carry
    for key in carry:
        if key not in others:
            raise ConfigError(f"{where}: no key {shown(key)}, which prompts.carry names; {nearest(key, others)}")
        if key in taken:
            ids = "; a prompt of a file is text or messages, not token ids" if key == "prompt_token_ids" else ""
            raise ConfigError(
                f"{where}: {key!r} is a key of the results, which a field of that name would replace{ids}. Rename "
                "it, or name the fields to carry into the results ([] for none): 'prompts: {file: ..., carry: [id]}'"
            )
    return PromptRow(prompt, {key: others[key] for key in carry})


def file_format(prompts: PromptFile) -> Literal["text", "jsonl", "csv"]:
    """The format that the file is read in."""
    if prompts.format is not None:
        return prompts.format
    if prompts.file == STDIN:
        return "text"
    suffix = Path(prompts.file).suffix.lower()
    return "text" if suffix == ".txt" else "csv" if suffix == ".csv" else "jsonl"


def _text(file: str) -> tuple[str, str]:
    """(name for messages, content) of a file, or of standard input."""
    try:
        path = Path(file).expanduser()
        name = "standard input" if file == STDIN else str(path)
        data = sys.stdin.buffer.read() if file == STDIN else path.read_bytes()
    except FileNotFoundError as error:
        whence = "" if path.is_absolute() else f" ({path} is looked up from {Path.cwd()}, where the command runs)"
        raise ConfigError(f"cannot read the prompts: no such file: {path.absolute()}{whence}") from error
    except (OSError, ValueError, RuntimeError) as error:  # also a NUL in the name, a home folder that does not exist
        why = (error.strerror if isinstance(error, OSError) else None) or error
        where = "standard input" if file == STDIN else os.path.abspath(file)[:200]
        raise ConfigError(f"cannot read the prompts of {where}: {why}") from error
    return name, _decoded(data, name if file == STDIN else str(path.absolute()))


def _decoded(data: bytes, name: str) -> str:
    text = decoded(data, f"the prompts of {name}")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError(f"{name}:{line}: the line holds a NUL byte, so this is no text; save it as UTF-8 text")
    if found := _MARK.search(text):
        line = text.count("\n", 0, found.end()) + 1
        raise ConfigError(
            f"{name}:{line}: the line begins with a byte order mark (U+FEFF), which begins a file; were two files "
            "joined? Delete the mark, and a header that is there again"
        )
    return text


def _csv_rows(text: str, name: str, field: str) -> Iterator[tuple[str, Prompt, Mapping[str, Any]]]:
    """(where, prompt, other fields) of each row."""
    limit = csv.field_size_limit(sys.maxsize)  # the default, 128 KiB a field, is less than some prompts
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    line = 1
    try:
        columns = next((row for row in reader if row), [])
        where, line = f"{name}:{max(1, reader.line_num)}", reader.line_num + 1
        if field not in columns:
            separator = next((each for each in ";\t|" if len(columns) == 1 and each in columns[0]), "")
            fix = f"separate the columns by commas, not by {separator!r}" if separator else _meant(name, field, columns)
            raise ConfigError(f"{where}: no column {field!r}; {fix}")
        if (twice := _twice(columns)) is not None:
            raise ConfigError(f"{where}: two columns are called {shown(twice)}; rename one of them")
        for row in reader:
            where, line = f"{name}:{line}", reader.line_num + 1
            if _names(row) == _names(columns):
                raise ConfigError(f"{where}: the row is the header again; were two files joined? Delete the line")
            if row and len(row) != len(columns):
                raise ConfigError(f"{where}: the row has {len(row)} columns, the header has {len(columns)} columns")
            if row:  # the csv module gives none for a blank line
                others = dict(zip(columns, row, strict=True))
                yield where, _prompt(others.pop(field), where, ""), others
    except csv.Error as error:
        raise ConfigError(f"{name}: not CSV, in the row from line {line}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _names(row: Sequence[str]) -> list[str]:
    """The names of a header, without what makes no difference: case and blanks."""
    return [name.strip().casefold() for name in row]


def _json_row(line: str, where: str, field: str | None) -> tuple[str, Prompt, Mapping[str, Any]]:
    """(where, prompt, other fields)."""
    row = _json(line, where)
    key = field or "prompt"
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: each line must be an object such as {{{json.dumps(key)}: ...}}")
    if field is None and "messages" in row:
        if "prompt" in row:
            raise ConfigError(f"{where}: the row has both 'prompt' and 'messages'; say which with prompts.field")
        key = "messages"
    if key not in row:
        which = "which prompts.field names" if field else "nor 'messages'"
        raise ConfigError(f"{where}: no key {key!r}, {which}; {_meant(where.rpartition(':')[0], key, row)}")
    prompt = _prompt(row.pop(key), f"{where}: {key}", "")
    _unicode(json.dumps(row, ensure_ascii=False), where)  # each text and key of the other fields
    return where, prompt, row


def _meant(file: str, key: str, names: Iterable[str]) -> str:
    """The end of the message about a file without the key: the names that there are, and how to take another one."""
    found = list(names)
    other = f"; to take another one: 'prompts={{file: {file}, field: {found[0]}}}'" if found else ""
    return nearest(key, found) + other


def _json(line: str, where: str) -> Any:
    """One value that JSON can hold again: what is read is written into the results."""
    try:
        value = json.loads(line, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite)
        if _depth(value) > _DEEPEST:
            raise RecursionError
        return value
    except RecursionError as error:
        raise ConfigError(f"{where}: the JSON is nested more than {_DEEPEST} deep") from error
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := _twice(key for key, _ in pairs)) is not None:
        raise ValueError(f"the key {shown(twice)} is there twice")
    return dict(pairs)


def _twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _depth(value: Any) -> int:
    """How deep lists and objects are nested, without recursion."""
    depth, level = 0, [value]
    while level := [item for each in level if isinstance(each, dict | list) for item in _items(each)]:
        depth += 1
    return depth


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _prompt_file(value: Mapping[str, Any], origin: Callable[[KeyPath], str]) -> PromptFile:
    names, types = [f.name for f in fields(PromptFile)], get_type_hints(PromptFile)
    for key, item in value.items():
        if key not in names:
            raise ConfigError(f"{origin((key,))}: unknown key {dotted(('prompts', key))!r}; {nearest(str(key), names)}")
        try:
            conform(f"prompts.{key}", item, types[key])
        except ParamsError as error:
            raise ConfigError(f"{origin((key,))}: {error}") from error
    if not value.get("file"):
        raise ConfigError(f"{origin(())}: prompts.file must be given: a path, or '-' for standard input")
    return PromptFile(**value)


def _prompt(value: Any, where: str, hint: str) -> Prompt:
    if isinstance(value, str):
        return _unicode(value, where)
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return tuple(_message(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, Mapping) and set(value) <= set(_MESSAGE_KEYS):
        raise ConfigError(
            f"{where}: a conversation is a list of messages, even of one: write [{{role: ..., content: ...}}]"
        )
    raise ConfigError(f"{where} must be text, or a list of chat messages (role, content), not {shown(value)}{hint}")


def _message(value: Mapping[Any, Any], where: str) -> Message:
    for key in value:
        if key not in _MESSAGE_KEYS:
            raise ConfigError(
                f"{where}: unknown key {shown(key)} of a chat message; {nearest(str(key), _MESSAGE_KEYS)}"
            )
    for key in _MESSAGE_KEYS:
        if not isinstance(value.get(key), str):
            raise ConfigError(f"{where}: a chat message needs {key!r}, a text; it has {shown(value.get(key))}")
        _unicode(value[key], f"{where}: {key}")
    return dict(value)


def _unicode(text: str, where: str) -> str:
    """Raises `ConfigError` for half a surrogate pair: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ConfigError(
            f"{where}: {half} is half of a surrogate pair and no character; remove or replace it"
        ) from error
    return text
