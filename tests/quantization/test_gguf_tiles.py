"""GGUF models on a CPU by the kernels in C: as in plain torch with inputs that are rounded alike, and near the same
model dequantised."""

from __future__ import annotations

import math
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf_models import MIX, answers, checkpoint, labels
from torch import Tensor

from nanoengine import LLM, SamplingParams
from nanoengine.api.sources import cache_root
from nanoengine.kernels.cpu import NotBuilt, load, twin
from nanoengine.plugins.quantizations import gguf as plugin
from nanoengine.plugins.quantizations.gguf_stores import Blocks
from nanoengine.plugins.quantizations.gguf_tiles import Tiles

pytestmark = pytest.mark.skipif(isinstance(load(cache_root()), NotBuilt), reason="no kernels in C")
TYPES: list[Any] = ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", MIX]


class Rounded(Blocks):
    """Plain torch, with inputs rounded as the kernels round them."""

    def linear(self, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        return super().linear(twin.quantised(x.float()), bias, out=out)


@pytest.mark.parametrize("kinds", TYPES, ids=lambda k: k if isinstance(k, str) else "a mix")
def test_a_model_in_tiles_equals_plain_torch_with_rounded_inputs(
    kinds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, plain = checkpoint(tmp_path, kinds, tie_word_embeddings=True, attention_bias=True)
    got, exact = answers(packed), answers(plain)
    monkeypatch.setattr(plugin, "store_for", lambda layer, weight, kind, *_: Rounded(weight, kind))
    want = answers(packed)
    assert not any("expanded" in label for label in labels(got[2]))
    assert got[1] == pytest.approx(want[1], abs=5e-3)  # a value that falls between two codes may go to either
    assert got[1] == pytest.approx(exact[1], abs=0.2)
    assert got[1] != pytest.approx(exact[1], abs=1e-5)  # inputs are rounded


def test_the_report_counts_the_bytes_of_tiles(tmp_path: Path) -> None:
    """Those of the file's blocks; of the vocabulary's last tile only its own rows."""
    packed, _ = checkpoint(tmp_path, "Q4_1", tie_word_embeddings=True)
    rows = 2 * (256 + 2 * 128 + 256 + 2 * 512) + 131
    assert labels(answers(packed)[2]) == {"gguf Q4_1, inputs rounded to int8": (2 * 4 + 1, rows * 160 + 2 * 256 * 320)}


def test_a_mutant_that_drops_the_norm_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = checkpoint(tmp_path, "Q4_1")
    original = Tiles.norm_linear

    def wrong(self: Tiles, x: Tensor, residual: Any, norm: Any, *rest: Any) -> tuple[Tensor, Tensor]:
        norm.weight.data = torch.ones_like(norm.weight) * 1.5
        return original(self, x, residual, norm, *rest)

    monkeypatch.setattr(Tiles, "norm_linear", wrong)
    assert answers(packed)[1] != pytest.approx(answers(plain)[1], abs=0.2)


def perplexity(folder: Path, **options: Any) -> float:
    """Of the first 500 tokens of each of three packages' descriptions."""
    prompt = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(folder, device="cpu", max_model_len=1024, num_gpu_blocks_override=64, **options) as llm:
        texts = [str(metadata(name).get_payload()) for name in ("torch", "transformers", "pytest")]
        prompts = [llm.get_tokenizer()(text).input_ids[:500] for text in texts]
        found = [
            each[token].logprob
            for ids, output in zip(prompts, llm.generate(prompts, prompt, use_tqdm=False), strict=True)
            for token, each in zip(ids[1:], (output.prompt_logprobs or [])[1:], strict=True)
            if each is not None
        ]
    assert len(found) == 3 * 499
    return math.exp(-sum(found) / len(found))


@pytest.mark.slow
def test_perplexity_is_that_of_the_dequantised_model_within_one_per_cent(smollm2_path: Path) -> None:
    quantised, plain = perplexity(smollm2_path), perplexity(smollm2_path, quantization="none")
    assert 2 < plain < 30
    assert quantised == pytest.approx(plain, rel=0.01)
    assert quantised != plain
