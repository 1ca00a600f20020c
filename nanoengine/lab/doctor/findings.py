"""The results of a check: findings, and the diagnosis that follows from them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check.

    Attributes:
        section: the heading for it. name: what was checked.
        level: "ok"; "note": it is not for this machine or model; "warning": it is broken, but the configuration does
            not need it; "error": the configuration cannot work.
        text: what was found. fix: what to do about it; "" if nothing. detail: the end of a traceback.
    """

    section: str
    name: str
    text: str
    level: Level = "ok"
    fix: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One attention backend. `reasons`: why it is not supported; empty if it is. `preference`: that of its spec."""

    name: str
    origin: str
    preference: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The whole result. `backends`: in the order of "auto". `backend`: the one that an engine would take."""

    findings: tuple[Finding, ...]
    backends: tuple[Verdict, ...] = ()
    backend: str | None = None

    @property
    def works(self) -> bool:
        return not any(finding.level == "error" for finding in self.findings)

    def sections(self) -> Iterator[tuple[str, list[Finding]]]:
        names = dict.fromkeys(finding.section for finding in self.findings)
        return ((name, [f for f in self.findings if f.section == name]) for name in names)


def count(findings: Iterable[Finding], level: Level) -> int:
    return sum(finding.level == level for finding in findings)
