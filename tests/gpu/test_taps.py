"""Taps where steps are graphs and kernels are fused: they run without graphs, and what is fused away is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity.compare import assert_same_until_a_tie, compare
from transformers import AutoModelForCausalLM

from nanoengine import LLM, ParamsError, SamplingParams
from nanoengine.testing.checkpoints import tiny_llama

pytestmark = pytest.mark.gpu
PROMPT = list(range(5, 45))
ATTENTION = "model.layers.1.self_attn.attn"


def test_taps_beside_graphs(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, hidden_size=384)  # head size 64
    options = {"dtype": "float32", "skip_tokenizer_init": True, "max_num_seqs": 4, "kv_cache_memory": 64 << 20}
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(folder, device="cpu", **options) as cpu:
        [expected] = cpu.hidden_states(PROMPT)
        [q, *_] = cpu.tap(PROMPT, [ATTENTION])[0][ATTENTION].inputs
    with LLM(folder, device="cuda", **options) as llm:
        before = llm.generate([PROMPT], params, use_tqdm=False)
        replayed = llm.stats().graph_steps + llm.stats().mixed_graph_steps
        assert replayed > 0
        torch.testing.assert_close(llm.hidden_states(PROMPT)[0], expected, rtol=1e-3, atol=1e-3)
        assert llm.stats().graph_steps + llm.stats().mixed_graph_steps == replayed
        with pytest.raises(ParamsError, match="fuse_kernels=False"):
            llm.tap(PROMPT, [ATTENTION])
        after = llm.generate([PROMPT], params, use_tqdm=False)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        compare(model, [*before, *after], params)
        assert assert_same_until_a_tie(model, before, after, params) > 0
        assert llm.stats().graph_steps + llm.stats().mixed_graph_steps > replayed
    with LLM(folder, device="cuda", fuse_kernels=False, **options) as llm:
        torch.testing.assert_close(llm.tap(PROMPT, [ATTENTION])[0][ATTENTION].inputs[0], q, rtol=1e-3, atol=1e-3)
