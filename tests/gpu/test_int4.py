"""Checkpoints of AWQ and GPTQ on a GPU, through graphs, equal their dequantised models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quantization import int4_packers as pack

from nanoengine import LLM, SamplingParams

from .support import ON_GPU, assert_graphs, need, write_wide

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
PROMPTS = [[5, 6, 7, 8, 9 + i] for i in range(5)]
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "checkpoint_format": "gptq"}
WIDE_GROUPS = {**AWQ, "group_size": 128}  # those of the kernels in Gluon


@pytest.mark.parametrize("mode", ["triton", "triton eager"])
@pytest.mark.parametrize(
    ("config", "dtype", "bound"),
    [(AWQ, "float32", 5e-4), (GPTQ, "float32", 5e-4), (WIDE_GROUPS, "bfloat16", 0.1)],
    ids=["awq", "gptq, act-order", "awq, bfloat16"],
)
def test_a_checkpoint_equals_its_dequantised_model(
    config: dict[str, Any], dtype: str, bound: float, mode: str, tmp_path: Path
) -> None:
    """One row and several; the products behind norms with a gate, and before the residual stream."""
    act_order = bool(config.get("desc_act"))
    tensors_of = pack.gptq_tensors if act_order else pack.awq_tensors
    source, group = write_wide("llama", tmp_path / "llama"), config["group_size"]
    packed, plain = pack.write(source, tmp_path, config, tensors_of, group, act_order=act_order)
    found = []
    for folder, options in ((plain, {"dtype": "float32", **need("torch")}), (packed, {"dtype": dtype, **need(mode)})):
        with LLM(folder, **ON_GPU, **options) as llm:
            outputs = [
                *llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False),
                *llm.generate(PROMPTS, GREEDY, use_tqdm=False),
            ]
            if folder == packed:
                assert_graphs(llm.stats(), mode)
        found.append([output.outputs[0] for output in outputs])
    for want, got in zip(*found, strict=True):
        pairs = zip(want.token_ids, got.token_ids, want.logprobs or (), got.logprobs or (), strict=True)
        for expected, token, before, after in pairs:
            assert after[token].logprob == pytest.approx(before[expected].logprob, abs=bound)
            if expected != token:  # a near-tie: what follows has another history
                break
