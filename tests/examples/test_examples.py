"""Every file of examples/, run; and what it prints, checked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from examples.support import EXAMPLES, load, run
from nanoengine import LLM, SamplingParams
from nanoengine.cli.app import app
from nanoengine.testing.checkpoints import tiny_llama, tiny_qwen3

pytestmark = pytest.mark.usefixtures("forked")


def test_none_is_forgotten() -> None:
    tested = Path(__file__).read_text("utf-8")
    names = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")]
    assert len(names) >= 6
    assert [name for name in names if f'"{name}"' not in tested] == []


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, "--help", monkeypatch=monkeypatch)
    assert ended.value.code == 0
    assert "[model]" in capsys.readouterr().out


# offline_inference.py


@pytest.mark.slow
def test_offline_script(tiny: Path, tmp_path: Path) -> None:
    """As a user starts it: a process of its own, in another folder."""
    command = [sys.executable, str(EXAMPLES / "offline_inference.py"), str(tiny)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    prompts = load("offline_inference.py").PROMPTS
    assert done.stdout.count(" -> ") == len(prompts)
    assert all(repr(prompt) in done.stdout for prompt in prompts)


def test_only_the_import_of_the_offline_script_says_nanoengine() -> None:
    _, _, code = (EXAMPLES / "offline_inference.py").read_text("utf-8").split('"""', 2)
    assert [line for line in code.splitlines() if "nanoengine" in line] == [
        "from nanoengine import LLM, SamplingParams"
    ]


# decoding_experiment.py


def typical_reference(logits: np.ndarray, share: float) -> set[int]:
    """Ids that locally typical sampling keeps, one by one, of one row."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    surprise = -np.log(p)
    kept, total = set(), 0.0
    for token in np.argsort(np.abs(surprise - (p * surprise).sum()), kind="stable"):
        kept.add(int(token))
        total += p[token]
        if total >= share:
            break
    return kept


def apply_typical(processor: Any, logits: Tensor, shares: Tensor) -> Tensor:
    rows = type("Rows", (), {"column": lambda self, name: {"typical_p": shares}[name]})()
    return processor.apply(logits.clone(), rows)


@pytest.mark.parametrize("mutant", [False, True])
def test_typical_processor_keeps_what_it_should(mutant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = load("decoding_experiment.py").Typical(None)
    if mutant:  # nearest to an entropy of 0: that is top-p
        monkeypatch.setattr(torch.special, "entr", torch.zeros_like)
    logits = 3 * torch.randn(40, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shares = torch.linspace(0.05, 0.95, 40)
    kept = apply_typical(processor, logits, shares).isfinite()
    expected = [typical_reference(row.numpy(), share) for row, share in zip(logits, shares.tolist(), strict=True)]
    assert ([set(row.nonzero().flatten().tolist()) for row in kept] == expected) is not mutant


def test_typical_processor_leaves_other_rows_and_removed_tokens_alone() -> None:
    processor = load("decoding_experiment.py").Typical(None)
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(2))
    logits[:, :25] = float("-inf")
    out = apply_typical(processor, logits, torch.tensor([1.0, 0.3]))
    assert torch.equal(out[0], logits[0])
    assert 0 < out[1].isfinite().sum() < 25
    assert not out[1, :25].isfinite().any()


def test_decoding_experiment(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("decoding_experiment.py", tiny, monkeypatch=monkeypatch)
    rows = re.findall(r"(\w+) +([\d.]+) +(-?[\d.]+) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    logprob = {(name, value): float(mean) for name, value, mean, _ in rows}
    assert len(rows) == 7
    assert logprob["temperature", "0.0"] > logprob["top_p", "0.5"] > logprob["temperature", "1.0"]
    assert logprob["typical_p", "0.2"] != logprob["temperature", "1.0"]


# guidance.py


def test_guidance(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Scale 1 is the text behind the one prompt, scale 0 that behind the other; more is neither."""
    names = run("guidance.py", tiny, "--scale", "6", monkeypatch=monkeypatch)
    texts = [part.partition(": ")[2].strip() for part in re.split(r"^scale ", capsys.readouterr().out, flags=re.M)[1:]]
    prompts = [names["BEGIN"], names["TOPIC"] + names["BEGIN"]]
    with LLM(tiny, max_model_len=512) as llm:
        plain = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
        guided = [names["guided_text"](llm, scale) for scale in (0.0, 1.0, 6.0)]
    assert guided[:2] == [output.outputs[0].text for output in plain]
    assert len(set(guided)) == 3
    assert texts == [(names["BEGIN"] + text).strip() for text in guided]


def test_guidance_says_where_a_row_is_alone(tiny: Path) -> None:
    example = load("guidance.py")
    guidance = example.Guidance(2.0)
    guidance.pairs.append(([1], [2]))
    with pytest.raises(RuntimeError, match="runs without the other"):
        guidance([[1]], [[5]], torch.zeros(1, 9))
    logits = torch.randn(2, 9)
    want = 2 * logits[0].log_softmax(-1) - logits[1].log_softmax(-1)
    found = guidance([[1], [2]], [[5], [5]], logits)
    assert torch.allclose(found, want.expand(2, -1))


# hidden_states.py


def test_hidden_states(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("hidden_states.py", tiny, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert f"{len(names['PROMPT'])} tokens, each a vector of 48 (torch.float32)" in out
    with LLM(tiny) as llm:
        alike = names["similarities"](llm)
        *_, last = names["answers_by_layer"](llm, names["PROMPT"])
        [answer] = llm.generate([names["PROMPT"]], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        assert last == llm.get_tokenizer().decode(answer.outputs[0].token_ids)
    torch.testing.assert_close(alike, alike.T)
    torch.testing.assert_close(alike.diagonal(), torch.ones(len(alike)))


@pytest.mark.slow
def test_hidden_states_of_a_real_model(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run("hidden_states.py", smollm2_path, monkeypatch=monkeypatch)
    assert re.search(r"^ +29  ' Paris'$", capsys.readouterr().out, re.MULTILINE)
    with LLM(smollm2_path, max_model_len=256) as llm:
        alike = names["similarities"](llm)
    assert min(alike[0, 1], alike[2, 3]) > alike[:2, 2:].max()  # cats with cats, banks with banks


# qk_variance.py


def test_qk_variance(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("qk_variance.py", tiny, "--plot", tmp_path / "plot.png", monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    for d, raw, divided in re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+)", out, re.MULTILINE):
        assert float(raw) == pytest.approx(int(d), rel=0.06)
        assert float(divided) == pytest.approx(1, rel=0.06)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_qk_variance_begins_no_work_that_cannot_be_drawn(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LLM, "__init__", lambda *_, **__: pytest.fail("the work began"))
    with pytest.raises(SystemExit):
        run("qk_variance.py", tiny, "--plot", tmp_path / "none/plot.png", monkeypatch=monkeypatch)
    assert f"there is no folder {tmp_path / 'none'}" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run("qk_variance.py", tiny, "--plot", tmp_path / "plot.png", monkeypatch=monkeypatch)
    assert "the plot needs matplotlib" in capsys.readouterr().err


def test_qk_variance_is_of_the_scores_that_attention_takes(tiny: Path) -> None:
    study = load("qk_variance.py")
    with LLM(tiny, max_model_len=1024) as llm:
        layers = study.layers_of(llm)
        name = "model.layers.2.self_attn.attn"
        tap = llm.tap(study.TEXT, [name])[0][name]
    scores = layers[2].products() / layers[2].q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    values = tap.inputs[2].repeat_interleave(3, dim=1)
    torch.testing.assert_close(torch.einsum("hqk,khd->qhd", weights, values), tap.outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_qk_variance_of_a_real_model(smollm2_path: Path) -> None:
    study = load("qk_variance.py")
    with LLM(smollm2_path, max_model_len=1024) as llm:
        layers = study.layers_of(llm)
    assert len(layers) == 30
    sizes = [4, 16, 64]
    grown = study.growth(layers, sizes)
    assert study.slope(sizes, grown) > 1  # its components are not independent
    last = layers[-1].products()
    assert study.attended(last) < study.attended(last / 8) / 2


# kv_blocks.py


def test_kv_blocks(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("kv_blocks.py", tiny, "1", monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    compared = re.findall(r"^\w.*?  +([\d,]+) +([\d,]+)$", out, re.MULTILINE)
    assert len(compared) == 3
    assert all(by_hand == engine for by_hand, engine in compared)
    rows = [tuple(map(int, row)) for row in re.findall(r"^ +(\d+) +(\d+) +(\d+) +(\d+)$", out, re.MULTILINE)]
    [fit] = [int(by_hand) for by_hand in re.findall(r"^blocks in.*? +(\d+) +\d+$", out, re.MULTILINE)]
    assert [(held, preempted) for _, _, held, preempted in rows[:2]] == [(want, 0) for _, want, _, _ in rows[:2]]
    _, want, held, preempted = rows[2]
    assert fit - 9 < held <= fit < want
    assert preempted > 0


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
def test_a_block_by_hand_is_what_is_allocated(make: Any, tmp_path: Path) -> None:
    """Qwen3's head size is not hidden_size / heads."""
    folder = make(tmp_path)
    study, hf = load("kv_blocks.py"), json.loads((folder / "config.json").read_text())
    with LLM(folder, skip_tokenizer_init=True, num_gpu_blocks_override=9) as llm:
        backend = llm._built.executor.runner.backends[0]  # type: ignore[attr-defined]
        allocated = backend._kv.untyped_storage().nbytes()
    assert study.block_bytes(hf, 4) * 10 == llm.memory_report.kv_cache_bytes == allocated


# tensor-parallel.yaml


@pytest.mark.slow
def test_tensor_parallel_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path / "tiny", with_tokenizer=True, max_position_embeddings=500)
    monkeypatch.chdir(tmp_path)
    recipe = [str(EXAMPLES / "tensor-parallel.yaml"), f"model={folder}", "engine.device=cpu", "sampler.max_tokens=12"]
    shown = CliRunner().invoke(app, ["config", "show", recipe[0]])
    assert shown.exit_code == 0, shown.stderr
    assert "tensor_parallel_size: 2" in shown.stdout

    def answers(*overrides: str) -> list[Any]:
        result = CliRunner().invoke(app, ["run", *recipe, f"output={len(overrides)}.jsonl", *overrides])
        assert result.exit_code == 0, result.stderr
        rows = map(json.loads, (tmp_path / f"{len(overrides)}.jsonl").read_text("utf-8").splitlines())
        return [(row["index"], row["outputs"][0]["token_ids"]) for row in sorted(rows, key=lambda row: row["index"])]

    assert answers() == answers("engine.tensor_parallel_size=1")
