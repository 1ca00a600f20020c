"""The prompts of a run: in the configuration, or in a JSONL file that it names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nanoengine.core.errors import ConfigError, ParamsError, nearest
from nanoengine.core.field_types import conform
from nanoengine.core.setup.composer.yaml_file import KeyPath, dotted

Message = Mapping[str, str]
Prompt = str | tuple[Message, ...]
"""A text, or a conversation: messages with `role` and `content`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFile:
    """Prompts in a JSONL file, one object a line. `field`: the key whose value is the prompt."""

    file: str
    field: str = "prompt"


Prompts = tuple[Prompt, ...] | PromptFile
_MESSAGE_KEYS = ("role", "content")
_HINT = "; in YAML, a text with ': ' or ' #' in it, or one that looks like a number, goes in quotes"


def check_prompts(value: Any, origin: Callable[[KeyPath], str]) -> Prompts | None:
    """The `prompts` section. `origin` tells who gave a key below it. Raises `ConfigError`."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return _prompt_file(value, origin)
    if not isinstance(value, list):
        raise ConfigError(
            f"{origin(())}: prompts must be a list, or {{file: prompts.jsonl, field: prompt}}, not {value!r}"
        )
    return tuple(_prompt(item, f"{origin((i,))}: prompts[{i}]", _HINT) for i, item in enumerate(value))


def read_prompts(prompts: Prompts | None) -> list[Prompt]:
    """All prompts; reads the file, if they stand in one. Raises `ConfigError` naming file and line."""
    if not isinstance(prompts, PromptFile):
        return list(prompts or ())
    path = Path(prompts.file).expanduser()
    try:
        # Not splitlines(): JSON may hold U+2028 and its like inside a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompts of {path.absolute()}: {error}") from error
    return [_row(line, f"{path}:{n}", prompts.field) for n, line in enumerate(lines, 1) if line.strip()]


def _row(line: str, where: str, field: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: each line must be an object such as {{{json.dumps(field)}: ...}}")
    if field not in row:
        raise ConfigError(f"{where}: no key {field!r}, which prompts.field names; {nearest(field, row)}")
    return _prompt(row[field], f"{where}: {field}", "")


def _prompt_file(value: Mapping[str, Any], origin: Callable[[KeyPath], str]) -> PromptFile:
    names = [f.name for f in fields(PromptFile)]
    for key, item in value.items():
        if key not in names:
            raise ConfigError(f"{origin((key,))}: unknown key {dotted(('prompts', key))!r}; {nearest(str(key), names)}")
        try:
            conform(f"prompts.{key}", item, str)
        except ParamsError as error:
            raise ConfigError(f"{origin((key,))}: {error}") from error
    if not value.get("file"):
        raise ConfigError(f"{origin(())}: prompts.file must be given: the path of a JSONL file")
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
