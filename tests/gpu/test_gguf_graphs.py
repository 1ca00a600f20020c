"""A model in the blocks of a GGUF file on a GPU, through graphs, beside the same model dequantised while loading."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_blocks import checkpoint

from nanoengine import LLM, SamplingParams

from .support import ON_GPU, need

pytestmark = pytest.mark.gpu
KINDS = {"q_proj": "Q4_K", "k_proj": "Q6_K", "v_proj": "", "o_proj": "Q5_K", "gate_proj": "Q4_0", "up_proj": "Q4_0"}


@pytest.mark.parametrize("prompts", [1, 5], ids=["one row", "several rows"])
def test_blocks_in_graphs_give_the_log_probs_of_dequantised_weights(prompts: int, tmp_path: Path) -> None:
    """One row: norm, product and gate in one kernel; several: by tensor cores; a prompt of 300: a copy in memory."""
    packed, _ = checkpoint(tmp_path, KINDS, tie_word_embeddings=True, max_position_embeddings=512)
    tokens = [[5 + (7 * i + j) % 100 for j in range(300 if i == 0 else 9)] for i in range(prompts)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    found = []
    for quantization in ("auto", "none"):
        options = {**need("triton"), **ON_GPU, "dtype": "float32", "max_model_len": 400}
        with LLM(packed, quantization=quantization, **options) as llm:
            samples = [each.outputs[0] for each in llm.generate(tokens, params, use_tqdm=False)]
            labels = {each.label for each in llm.start_report.quantised}
            assert llm.stats().graph_steps > 0
        chosen = [each[t].logprob for s in samples for t, each in zip(s.token_ids, s.logprobs or [], strict=True)]
        found.append(([each.token_ids for each in samples], chosen, labels))
    (ours, ours_chosen, labels), (theirs, theirs_chosen, none) = found
    assert labels == {"gguf Q4_K + Q6_K + plain", "gguf Q5_K", "gguf Q4_0", "gguf Q4_1"}
    assert none == set()
    assert ours == theirs
    assert ours_chosen == pytest.approx(theirs_chosen, abs=5e-4)
