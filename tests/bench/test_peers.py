"""`benchmarks/peers.py`: this engine and transformers on one workload, as it is run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("forked")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peers.py"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="sized for a CPU")
def test_peers_report_the_same_rows(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    chosen = ("--peer", "transformers", "--peer", "nanoengine", "--peer", "vllm", "--workload", "d64")
    small = ("--shape", "tiny", "--scale", "0.04", "--passes", "1", "--transformers-batch", "2")
    done = subprocess.run(
        [sys.executable, SCRIPT, *chosen, *small, "--json", out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    theirs, ours = found["rows"][:2]
    assert [row["engine"].split()[0] for row in (theirs, ours)] == ["transformers", "nanoengine"]
    for row in (theirs, ours):
        assert (row["workload"], row["requests"], row["counts"]) == ("d64*0.04", 3, "output")
        assert row["best"] * row["best_seconds"] == pytest.approx(3 * 20)
    if importlib.util.find_spec("vllm") is None:
        assert "vllm is not installed" in found["notes"][0]
        assert found["notes"][0] in done.stdout
