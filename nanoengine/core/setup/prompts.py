"""The prompts of a run: in the configuration, in a file that it names (text, JSONL or CSV), or on standard input."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_type_hints

from nanoengine.core.errors import ConfigError, ParamsError, nearest
from nanoengine.core.field_types import conform
from nanoengine.core.setup.composer.yaml_file import KeyPath, dotted

Message = Mapping[str, str]
Prompt = str | tuple[Message, ...]
"""A text, or a conversation: messages with `role` and `content`."""

STDIN = "-"
"""The name that stands for standard input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFile:
    """Prompts in a file.

    Attributes:
        file: its path, or "-" for standard input.
        field: the key (JSONL) or column (CSV) that holds the prompt; default: `prompt`, or `messages` in JSONL.
        format: "text" (one prompt a line), "jsonl" (one object a line) or "csv" (with a header); default: by the
            file's name (.txt, .csv, else JSONL), and text for standard input.
    """

    file: str
    field: str | None = None
    format: Literal["text", "jsonl", "csv"] | None = None


Prompts = tuple[Prompt, ...] | PromptFile
_MESSAGE_KEYS = ("role", "content")
_FORMATS = {".txt": "text", ".jsonl": "jsonl", ".csv": "csv"}
_A_PROMPT = {
    "text": "a line that is not blank",
    "jsonl": "a line with an object that has 'prompt' or 'messages'",
    "csv": "a row below the header",
}
_HINT = "; in YAML, a text with ': ' or ' #' in it, or one that looks like a number, goes in quotes"


def check_prompts(value: Any, origin: Callable[[KeyPath], str]) -> Prompts | None:
    """The `prompts` section. `origin` tells who gave a key below it. Raises `ConfigError`."""
    if value is None:
        return None
    if isinstance(value, str) and (value == STDIN or Path(value).suffix in _FORMATS):
        return PromptFile(file=value)
    if isinstance(value, Mapping):
        return _prompt_file(value, origin)
    if not isinstance(value, list):
        raise ConfigError(
            f"{origin(())}: prompts must be a list, a file ({', '.join(_FORMATS)}), '-' for standard input, or "
            f"{{file: prompts.jsonl, field: prompt}}, not {value!r}"
        )
    return tuple(_prompt(item, f"{origin((i,))}: prompts[{i}]", _HINT) for i, item in enumerate(value))


def read_prompts(prompts: Prompts | None) -> list[Prompt]:
    """All prompts; reads the file, if they stand in one. Raises `ConfigError` naming file and line; a file has some."""
    if not isinstance(prompts, PromptFile):
        return list(prompts or ())
    name, text = _text(prompts.file)
    found = _rows(text, name, prompts) if text.strip() else []
    if not found:
        raise ConfigError(_nothing_in(text, name, prompts))
    return found


def _nothing_in(text: str, name: str, prompts: PromptFile) -> str:
    """What was found, how it was read, and what to do."""
    kind = file_format(prompts)
    what = "only a header" if text.strip() else "only blank lines" if text else "nothing"
    others = " or ".join(each for each in _A_PROMPT if each != kind)
    mend = "pipe some in" if prompts.file == STDIN else "write some into it, or name another file"
    return (
        f"{name}: no prompts: it holds {what}. It is read as {kind}, where a prompt is {_A_PROMPT[kind]}: {mend} "
        f"('prompts: {{file: {json.dumps(prompts.file)}, format: ...}}' reads it as {others})"
    )


def _rows(text: str, name: str, prompts: PromptFile) -> list[Prompt]:
    kind = file_format(prompts)
    if kind == "csv":
        return list(_csv_rows(text, name, prompts.field or "prompt"))
    # Not splitlines(): a text, and JSON too, may hold U+2028 and its like.
    lines = [(f"{name}:{n}", line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if kind == "text":
        if prompts.field is not None:
            raise ConfigError(f"{name}: prompts.field is {prompts.field!r}, but a text file has no fields")
        return [line for _, line in lines]
    return [_row(line, where, prompts.field) for where, line in lines]


def file_format(prompts: PromptFile) -> Literal["text", "jsonl", "csv"]:
    """How the file is read."""
    if prompts.format is not None:
        return prompts.format
    if prompts.file == STDIN:
        return "text"
    suffix = Path(prompts.file).suffix.lower()
    return "text" if suffix == ".txt" else "csv" if suffix == ".csv" else "jsonl"


def _text(file: str) -> tuple[str, str]:
    """What messages call the file, and what it holds."""
    path = Path(file).expanduser()
    name = "standard input" if file == STDIN else str(path)
    try:
        data = sys.stdin.buffer.read() if file == STDIN else path.read_bytes()
        return name, data.decode("utf-8-sig")
    except FileNotFoundError as error:
        whence = "" if path.is_absolute() else f" ({path} is looked up from {Path.cwd()}, where the command runs)"
        raise ConfigError(f"cannot read the prompts: no such file: {path.absolute()}{whence}") from error
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        where = name if file == STDIN else path.absolute()
        raise ConfigError(f"cannot read the prompts of {where}: {why}") from error


def _csv_rows(text: str, name: str, field: str) -> Iterator[Prompt]:
    limit = csv.field_size_limit(sys.maxsize)  # the default, 128 KiB a field, is less than some prompts
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    line = 1
    try:
        columns = list(reader.fieldnames or ())
        if field not in columns:
            raise ConfigError(f"{name}:1: no column {field!r}; {nearest(field, columns)}")
        line = reader.line_num + 1
        for row in reader:
            if row[field] is None or None in row:
                raise ConfigError(f"{name}:{line}: the row has not the header's {len(columns)} columns")
            yield row[field]
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{name}: not CSV, in the row from line {line}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _row(line: str, where: str, field: str | None) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    key = field or "prompt"
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: each line must be an object such as {{{json.dumps(key)}: ...}}")
    if field is None and "messages" in row:
        if "prompt" in row:
            raise ConfigError(f"{where}: the row has both 'prompt' and 'messages'; say which with prompts.field")
        key = "messages"
    if key not in row:
        which = "which prompts.field names" if field else "nor 'messages'"
        raise ConfigError(f"{where}: no key {key!r}, {which}; {nearest(key, row)}")
    return _prompt(row[key], f"{where}: {key}", "")


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
        return value
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return tuple(_message(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, Mapping) and set(value) <= set(_MESSAGE_KEYS):
        raise ConfigError(
            f"{where}: a conversation is a list of messages, even of one: write [{{role: ..., content: ...}}]"
        )
    raise ConfigError(f"{where} must be text, or a list of chat messages (role, content), not {value!r}{hint}")


def _message(value: Mapping[Any, Any], where: str) -> Message:
    for key in value:
        if key not in _MESSAGE_KEYS:
            raise ConfigError(f"{where}: unknown key {key!r} of a chat message; {nearest(str(key), _MESSAGE_KEYS)}")
    for key in _MESSAGE_KEYS:
        if not isinstance(value.get(key), str):
            raise ConfigError(f"{where}: a chat message needs {key!r}, a text; it has {value.get(key)!r}")
    return dict(value)
