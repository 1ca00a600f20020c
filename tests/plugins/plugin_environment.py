"""New environments with third-party packages in them; nanoengine, torch and the test tools come from ours."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "OMP_NUM_THREADS": "1"}


def run(*command: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """A command that must succeed."""
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **kwargs.pop("env", {})},
        **kwargs,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done


def make_environment(root: Path) -> Path:
    """A virtual environment that also sees our packages; gives its interpreter."""
    venv.create(root, with_pip=False)
    python = root / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    ours = sysconfig.get_path("purelib")
    (Path(site) / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    return python


def build_wheels(sources: Sequence[Path], into: Path) -> list[Path]:
    """A wheel of each source tree. A build writes beside its sources: give copies."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index",
        "--wheel-dir", into, *sources)  # fmt: skip
    return sorted(into.glob("*.whl"))


def install(python: Path, *what: str | Path) -> None:
    """With pip, from what is here."""
    offline = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, *what)
