"""The server that the clients ask, and how their programs are run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.environment import FOLDER, HERE, make
from tests.server.running import Running

KEY = "key-of-the-clients"
Program = Callable[..., Any]


@pytest.fixture(scope="session")
def server(smollm2_path: Path) -> Iterator[Running]:
    """The quickstart's model, with a tool parser and a key. `smollm2_path`: it can be had."""
    command = [sys.executable, "-m", "nanoengine", "serve", "quickstart", "server.port=0", "server.tool_parser=hermes"]
    with Running(command, {"NANOENGINE_API_KEYS": KEY}) as running:
        yield running.until_ready()


@pytest.fixture(scope="session")
def clients_python() -> Path:
    return make(Path(os.environ.get("NANOENGINE_CLIENTS", FOLDER)))


@pytest.fixture
def program(server: Running, clients_python: Path, tmp_path: Path) -> Program:
    """Runs a program of `programs` with arguments; gives what it answers."""

    def run(name: str, *arguments: str) -> Any:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "ANTHROPIC_"))},
            "SERVER": f"http://127.0.0.1:{server.port}",
            "SERVER_KEY": KEY,
            "SERVER_MODEL": "smollm2-135m",
            "HOME": str(tmp_path),  # where they keep settings and caches
            "HF_HOME": str(tmp_path / "hf"),
            "HF_DATASETS_OFFLINE": "1",
            "LLM_USER_PATH": str(tmp_path),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # instead of downloading one
        }
        done = subprocess.run(
            [clients_python, HERE / "programs" / f"{name}.py", *arguments],
            capture_output=True, text=True, env=environment, cwd=HERE / "lm_eval_tasks", stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log[-4000:]}"
        return json.loads(done.stdout.splitlines()[-1])

    return run
