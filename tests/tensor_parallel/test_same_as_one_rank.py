"""Two ranks against transformers and against one rank, float32: tokens, log-probs, prompt log-probs, under pressure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import families, tiny
from parity.compare import Mismatch, Report, assert_same_until_a_tie, compare
from parity.test_tiny_models import COUNT, GREEDY, WITH_PROMPT, seeded
from transformers import PreTrainedModel

from nanoengine import LLM, SamplingParams

# Chunks, preemption and prefix hits at once: a budget below most prompts, and fewer blocks than the requests want.
PRESSURE: dict[str, Any] = {"num_gpu_blocks_override": 26, "max_num_batched_tokens": 16}
KINDS = {
    "llama": "2 KV heads on 2 ranks, 131 ids",
    "qwen3 tied": "1 KV head on 2 ranks: held by both",
    "gemma2": "133 ids: padding stays -inf behind the cap on the logits",
    "gpt_oss": "sinks of the rank's heads; windows; the width of experts is cut",
}
OFTEN = pytest.mark.parametrize(
    "ranks", ["llama", "qwen3 tied"], indirect=True
)  # the others differ in their layers only
ASKED = tiny.prompts(10, shared=22, longest=10)


@dataclass
class Ranks:
    """Engines of one and of two ranks over one checkpoint, and transformers' model of it."""

    one: LLM
    two: LLM
    model: PreTrainedModel


def written(kind: str, folder: Path) -> Path:
    return tiny.write(kind, folder) if kind in tiny.KINDS else families.write(folder, kind)


@pytest.fixture(scope="module", params=KINDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    folder = written(request.param, tmp_path_factory.mktemp("tiny"))
    with tiny.llm(folder, **PRESSURE) as one, tiny.llm(folder, tensor_parallel_size=2, **PRESSURE) as two:
        yield Ranks(one, two, tiny.reference(folder))


def run(ranks: Ranks, params: SamplingParams | list[SamplingParams]) -> Report:
    """Both engines answer; two ranks against transformers, and against one rank. All kinds of pressure were there."""
    before = ranks.two.stats()
    outputs = ranks.two.generate(ASKED, params, use_tqdm=False)
    after = ranks.two.stats()
    for counter in ("preemptions", "chunks", "prefix_hit_tokens", "mixed_steps"):
        assert getattr(after, counter) > getattr(before, counter), counter
    assert after.free_blocks == after.num_blocks == 26
    report = compare(ranks.model, outputs, params)
    alone = ranks.one.generate(ASKED, params, use_tqdm=False)
    assert assert_same_until_a_tie(ranks.model, outputs, alone, params) > 0.5 * report.positions
    return report


def test_greedy(ranks: Ranks) -> None:
    report = run(ranks, GREEDY)
    assert report.positions == COUNT * len(ASKED)
    assert report.decided >= 0.97 * report.positions
    assert report.logprobs >= 3 * report.positions


@OFTEN
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooled(ranks: Ranks, pooling: Any) -> None:
    """The vectors of all hidden states, which each rank has; in chunks."""
    outputs = ranks.two.embed(ASKED, pooling, normalize=False, use_tqdm=False)
    for output, prompt in zip(outputs, ASKED, strict=True):
        assert output.embedding is not None
        with torch.no_grad():
            hidden = ranks.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
        want = hidden.mean(0) if pooling == "mean" else hidden[-1]
        assert float((torch.tensor(output.embedding) - want).abs().max() / want.abs().max()) < 1e-5


@OFTEN
def test_seeded(ranks: Ranks) -> None:
    """A recipe a request: drawn from shards, and from gathered logits where a processor wants them."""
    report = run(ranks, seeded(len(ASKED)))
    assert report.positions == COUNT * len(ASKED)
    assert report.decided >= 0.95 * report.positions


@OFTEN
def test_plain_draws(ranks: Ranks) -> None:
    """Only what ranks answer with one number each: greedy, and temperature alone."""
    common = {"max_tokens": COUNT, "ignore_eos": True}
    params = [SamplingParams(temperature=i % 3 * 0.6, seed=i, **common) for i in range(len(ASKED))]
    assert run(ranks, params).positions == COUNT * len(ASKED)


@OFTEN
def test_prompt_logprobs(ranks: Ranks) -> None:
    params = [WITH_PROMPT if i % 3 else GREEDY for i in range(len(ASKED))]
    report = run(ranks, params)
    assert report.prompt_logprobs >= 2 * sum(len(p) - 1 for i, p in enumerate(ASKED) if i % 3)


# Each is a plugin file with the model `Mutant`.
MUTANTS = {
    "a sum left out, of six": (
        "llama",
        "LlamaForCausalLM",
        """
from nanoengine.plugins.models.llama import Llama as Right

class Mutant(Right):
    def __init__(self, config, ctx):
        super().__init__(config, ctx)
        down = self.model.layers[1].mlp.down_proj
        down.tp = type("Alone", (), {"size": 1, "rank": down.tp.rank})()
""",
    ),
    "sinks of the rank's heads in another order": (
        "gpt_oss",
        "GptOssForCausalLM",
        """
from nanoengine.plugins.models.gpt_oss import GptOss as Right

class Mutant(Right):
    def __init__(self, config, ctx):
        super().__init__(config, ctx)
        sinks = self.model.layers[1].self_attn.sinks
        sinks.finish = lambda: sinks.weight.data.copy_(sinks.weight.flip(0))
""",
    ),
}
SPEC = """
from nanoengine.api import ModelSpec, hookimpl

@hookimpl
def register_models():
    return [ModelSpec(name="mutant", architectures=("{}",), target=f"{{__name__}}:Mutant", api=1)]
"""


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_on_two_ranks_is_caught(mutant: str, tmp_path: Path) -> None:
    kind, architecture, code = MUTANTS[mutant]
    folder = written(kind, tmp_path / "model")
    (tmp_path / "mutant.py").write_text(code + SPEC.format(architecture))
    options = {"tensor_parallel_size": 2, "plugins": [tmp_path / "mutant.py"], "implementation": "mutant"}
    with tiny.llm(folder, **options) as llm:
        outputs = llm.generate(tiny.prompts(3, shortest=5), GREEDY, use_tqdm=False)
    with pytest.raises(Mismatch):
        compare(tiny.reference(folder), outputs, GREEDY)
