"""`LLM.tap` and `LLM.hidden_states` against transformers, and against what attention makes of the tapped q, k, v."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from parity.compare import assert_same_until_a_tie, compare
from transformers import AutoModelForCausalLM

from nanoengine import LLM, EngineClosed, NanoEngineError, ParamsError, RequestError, RequestOutput, SamplingParams
from nanoengine.core.execution.executor import InProcessExecutor
from nanoengine.observe.taps import Capture
from nanoengine.testing.checkpoints import tiny_llama

PROMPT = [7, 3, 99, 12, 45, 45, 8, 120, 61, 2, 77, 30, 5, 18, 64, 100, 9, 1, 33]  # more than a KV block
ATTENTION = "model.layers.1.self_attn.attn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, max_num_batched_tokens=7, skip_tokenizer_init=True) as llm:  # prompts come in chunks
        yield llm


def test_hidden_states_of_every_layer_are_those_of_transformers(llm: LLM, folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = reference(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
    [taps] = llm.tap(PROMPT, ["", "model.embed_tokens", "model.layers.0", "model.layers.1"])
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(taps["model.embed_tokens"].outputs[0], states[0][0], **close)
    for layer in (0, 1):  # a layer gives what is to be added to the residual stream, and the stream
        torch.testing.assert_close(sum(taps[f"model.layers.{layer}"].outputs), states[layer + 1][0], **close)
    torch.testing.assert_close(taps[""].outputs[0], states[-1][0], **close)  # behind the last norm
    assert taps[""].inputs[0].tolist() == PROMPT
    assert taps[""].inputs[1].tolist() == list(range(len(PROMPT)))
    torch.testing.assert_close(llm.hidden_states([PROMPT, PROMPT[:4]])[1], states[-1][0, :4], **close)


def test_q_k_v_are_those_that_attention_compares(llm: LLM) -> None:
    tap = llm.tap(PROMPT, [ATTENTION])[0][ATTENTION]
    q, k, v = (x.transpose(0, 1)[None] for x in tap.inputs)  # [1, heads, T, size]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(tap.outputs[0], out[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_the_prefix_cache_is_not_read_and_not_spoilt(llm: LLM, folder: Path) -> None:
    params = SamplingParams(max_tokens=8, temperature=0)
    [before] = llm.generate([PROMPT], params, use_tqdm=False)
    hits = llm.stats().prefix_hit_tokens
    assert len(llm.hidden_states(PROMPT)[0]) == len(PROMPT)
    assert llm.stats().prefix_hit_tokens == hits
    [after] = llm.generate([PROMPT], params, use_tqdm=False)
    assert llm.stats().prefix_hit_tokens > hits
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    compare(model, [before, after], params)
    assert assert_same_until_a_tie(model, [before], [after], params) > 0


def test_a_dead_row_that_still_runs_is_not_captured(llm: LLM) -> None:
    """Behind a stop token the next step is already launched: it ends before anybody listens."""
    [output] = llm.generate([PROMPT], SamplingParams(max_tokens=8, temperature=0), use_tqdm=False)
    stop = SamplingParams(max_tokens=8, temperature=0, stop_token_ids=[output.outputs[0].token_ids[2]])
    llm.generate([PROMPT], stop, use_tqdm=False)
    assert len(llm.hidden_states([5, 6])[0]) == 2


def test_tensors_are_copies_and_ordinary_ones(llm: LLM) -> None:
    first = llm.hidden_states(PROMPT)[0]
    kept = first.clone()
    llm.hidden_states(PROMPT[::-1])
    assert torch.equal(first, kept)
    first += 1  # no inference tensor
    assert not llm.model._forward_hooks  # nothing listens any more


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (["model.layer.0"], "did you mean 'model.layers.0'"),
        (["model.layers.0.mlp.down_proj"], "does not run by itself"),
        (["lm_head"], "did not run once a token"),
        (ATTENTION, "must be a list"),
    ],
)
def test_mistakes(llm: LLM, modules: list[str], words: str) -> None:
    if "lm_head" in modules:  # it is called once a prompt, and here each chunk is no prompt
        modules = ["lm_head"]
    with pytest.raises(ParamsError, match=words):
        llm.tap(PROMPT, modules)
    assert len(llm.hidden_states(PROMPT)[0]) == len(PROMPT)


def test_of_all_modules_the_nearest_are_named(llm: LLM) -> None:
    count = len(dict(llm.model.named_modules()))
    with pytest.raises(ParamsError) as caught:
        llm.tap(PROMPT, ["model.layer.0.mpl"])
    near = r"did you mean '[\w.]*mlp[\w.]*'( or '[\w.]+'){0,2}\? "
    assert re.fullmatch(rf".*; {near}llm\.model\.named_modules\(\) lists all {count}", str(caught.value))
    with pytest.raises(ParamsError, match=rf"no module 'zzz'; llm\.model\.named_modules\(\) lists all {count}$"):
        llm.tap(PROMPT, ["zzz"])


def test_prompts_that_cannot_be_served_raise(llm: LLM) -> None:
    with pytest.raises(RequestError, match="vocabulary"):
        llm.hidden_states([5000])
    with llm.stream(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True)) as stream:
        next(stream)
        with pytest.raises(NanoEngineError, match="requests are running"):
            llm.hidden_states(PROMPT)
    next(iter(llm.generate([PROMPT], SamplingParams(max_tokens=1), use_tqdm=False)))
    assert len(llm.hidden_states(PROMPT)[0]) == len(PROMPT)


def test_a_closed_engine_says_so(folder: Path) -> None:
    with LLM(folder, skip_tokenizer_init=True) as llm:
        pass
    with pytest.raises(EngineClosed):
        llm.hidden_states(PROMPT)
    with pytest.raises(EngineClosed):
        _ = llm.model


def test_other_threads_make_no_step_meanwhile(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of another thread's request would be captured as the prompt's own."""
    call, others = InProcessExecutor.call, []

    def interfering(self: InProcessExecutor, name: str, *args: Any) -> Any:
        found = call(self, name, *args)
        if name.endswith(":start_capture"):
            llm.text_engine.add_request("other", [3, 4], SamplingParams(max_tokens=2), sink=others.append)
            stepping = Thread(target=llm.engine.step)
            stepping.start()
            stepping.join(0.2)
            assert stepping.is_alive()
            llm.engine.abort_request("other")
            threads.append(stepping)
        return found

    threads: list[Thread] = []
    monkeypatch.setattr(InProcessExecutor, "call", interfering)
    assert len(llm.hidden_states(PROMPT)[0]) == len(PROMPT)
    threads[0].join(60)
    assert not threads[0].is_alive()
    assert others[0].outputs[0].finish_reason == "abort"


def test_requests_of_other_threads_wait_meanwhile(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    call = InProcessExecutor.call
    params = SamplingParams(max_tokens=2)
    others: list[RequestOutput] = []
    adding = Thread(target=lambda: others.extend(llm.generate([[3, 4]], params, use_tqdm=False)))

    def interfering(self: InProcessExecutor, name: str, *args: Any) -> Any:
        found = call(self, name, *args)
        if name.endswith(":start_capture"):
            adding.start()
            adding.join(0.2)
        return found

    monkeypatch.setattr(InProcessExecutor, "call", interfering)
    assert len(llm.hidden_states(PROMPT)[0]) == len(PROMPT)
    adding.join(60)
    assert len(others[0].outputs[0].token_ids) == 2


def test_mutant_that_keeps_the_originals_is_seen(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without copies the next layer's in-place work, or the next chunk's inputs, show up in what was kept."""
    monkeypatch.setattr(
        "nanoengine.observe.taps._copies",
        lambda values: tuple(v for v in (values if isinstance(values, tuple) else (values,)) if torch.is_tensor(v)),
    )
    taps = llm.tap(PROMPT, [""])[0]
    assert taps[""].inputs[0].tolist() != PROMPT
    assert Capture  # the class under test


@pytest.mark.slow
def test_two_ranks_give_the_same_states(llm: LLM, folder: Path) -> None:
    options = {"device": "cpu", "tensor_parallel_size": 2, "skip_tokenizer_init": True}
    with LLM(folder, max_num_batched_tokens=7, **options) as ranks:
        [states] = ranks.hidden_states(PROMPT)
        [taps] = ranks.tap(PROMPT, [ATTENTION])
        with pytest.raises(ParamsError, match=r"did you mean 'model\.layers\.0'"):  # the ranks live on
            ranks.tap(PROMPT, ["model.layer.0"])
        assert len(ranks.hidden_states([7])[0]) == 1
    torch.testing.assert_close(states, llm.hidden_states(PROMPT)[0], rtol=1e-4, atol=1e-5)
    assert taps[ATTENTION].inputs[0].shape == (len(PROMPT), 3, 8)  # rank 0's heads
