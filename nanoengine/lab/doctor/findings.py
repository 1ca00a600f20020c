"""What an examination says: findings, and what follows from them. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: under which heading it stands. name: what was looked at.
        level: "ok"; "note": it is not for this machine or model; "warning": it is broken, and nothing that was asked
            for needs it; "error": what was asked for cannot work.
        text: what was found. fix: what to do about it; "" where there is nothing. detail: the end of a traceback.
    """

    section: str
    name: str
    text: str
    level: Level = "ok"
    fix: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One attention backend. `reasons` against it; empty: it can serve. `preference`: auto asks the highest first."""

    name: str
    origin: str
    preference: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything found. `backends`: in the order in which "auto" asks; `backend`: the one an engine would take."""

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
