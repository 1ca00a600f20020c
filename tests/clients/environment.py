"""The clients' own virtual environment. `python tests/clients/environment.py [FOLDER]` makes it if it is not there."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
PINS = HERE / "requirements.txt"
FOLDER = HERE.parents[1] / ".venv-clients"


def make(folder: Path = FOLDER) -> Path:
    """Its interpreter. It is made anew when the pins have changed: about 1 GB. Raises `CalledProcessError`."""
    python, stamp = folder / "bin" / "python", folder / "pins"
    if stamp.exists() and stamp.read_text() == PINS.read_text():
        return python
    venv.create(folder, with_pip=True, clear=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "-r", PINS], check=True)
    subprocess.run([*pip, "check"], check=True)
    stamp.write_text(PINS.read_text())
    return python


if __name__ == "__main__":
    print(make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(os.environ.get("NANOENGINE_CLIENTS", FOLDER))))
