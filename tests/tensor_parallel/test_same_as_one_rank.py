"""Two ranks against transformers and against one rank, float32: tokens, log-probs, prompt log-probs, under pressure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from parity import tiny
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
}
OFTEN = pytest.mark.parametrize("ranks", ["llama", "qwen3 tied"], indirect=True)  # the third differs in its layers only
ASKED = tiny.prompts(10, shared=22, longest=10)


@dataclass
class Ranks:
    """Engines of one and of two ranks over one checkpoint, and transformers' model of it."""

    one: LLM
    two: LLM
    model: PreTrainedModel


@pytest.fixture(scope="module", params=KINDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    folder = tiny.write(request.param, tmp_path_factory.mktemp("tiny"))
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


MUTANT = """
from nanoengine.api import *
from nanoengine.api import hookimpl
from nanoengine.plugins.models.llama import Llama


class Apart(Llama):
    def __init__(self, config, ctx):
        super().__init__(config, ctx)
        down = self.model.layers[1].mlp.down_proj
        down.tp = type("Alone", (), {"size": 1, "rank": down.tp.rank})()


@hookimpl
def register_models():
    return [ModelSpec(name="apart", architectures=("LlamaForCausalLM",), target=f"{__name__}:Apart", api=1)]
"""


def test_a_sum_left_out_is_caught(tmp_path: Path) -> None:
    """The mutant, a plugin file, leaves out one all-reduce of six."""
    folder = tiny.write("llama", tmp_path / "model")
    (tmp_path / "apart.py").write_text(MUTANT)
    options = {"tensor_parallel_size": 2, "plugins": [tmp_path / "apart.py"], "implementation": "apart"}
    with tiny.llm(folder, **options) as llm:
        outputs = llm.generate(tiny.prompts(3, shortest=5), GREEDY, use_tqdm=False)
    with pytest.raises(Mismatch):
        compare(tiny.reference(folder), outputs, GREEDY)
