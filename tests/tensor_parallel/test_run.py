"""`nanoengine run` over two ranks: finished results are kept when one dies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nanoengine.cli.app import app
from nanoengine.testing.checkpoints import tiny_llama

PLUGIN = """
import os
from nanoengine.api import *
from nanoengine.api import hookimpl
from nanoengine.plugins.models.llama import Llama


class Mortal(Llama):
    def __init__(self, config, ctx):
        super().__init__(config, ctx)
        self.rank = ctx.tp.rank
        print("what a plugin prints")

    def forward(self, input_ids, positions, batch):
        if self.rank == 1 and (input_ids == ord("!")).any():
            os.kill(os.getpid(), 9)
        return super().forward(input_ids, positions, batch)


@hookimpl
def register_models():
    return [ModelSpec(name="mortal", architectures=("MortalForCausalLM",), target=f"{__name__}:Mortal", api=1)]
"""
CONFIG = """
model: {source: %s}
attention: torch
engine: {tensor_parallel_size: 2, max_num_seqs: 1, block_size: 4, num_gpu_blocks_override: 64}
sampler: {temperature: 0, max_tokens: 5, ignore_eos: true, logit_bias: {33: -100}}
prompts: ["one", "two!", "three"]
output: results.jsonl
"""


def test_what_had_finished_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_llama(tmp_path / "model", with_tokenizer=True, architectures=["MortalForCausalLM"])
    (tmp_path / "mortal.py").write_text(PLUGIN)
    (tmp_path / "run.yaml").write_text(CONFIG % model)
    done = CliRunner().invoke(app, ["run", "run.yaml", "--plugin", "mortal.py"])
    assert done.exit_code == 1, done.output
    assert "error: rank 1 of 2 failed (step " in done.stderr
    assert "killed by SIGKILL" in done.stderr
    assert "finished results are kept" in done.stderr
    assert done.stdout.count("what a plugin prints") == 1, "by this process, which asks what attention the model needs"
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["index"], row["error"] and row["error"]["code"]) for row in rows] == [
        (0, None),
        (1, "worker_failed"),
        (2, "worker_failed"),
    ]
