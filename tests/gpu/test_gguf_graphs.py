"""A model in the blocks of a GGUF file on a GPU, through graphs, beside the same model dequantised while loading."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_blocks import checkpoint

from nanoengine import LLM, SamplingParams

from .support import ON_GPU, need

pytestmark = pytest.mark.gpu
KINDS = {"q_proj": "Q4_K", "k_proj": "Q6_K", "v_proj": "", "o_proj": "Q5_K", "gate_proj": "Q4_0", "up_proj": "Q4_0"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prompts", [1, 5], ids=["one row", "several rows"])
def test_blocks_in_graphs_give_the_log_probs_of_dequantised_weights(prompts: int, dtype: str, tmp_path: Path) -> None:
    """One row and several; a prompt of 300: a copy in memory. In bfloat16 the weights of one side are rounded."""
    packed, _ = checkpoint(tmp_path, KINDS, tie_word_embeddings=True, max_position_embeddings=512)
    tokens = [[5 + (7 * i + j) % 100 for j in range(300 if i == 0 else 9)] for i in range(prompts)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    found = []
    for quantization in ("auto", "none"):
        options = {**need("triton"), **ON_GPU, "dtype": dtype, "max_model_len": 400}
        with LLM(packed, quantization=quantization, **options) as llm:
            samples = [each.outputs[0] for each in llm.generate(tokens, params, use_tqdm=False)]
            labels = {each.label for each in llm.start_report.quantised}
            assert llm.stats().graph_steps > 0
        found.append((samples, labels))
    (ours, labels), (theirs, none) = found
    assert labels == {"gguf Q4_K + Q6_K + plain", "gguf Q5_K", "gguf Q4_0", "gguf Q4_1"}
    assert none == set()
    for got, want in zip(ours, theirs, strict=True):
        for token, other, mine, its in zip(
            got.token_ids, want.token_ids, got.logprobs or [], want.logprobs or [], strict=True
        ):
            assert mine[token].logprob == pytest.approx(its[other].logprob, abs=5e-4 if dtype == "float32" else 0.05)
            if token != other:  # a near-tie: what follows has another history
                assert dtype == "bfloat16"
                break
