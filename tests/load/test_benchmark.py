"""The benchmarks of the server, small and on a CPU: every part gives its rows."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving.py"
SMALL = ("--shape", "tiny", "--scale", "0.03", "--workers", "2", "--clients", "1", "--passes", "1")


@pytest.mark.load
@pytest.mark.timeout(1200)
@pytest.mark.skipif(torch.cuda.is_available(), reason="sized for a CPU")
def test_the_benchmark_of_serving_gives_its_rows(tmp_path: Path) -> None:
    out, options = tmp_path / "serving.json", ("--option", "device=cpu", "--option", "kv_cache_memory=100000000")
    chosen = ("--load", "c1", "c256", "--json", out)
    done = subprocess.run(
        [sys.executable, SCRIPT, *SMALL, *options, *chosen], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    found = [(row["part"], row.get("load")) for row in rows]
    parts = ("offline", "thread", "process", "server, 2 HTTP")
    assert found == [("driver", None), *((p, load) for p in parts for load in ("c1", "c256")), ("restart", None)]
    assert all(row["ttft_ms"][0] > 0 for row in rows if row.get("load") == "c1")
    assert all(row["tokens_per_s"][0] > 0 for row in rows if row.get("load") == "c256")
    assert rows[-1]["complete"] == rows[-1]["same text"] == rows[-1]["streams"] == 8


@pytest.mark.load
@pytest.mark.parametrize("options", [("--no-text",), ("--endpoint", "chat"), ("--bare",)], ids=" ".join)
def test_the_benchmark_of_chunks_gives_its_figures(options: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        SCRIPT.with_name("server_chunks.py"),
        "--streams",
        "10",
        "--rate",
        "20",
        "--seconds",
        "1",
    ]
    done = subprocess.run([*command, "--port", str(port), *options], capture_output=True, text=True, check=False)
    assert "us of CPU a chunk" in done.stdout, done.stderr
