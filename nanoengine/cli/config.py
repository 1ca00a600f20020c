"""`nanoengine config`: `show` prints the composed configuration as YAML, with the origin of each value; `list`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import typer
import yaml

from nanoengine.cli.common import ConfigArgument, DebugOption, OverridesArgument, PluginOption, answer, user_errors
from nanoengine.cli.config_list import list_options
from nanoengine.setup.config.config import RunConfig, load_config
from nanoengine.setup.config.prompts import PromptFile
from nanoengine.setup.plugins.discover import discover

app = typer.Typer(help="Look at configurations.", no_args_is_help=True, rich_markup_mode=None)
app.command(name="list")(list_options)


@app.callback()
def _group() -> None:
    """Look at configurations."""


@app.command()
def show(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Print the composed configuration, and where each value came from."""
    with user_errors(debug):
        found = load_config(config, overrides or (), registry=discover(plugin or ()))
        answer(render(found), end="")


def render(config: RunConfig) -> str:
    """YAML that composes to the same configuration. Each line has its origin as a comment."""
    lines: list[str] = []
    sections = {name: asdict(section) for name, section in config.sections.items()}
    for key, value in (plain(config) | sections).items():
        if key in ("model", "attention", "engine", "sampler", *sections) and isinstance(value, Mapping) and value:
            lines.append(f"{key}:")
            for name, item in value.items():
                lines += [f"  {line}" for line in _lines(name, item, _origins(config, f"{key}.{name}"))]
        else:
            lines += _lines(key, value, _origins(config, key))
    return "\n".join(lines) + "\n"


def _origins(config: RunConfig, key: str) -> str:
    """The origin of the value, and the overrides that changed a part of it."""
    inside = [by for path, by in config.provenance.items() if path.startswith((f"{key}[", f"{key}."))]
    changed = [by for by in inside if by.startswith("override ")]
    return ", ".join(dict.fromkeys([config.provenance.get(key, "default"), *changed]))


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain containers, as in YAML, without the origins and without the sections of commands."""
    prompts: Any = config.prompts
    if isinstance(prompts, PromptFile):
        prompts = asdict(prompts)
    elif prompts is not None:
        prompts = [each if isinstance(each, str) else [dict(message) for message in each] for each in prompts]
    return {
        "model": asdict(config.model),
        "attention": asdict(config.attention),
        "engine": asdict(config.engine),
        "sampler": None if config.sampler is None else dict(config.sampler),
        "chat": config.chat,
        "output": config.output,
        "prompts": prompts,
    }


def _lines(key: str, value: Any, origin: str) -> list[str]:
    text = yaml.dump({key: _escaped(value)}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**30)
    first, *rest = text.rstrip("\n").split("\n")
    return [f"{first}  # {_one_line(origin)}", *rest]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _escaped(value: Any) -> Any:
    """Escapes `${` in texts, so that they have the same value when the YAML is read."""
    if isinstance(value, str):
        return re.sub(r"(?<!\\)(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list | tuple) else value


class _Dumper(yaml.SafeDumper):
    """Writes texts with several lines in one line, in double quotes, so that a comment can follow."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = '"' if any(not char.isprintable() for char in value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
