"""Checks an installation, and the parts that a configuration needs, without starting an engine.

No error ends the check: a package, a driver or a plugin that raises an error becomes a finding.
"""

from __future__ import annotations

from collections.abc import Callable

from nanoengine.api.attention import AttentionNeed
from nanoengine.api.errors import NanoEngineError
from nanoengine.lab.doctor import environment, parts
from nanoengine.lab.doctor.findings import Diagnosis, Finding, Level, Verdict, count
from nanoengine.lab.doctor.parts import Asked
from nanoengine.setup.plugins.registry import Registry

__all__ = ["Asked", "Diagnosis", "Finding", "Level", "Verdict", "count", "examine"]


def examine(registry: Registry, asked: Asked, say: Callable[[str], None]) -> Diagnosis:
    """Runs all checks. `say`: reports progress when a model is downloaded."""
    findings = list(environment.environment())
    torch_works = environment.import_error("torch") is None
    if torch_works:
        findings += environment.gpu()
    findings += parts.plugins(registry, load=torch_works, sampler=asked.sampler)
    if not torch_works:
        return Diagnosis(findings=tuple(findings))
    findings.append(parts.grammars(registry, asked.options, asked.sampler))
    need = parts.plain_need(asked.options)
    if asked.source is not None:
        try:
            need = _model(asked, asked.source, registry, say, findings)
        except NanoEngineError as error:
            findings.append(Finding(section="model", name=asked.source, level="error", text=str(error)))
    verdicts, judged = parts.attention(need, registry, asked.attention)
    can = [verdict.name for verdict in verdicts if not verdict.reasons]
    backend = (
        asked.attention if asked.attention in can else next(iter(can), None) if asked.attention == "auto" else None
    )
    return Diagnosis(findings=(*findings, *judged), backends=tuple(verdicts), backend=backend)


def _model(
    asked: Asked, source: str, registry: Registry, say: Callable[[str], None], findings: list[Finding]
) -> AttentionNeed:
    from nanoengine.build import find_model

    found, need = parts.model_findings(asked, find_model(source, registry, say), registry)
    findings += found
    return need
