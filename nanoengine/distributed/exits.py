"""How a process ended, in words."""

from __future__ import annotations

import signal


def exit_words(status: int | None) -> str:
    """`status`: as in `subprocess`; None: it still runs, but has closed its connection."""
    if status is None:
        return "it closed its connection"
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name
    hint = ", as the kernel does if the host runs out of memory" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"
