"""The real engine under the command line: a tiny random model, chat template and all."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from nanoengine import LLM
from nanoengine.testing.checkpoints import tiny_llama

pytestmark = pytest.mark.usefixtures("forked")

Run = Callable[..., Result]

SHARED = "a long beginning that several prompts have in common, "
CONFIG = f"""\
model: ./tiny
defaults:
  - sampler: greedy
  - attention: auto
  - _self_
sampler:
  max_tokens: 12
engine:
  block_size: 16
prompts:
  - {SHARED}one
  - {SHARED}two
  - - {{role: user, content: a conversation}}
  - {"far too long " * 40}
output: results.jsonl
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", with_tokenizer=True)


def test_run_gives_what_the_python_api_gives(
    nanoengine: Run, model: Path, tmp_path: Path, rows: Callable[[], list[dict[str, Any]]]
) -> None:
    (tmp_path / "tiny").symlink_to(model)
    (tmp_path / "run.yaml").write_text(CONFIG)
    result = nanoengine("run", "run.yaml")
    assert result.exit_code == 1, result.stderr  # the last prompt does not fit the model's 256 positions
    found = sorted(rows(), key=lambda row: row["index"])
    with LLM.from_config(tmp_path / "run.yaml") as llm:
        asked = [[{"role": "user", "content": SHARED + word}] for word in ("one", "two")]
        expected = llm.chat([*asked, [{"role": "user", "content": "a conversation"}]], use_tqdm=False)
    for row, output in zip(found, expected, strict=False):
        assert row["prompt_token_ids"] == list(output.prompt_token_ids)
        assert row["outputs"][0]["token_ids"] == list(output.outputs[0].token_ids)
        assert row["outputs"][0]["text"] == output.outputs[0].text
        assert row["error"] is None
        assert 0 <= row["metrics"]["queued"] <= row["metrics"]["ttft"] <= row["metrics"]["latency"]
    assert len({tuple(row["outputs"][0]["token_ids"]) for row in found[:3]}) == 3
    assert found[1]["num_cached_tokens"] == 48  # the whole blocks of 60 common tokens
    assert (found[3]["outputs"], found[3]["error"]["code"]) == ([], "too_long")
    assert "4 prompts, 1 failed, " in result.stderr
    assert "prefix-cache hit rate 0.0%" not in result.stderr
    assert result.stdout.count("\n[") + 1 == 4


def test_chat_false_runs_the_text_itself(
    nanoengine: Run, model: Path, tmp_path: Path, rows: Callable[[], list[dict[str, Any]]]
) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    result = nanoengine("run", "run.yaml", f"model={model}", "chat=false", "prompts=[abc]", "sampler.n=2")
    assert result.exit_code == 0, result.stderr
    [row] = rows()
    assert row["prompt_token_ids"] == list(b"abc")
    assert len(row["outputs"]) == 2


def test_control_c_keeps_whole_rows(model: Path, tmp_path: Path) -> None:
    prompts = "".join(f"  - prompt {i}\n" for i in range(400))
    sampler = "sampler: {temperature: 0, max_tokens: 100, ignore_eos: true}\n"
    (tmp_path / "run.yaml").write_text(
        f"model: {model}\n{sampler}engine: {{max_num_seqs: 1}}\noutput: out.jsonl\nprompts:\n{prompts}"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "nanoengine", "run", "run.yaml"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    output = tmp_path / "out.jsonl"
    while process.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.05)
    for _ in range(3):  # the later ones fall into the closing
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    finished = [json.loads(line) for line in output.read_text().splitlines()]
    assert 1 <= len(finished) < 400
    assert f"{len(finished)} of 400 prompts, " in errors


WRONG = """\
from dataclasses import dataclass
from typing import ClassVar
from nanoengine.api import ColumnSpec, Phase, SamplerSpec, LogitsProcessor, ProcessorParams, hookimpl

@dataclass(frozen=True)
class Params(ProcessorParams):
    wrong: bool = False
    columns: ClassVar = {{"wrong": ColumnSpec(dtype="bool", default=False)}}

class Wrong(LogitsProcessor):
    phase = Phase.MASK

    def apply(self, logits, rows):
        if {condition}:
            raise IndexError("rows and columns")
        return logits

@hookimpl
def register_samplers():
    return [SamplerSpec(name="wrong", params=Params, target=f"{{__name__}}:Wrong", api=1)]
"""


@pytest.mark.parametrize("debug", [False, True])
def test_a_processor_that_breaks_batches_is_not_ignored(
    nanoengine: Run, model: Path, tmp_path: Path, debug: bool
) -> None:
    """Every prompt is answered. Log messages are on lines of their own, next to a progress bar."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "wrong.py").write_text(WRONG.format(condition="len(logits) > 1"))
    given = [f"model={model}", "prompts=[a, b, c]", "sampler.wrong=true", "--plugin", "wrong.py"]
    result = nanoengine("run", "run.yaml", *given, *(["--debug"] if debug else []))
    assert result.exit_code == 0, result.stderr
    lines = result.stderr.splitlines()
    warning, *repeated = [line for line in lines if "run again one by one" in line]
    assert debug or not repeated  # one warning; each further step is logged for --debug only
    assert warning.startswith("a step raised IndexError: rows and columns")
    assert any(line.endswith("steps failed, and their requests ran again one by one: the warning above says why")
               for line in lines)  # fmt: skip
    assert ('raise IndexError("rows and columns")' in result.stderr) == debug
    assert logging.getLogger("nanoengine").level == logging.NOTSET


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_where_a_request_broke(nanoengine: Run, model: Path, tmp_path: Path, debug: bool) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "wrong.py").write_text(WRONG.format(condition="True"))
    given = [f"model={model}", "prompts=[a]", "sampler.wrong=true", "--plugin", "wrong.py"]
    result = nanoengine("run", "run.yaml", *given, *(["--debug"] if debug else []))
    assert result.exit_code == 1
    assert "[0] failed (step_failed): " in result.stderr
    assert ('raise IndexError("rows and columns")' in result.stderr) == debug
