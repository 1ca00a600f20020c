"""`nanoengine plugins list`: what is registered and by which package, and what failed. Imports no torch."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, get_args

import typer

from nanoengine.api.specs import ModelSpec, Origin
from nanoengine.cli.common import DebugOption, PluginOption, answer, user_errors
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Kind, Registry

app = typer.Typer(help="Look at plugins, or start a new one.", invoke_without_command=True, rich_markup_mode=None)

_COLUMNS = ("kind", "name", "distribution", "version", "origin", "api", "target", "architectures")
_NARROW = ("kind", "name", "distribution", "version")
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def _group(context: typer.Context) -> None:
    """Look at plugins. Without a command: list."""
    if context.invoked_subcommand is None:
        list_plugins()


@app.command(name="list")
def list_plugins(as_json: JsonOption = False, plugin: PluginOption = None, debug: DebugOption = False) -> None:
    """List every registered part with its origin, and every plugin that failed with the cause."""
    with user_errors(debug):
        registry = discover(plugin or ())
        answer(json.dumps(as_dict(registry), indent=2) if as_json else as_text(registry))


def as_dict(registry: Registry) -> dict[str, list[dict[str, Any]]]:
    """The whole registry as JSON values."""
    return {
        "plugins": list(_parts(registry)),
        "conflicts": [
            {
                "kind": _singular(c.kind),
                "name": c.name,
                "origins": [str(each.origin) for each in c.claims],
                "cause": str(c),
            }
            for c in registry.conflicts
        ],
        "failures": [
            {
                **asdict(f.origin),
                "origin": str(f.origin),
                "at": f.at,
                "cause": f.cause,
                "traceback": f.traceback,
            }
            for f in registry.failures
        ],
    }


def _parts(registry: Registry) -> Iterator[dict[str, Any]]:
    for kind in get_args(Kind):
        for name, found in getattr(registry, kind).items():
            spec = found.spec
            served = list(spec.architectures) if isinstance(spec, ModelSpec) else None
            yield _row(_singular(kind), name, found.origin, spec.api, spec.target, served)
    for root, origin in registry.config_roots:
        yield _row("configs", root, origin, None, root, None)


def _singular(kind: str) -> str:
    return kind.removesuffix("ies") + "y" if kind.endswith("ies") else kind.removesuffix("s")


def _row(
    kind: str, name: str, origin: Origin, api: int | None, target: str, architectures: list[str] | None
) -> dict[str, Any]:
    values = (
        kind,
        name,
        origin.distribution,
        origin.version,
        origin.file or origin.module or origin.plugin,
        api,
        target,
        architectures,
    )
    return dict(zip(_COLUMNS, values, strict=True))


def as_text(registry: Registry) -> str:
    """The registry as text: a table, then the problems."""
    found = as_dict(registry)
    lines = _table(found["plugins"], _COLUMNS)
    if sys.stdout.isatty() and max(map(len, lines)) > shutil.get_terminal_size().columns:
        lines = [*_table(found["plugins"], _NARROW), "(a wider terminal, --json or a pipe shows all columns)"]
    for word in ("conflicts", "failures"):
        if found[word]:
            lines += ["", f"{word}:"]
        for problem in found[word]:
            what = f"{problem['origin']} failed at {problem['at']}: " if word == "failures" else ""
            lines.append(f"  {what}{problem['cause']}")
    return "\n".join(lines)


def _table(parts: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    return _aligned([list(columns), *([_cell(row[column]) for column in columns] for row in parts)])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return "-" if value is None else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
