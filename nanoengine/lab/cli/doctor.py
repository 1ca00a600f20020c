"""`nanoengine doctor`: what works here and what does not, with causes and fixes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanoengine import __version__
from nanoengine.api.errors import NanoEngineError
from nanoengine.cli.common import FAILED, DebugOption, OverridesArgument, PluginOption, answer, say, user_errors
from nanoengine.cli.config_list import options_of
from nanoengine.cli.threads import CHOSEN
from nanoengine.setup.config.config import NoSuchConfig, load_config
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry

if TYPE_CHECKING:
    from nanoengine.lab.doctor import Asked, Diagnosis, Finding


def doctor(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG|RECIPE]", help="Check whether this can run here.", show_default=False),
    ] = None,
    overrides: OverridesArgument = None,
    model: Annotated[str | None, typer.Option(help="Check whether this model can run here, with defaults.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Check environment, GPU, plugins and attention backends. Exit status 1: the configuration cannot work."""
    with user_errors(debug):
        from nanoengine.lab.doctor import Diagnosis, examine

        registry, findings = _discovered(plugin or ())
        asked, more = _asked(config, overrides or (), model, registry)
        found = examine(registry, asked, say)
        all_found = (*more, *found.findings, *_threads(), *findings)
        found = Diagnosis(findings=all_found, backends=found.backends, backend=found.backend)
        answer(json.dumps(as_dict(found), indent=2) if as_json else as_text(found, asked.attention))
        if not found.works:
            raise typer.Exit(FAILED)


def _discovered(files: Sequence[Path]) -> tuple[Registry, list[Finding]]:
    """The registry, and findings about files that fail and config options that two packages provide."""
    from nanoengine.lab.doctor import Finding

    good: list[Path] = []
    findings = []
    for file in files:
        try:
            discover([*good, file])
            good.append(file)
        except NanoEngineError as error:
            fix = f"fix it, or leave out --plugin {file}"
            findings.append(Finding(section="plugins", name=str(file), level="error", text=str(error), fix=fix))
    registry = discover(good)
    for clash in options_of(registry)[1]:
        findings.append(Finding(section="plugins", name="config groups", level="warning", text=clash))
    return registry, findings


def _threads() -> list[Finding]:
    """The number of threads that a command would choose now, and the reason."""
    from nanoengine.lab.doctor import Finding

    chosen = CHOSEN.get()
    if chosen is None:
        return []
    if not chosen.ignored:
        return [Finding(section="environment", name="threads", text=chosen.described())]
    text, fix = (
        f"{chosen.described()}; {chosen.ignored} is not a number of threads, and is ignored",
        "set a number, or unset it",
    )
    return [Finding(section="environment", name="threads", level="warning", text=text, fix=fix)]


def _asked(
    config: str | None, overrides: Sequence[str], model: str | None, registry: Registry
) -> tuple[Asked, list[Finding]]:
    """What an engine would be made of. A wrong configuration becomes a finding."""
    from nanoengine.lab.doctor import Asked, Finding

    if config is None:
        return Asked(source=model), []
    try:
        composed = load_config(config, [*overrides, *([f"model={model}"] if model else [])], registry=registry)
    except NoSuchConfig:  # mistyped: there is nothing to examine
        raise
    except NanoEngineError as error:
        return Asked(), [Finding(section="configuration", name=config, level="error", text=str(error))]
    asked = Asked(
        source=composed.model.pinned,
        implementation=composed.model.implementation,
        attention=composed.attention.backend,
        options=composed.engine,
        sampler=frozenset(composed.sampler or ()),
    )
    return asked, [Finding(section="configuration", name=config, text="can be composed, and every value is valid")]


def as_dict(found: Diagnosis) -> dict[str, Any]:
    """The whole diagnosis as JSON values."""
    return {
        "nanoengine": __version__,
        "works": found.works,
        "attention": found.backend,
        "backends": [asdict(verdict) for verdict in found.backends],
        "findings": [asdict(finding) for finding in found.findings],
    }


def as_text(found: Diagnosis, attention: str) -> str:
    """The diagnosis as text."""
    lines: list[str] = []
    for section, findings in found.sections():
        lines += [*([""] if lines else []), section]
        lines += [line for finding in findings for line in _lines(finding)]
    return "\n".join([*lines, "", *_closing(found, attention)])


def _lines(finding: Finding) -> Iterator[str]:
    first, *rest = finding.text.splitlines() or [""]
    yield f"  {finding.level:<8} {finding.name}: {first}"
    yield from (f"           {line}" for line in (*rest, *finding.detail.splitlines()))
    if finding.fix:
        yield f"           fix: {finding.fix}"


def _closing(found: Diagnosis, attention: str) -> Iterator[str]:
    from nanoengine.lab.doctor import count

    if found.backends:
        order = ", ".join(f"{verdict.name} ({verdict.preference})" for verdict in found.backends)
        yield f"auto tries these in order, highest preference first: {order}"
        yield f"attention={attention} takes: {found.backend or 'none'}"
    errors, warnings = count(found.findings, "error"), count(found.findings, "warning")
    verdict = "this configuration works" if found.works else "this configuration cannot work"
    yield f"{verdict}: {_number(errors, 'error')}, {_number(warnings, 'warning')}"
    for level in ("error", "warning"):  # repeated, because they are easily missed between other findings
        for finding in found.findings:
            if finding.level == level:
                text = finding.text.partition("\n")[0]
                yield f"  {level:<8} {finding.name}: {text}" + (f"; fix: {finding.fix}" if finding.fix else "")


def _number(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
