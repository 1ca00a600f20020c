"""SmolLM2-135M through the engine, its blocks dequantised, beside transformers on the same float32 weights.

That those are transformers' own reading of the GGUF file, bit for bit, is shown by tests/model_sources/test_smollm2.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from nanoengine import LLM, SamplingParams

from . import tiny
from .compare import compare

pytestmark = pytest.mark.slow

TEXT = (
    "The lighthouse keeper climbed the stairs every evening at dusk, lamp in hand, and wrote in his log what the "
    "sea had brought that day: a crate of oranges, a broken oar, the name of a ship that no one in the village "
    "had heard of. Water boils at 100 degrees Celsius at sea level, but at 3,000 metres it boils at about 90, "
    "which is why cooking takes longer in the mountains. def mean(xs): return sum(xs) / len(xs) if xs else 0.0  "
    "# of an empty list: 0\n\n1. Wash the rice. 2. Add two cups of water for each cup of rice. 3. Bring it to "
    "the boil, cover, and wait. In 1969 two men walked on the Moon while a third stayed in orbit; the computer "
    "that took them there had 4 KB of memory. Die Katze liegt auf dem Sofa und schläft. Les feuilles mortes se "
    "ramassent à la pelle. ¿Dónde está la biblioteca? The committee met on Tuesday to discuss the budget, the "
    "new roof, and whether the annual picnic should be held in June or in September, when the weather is cooler "
    "but the evenings are shorter. Plants take in carbon dioxide and give off oxygen in the light. Q: What is "
    "heavier, a kilogram of lead or a kilogram of feathers? A: They weigh the same, of course, although most "
    "people hesitate for a moment before they say so. Dear Ms Alvarez, thank you for your letter of 3 May. We "
    "regret that the item you ordered is out of stock; it will be sent as soon as it is available again."
)
COUNT = 24


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    """Chunked on purpose: eight prompts of 64 tokens under a budget of 96."""
    with LLM(smollm2_path, quantization="none", max_model_len=512, max_num_seqs=8, max_num_batched_tokens=96) as llm:
        yield llm


@pytest.fixture(scope="module")
def model(smollm2_expanded: Path) -> PreTrainedModel:
    return tiny.reference(smollm2_expanded)


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    """Eight of exactly 64 tokens."""
    ids = llm.get_tokenizer()(TEXT).input_ids
    return [ids[i * 36 : i * 36 + 64] for i in range(8)]


def test_greedy_tokens_and_logprobs(llm: LLM, model: PreTrainedModel, prompts: list[list[int]]) -> None:
    assert [len(p) for p in prompts] == [64] * 8
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=3)
    each = [params.replace(prompt_logprobs=1) if i < 4 else params for i in range(8)]
    before = llm.stats()
    outputs = llm.generate(prompts, each, use_tqdm=False)
    after = llm.stats()
    report = compare(model, outputs, each)
    assert report.positions == 8 * COUNT
    assert report.decided >= 0.98 * report.positions
    assert report.logprobs >= 3 * 8 * COUNT
    assert report.prompt_logprobs >= 4 * 63
    assert after.chunks > before.chunks
    assert after.mixed_steps > before.mixed_steps


def test_seeded_tokens_with_prefix_hits(llm: LLM, model: PreTrainedModel, prompts: list[list[int]]) -> None:
    """The second request of each pair finds all of its prompt but the last block in the cache."""
    params = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, seed=11, max_tokens=12, ignore_eos=True)
    llm.generate(prompts[:2], params, use_tqdm=False)
    outputs = llm.generate(prompts[:2], params.replace(seed=12), use_tqdm=False)
    assert [o.num_cached_tokens for o in outputs] == [48, 48]
    report = compare(model, outputs, params.replace(seed=12))
    assert report.positions == 24
    assert report.decided >= 20


def test_a_mutant_is_caught(llm: LLM, model: PreTrainedModel, prompts: list[list[int]]) -> None:
    """The comparer sees a frequency base that is a little off."""
    rotary = llm.model.model.rotary_emb
    good = rotary.inv_freq.clone()
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=1, ignore_eos=True, cache_salt="mutant")
    try:
        with torch.inference_mode():
            rotary.inv_freq.mul_(1.002)
        outputs = llm.generate(prompts[:1], params, use_tqdm=False)
    finally:
        with torch.inference_mode():
            rotary.inv_freq.copy_(good)
    with pytest.raises(AssertionError, match=r"log-prob|token"):
        compare(model, outputs, params)


def test_a_chat_answer_stops_at_eos_and_streams(llm: LLM) -> None:
    prompt = llm.chat_prompt([{"role": "user", "content": "Tell me the capital of France."}])
    params = SamplingParams(temperature=0, max_tokens=40)
    seen = [output.outputs[0] for output in llm.stream(prompt, params)]
    last, tokenizer = seen[-1], llm.get_tokenizer()
    assert last.finish_reason == "stop"
    assert last.stop_reason is None
    assert last.token_ids[-1] == tokenizer.eos_token_id
    assert last.text == "The capital of France is Paris."
    assert last.text == tokenizer.decode(last.token_ids, skip_special_tokens=True)
    texts = [part.text for part in seen]
    assert all(last.text.startswith(text) for text in texts)
    assert [len(text) for text in texts] == sorted(len(text) for text in texts)
    assert len(set(texts)) > 4


def test_text_that_runs_on_past_eos(llm: LLM) -> None:
    """With ignore_eos the answer goes on, its text still growing by prefixes."""
    prompt = llm.chat_prompt([{"role": "user", "content": "Tell me the capital of France."}])
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, skip_special_tokens=False)
    seen = [output.outputs[0] for output in llm.stream(prompt, params)]
    last, tokenizer = seen[-1], llm.get_tokenizer()
    assert last.finish_reason == "length"
    assert tokenizer.eos_token_id in last.token_ids[:-1]
    assert last.text == tokenizer.decode(last.token_ids, skip_special_tokens=False)
    assert all(last.text.startswith(part.text) for part in seen)
