"""The Python API on the mock model: forms of input, order, refusals in place, streams, counters, closing."""

from __future__ import annotations

import gc
import re
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanoengine import LLM, NanoEngineError, RequestError, RequestOutput, SamplingParams
from nanoengine.api.errors import ConfigError, EngineClosed, ParamsError, TokenizerMissing
from nanoengine.params.sampling_fields import KEYWORDS_OF_CALLS
from nanoengine.setup import keywords
from nanoengine.testing import mock_model
from nanoengine.testing.mock_model import reference_logits

from .support import VOCAB, greedy, mock_llm, prompts, tokens_of

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture
def llm(tmp_path: Path) -> Any:
    with mock_llm(tmp_path) as made:
        yield made


def test_every_form_of_a_prompt(llm: LLM) -> None:
    ids = [3, 1, 4]
    for form in (ids, [ids], {"prompt_token_ids": ids}, [{"prompt_token_ids": ids}], [tuple(ids)]):
        (output,) = llm.generate(form, GREEDY, use_tqdm=False)  # type: ignore[arg-type]
        assert output.prompt_token_ids == (3, 1, 4)
        assert output.outputs[0].token_ids == greedy(ids, 6)
        assert output.finished
        assert output.outputs[0].finish_reason == "length"
        assert output.outputs[0].text == ""
    for odd in (np.array(ids), torch.tensor(ids), np.array(ids, dtype=np.int32)):
        (output,) = llm.generate([odd], GREEDY, use_tqdm=False)  # type: ignore[list-item]
        assert output.outputs[0].token_ids == greedy(ids, 6)
        assert all(type(token) is int for token in output.prompt_token_ids)
    assert llm.generate([], GREEDY) == []


def test_params_one_each_or_for_all_and_in_order(llm: LLM) -> None:
    asked = prompts(9)
    lengths = [SamplingParams(temperature=0, max_tokens=1 + i) for i in range(9)]
    found = tokens_of(llm.generate(asked, lengths, use_tqdm=False))
    assert found == [greedy(p, 1 + i) for i, p in enumerate(asked)]
    with pytest.raises(ParamsError, match="params has 2 entries for 9 prompts"):
        llm.generate(asked, lengths[:2], use_tqdm=False)
    with pytest.raises(ParamsError, match="priority has 1 entries for 9"):
        llm.generate(asked, GREEDY, priority=[1], use_tqdm=False)


def test_defaults_are_the_generation_config(tmp_path: Path) -> None:
    folder = mock_model.write_mock_checkpoint(tmp_path / "m", eos_token_id=[7, 8])
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8], "temperature": 0, "max_new_tokens": 40}')
    with LLM(folder, attention="mock", load_format="dummy", plugins=[mock_model]) as llm:
        (output,) = llm.generate([1, 2, 3], use_tqdm=False)
        assert output.outputs[0].token_ids == greedy([1, 2, 3], 40, (7, 8))


@pytest.mark.parametrize(
    ("bad", "code", "text"),
    [
        ([], "invalid_prompt", "empty"),
        ([1, VOCAB], "invalid_prompt", r"prompt\[1\] is 97, outside the vocabulary 0..96"),
        ([1, -1], "invalid_prompt", "outside the vocabulary"),
        ([1, "x"], "invalid_prompt", "not a token id"),
        ([True], "invalid_prompt", "not a token id"),
        (None, "invalid_prompt", "NoneType"),
        ({"text": "x"}, "invalid_prompt", "prompt_token_ids"),
        ({"prompt_token_ids": None}, "invalid_prompt", "NoneType"),
        (torch.tensor([1.5, 2.0]), "invalid_prompt", "not a token id"),
        (torch.tensor(3), "invalid_prompt", "Tensor"),
        ([1] * 512, "too_long", "512"),
        ([1] * 700, "too_long", "700"),
    ],
)
def test_a_bad_prompt_is_refused_in_its_place(llm: LLM, bad: Any, code: str, text: str) -> None:
    outputs = llm.generate([[1, 2], bad, [3, 4]], GREEDY, use_tqdm=False)
    assert tokens_of([outputs[0], outputs[2]]) == [greedy([1, 2], 6), greedy([3, 4], 6)]
    refused = outputs[1]
    assert refused.finished
    assert refused.outputs == []
    assert isinstance(refused.error, RequestError)
    assert refused.error.code == code
    assert re.search(text, str(refused.error)), refused.error
    assert llm.stats().free_blocks == llm.stats().num_blocks


def test_a_prompt_larger_than_the_pool_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with mock_llm(tmp_path, num_gpu_blocks_override=4) as llm:
        big, fine = llm.generate([[1] * 17, [2] * 3], GREEDY, use_tqdm=False)
    assert big.error is not None
    assert big.error.code == "does_not_fit"
    assert "17" in str(big.error)
    assert "4" in str(big.error)
    assert fine.outputs[0].token_ids == greedy([2] * 3, 6)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_requests_that_outgrow_the_pool_keep_their_tokens(tmp_path: Path, overlap: bool, count: int) -> None:
    """Those that had yielded, and without overlap all, have no token in flight that tells of their end."""
    asked, params = prompts(count, longest=7), SamplingParams(temperature=0, max_tokens=50)
    outputs: dict[str, RequestOutput] = {}
    with mock_llm(tmp_path, num_gpu_blocks_override=4, overlap=overlap) as llm:
        for i, prompt in enumerate(asked):
            llm.text_engine.add_request(
                str(i), prompt, params, final_only=i == 1, sink=lambda o: outputs.__setitem__(o.request_id, o)
            )
        for _ in range(300):
            llm.engine.advance()
        assert not llm.text_engine.has_unfinished_requests()
    for i, prompt in enumerate(asked):
        one = outputs[str(i)].outputs[0]
        assert (one.finish_reason, one.stop_reason) == ("length", "kv_cache_full")
        assert one.token_ids == greedy(prompt, 50)[: len(one.token_ids)]
        assert len(prompt) + len(one.token_ids) >= 13


def test_invalid_params_raise_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(ParamsError, match=r"temprature.*temperature"):
        llm.generate([[1], [2]], [GREEDY, SamplingParams(temprature=1)], use_tqdm=False)
    assert llm.stats().steps == 0
    assert not llm.text_engine.has_unfinished_requests()


def test_text_needs_a_tokenizer(llm: LLM) -> None:
    for call in (
        lambda: llm.generate("hello", GREEDY, use_tqdm=False),
        lambda: llm.generate([[1], "hello"], GREEDY, use_tqdm=False),
        lambda: llm.generate([{"prompt": "hello"}], GREEDY, use_tqdm=False),
        lambda: llm.chat([{"role": "user", "content": "hello"}], GREEDY, use_tqdm=False),
        lambda: llm.stream("hello", GREEDY),
        lambda: llm.generate([1], SamplingParams(stop="x"), use_tqdm=False),
        llm.get_tokenizer,
    ):
        with pytest.raises(TokenizerMissing):
            call()
    assert not llm.text_engine.has_unfinished_requests()


def test_stop_tokens_and_eos(tmp_path: Path) -> None:
    ids = [5, 6, 7]
    full = greedy(ids, 30)
    with mock_llm(tmp_path, eos=[full[9], 96]) as llm:

        def run(**fields: Any) -> Any:
            return llm.generate(ids, SamplingParams(temperature=0, max_tokens=30, **fields), use_tqdm=False)[0].outputs[
                0
            ]

        first_eos = full.index(full[9])
        eos = run()
        assert (eos.token_ids, eos.finish_reason, eos.stop_reason) == (full[: first_eos + 1], "stop", None)
        assert run(ignore_eos=True).token_ids == full
        stop = run(stop_token_ids=[full[4]])
        at = full.index(full[4])
        assert (stop.token_ids, stop.finish_reason, stop.stop_reason) == (full[: at + 1], "stop", full[4])
        later = run(min_tokens=12)
        assert len(later.token_ids) >= 12
        assert not set(later.token_ids[:12]) & {full[9], 96}


def test_n_samples_differ_share_the_prompt_and_agree_with_their_own_draw(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.5, max_tokens=8, seed=11)
    prompt = prompts(1, shortest=30, longest=30)[0]
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    samples = [o.token_ids for o in output.outputs]
    assert [o.index for o in output.outputs] == [0, 1, 2, 3]
    assert len(set(samples)) == 4
    assert llm.stats().prefix_hit_tokens >= 3 * 28
    assert [o.token_ids for o in llm.generate([prompt], params, use_tqdm=False)[0].outputs] == samples
    one = llm.generate([prompt], SamplingParams(temperature=1.5, max_tokens=8, seed=11), use_tqdm=False)[0]
    assert one.outputs[0].token_ids == samples[0]


def test_logprobs_are_those_of_the_raw_logits(llm: LLM) -> None:
    prompt = [9, 8, 7, 6, 5]
    params = SamplingParams(temperature=0.7, top_k=3, max_tokens=5, logprobs=3, prompt_logprobs=2, seed=1)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    one = output.outputs[0]
    assert one.logprobs is not None
    history, total = list(prompt), 0.0
    for token, found in zip(one.token_ids, one.logprobs, strict=True):
        raw = reference_logits(history, VOCAB).double().log_softmax(0)
        best = raw.topk(3)
        assert found[token].logprob == pytest.approx(float(raw[token]), abs=1e-4)
        assert found[token].rank == 1 + int((raw > raw[token]).sum())
        assert set(best.indices.tolist()) | {token} == set(found)
        total += float(raw[token])
        history.append(token)
    assert one.cumulative_logprob == pytest.approx(total, abs=1e-3)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for i in range(1, len(prompt)):
        raw = reference_logits(prompt[:i], VOCAB).double().log_softmax(0)
        found = output.prompt_logprobs[i]
        assert found is not None
        assert found[prompt[i]].logprob == pytest.approx(float(raw[prompt[i]]), abs=1e-4)
        assert len(found) in (2, 3)


def test_logprobs_zero_is_the_chosen_token_only(llm: LLM) -> None:
    (output,) = llm.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=3, logprobs=0), use_tqdm=False)
    assert [list(d) for d in output.outputs[0].logprobs or ()] == [[t] for t in output.outputs[0].token_ids]


def test_prompt_logprobs_read_no_cache_but_survive_chunks_and_preemption(tmp_path: Path) -> None:
    asked = prompts(6, shortest=18, longest=24, shared=8)
    params = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=0)
    with mock_llm(tmp_path, num_gpu_blocks_override=40, max_num_batched_tokens=9) as llm:
        outputs = llm.generate(asked, params, use_tqdm=False)
        stats = llm.stats()
    assert stats.chunks > 0
    assert stats.preemptions > 0
    for prompt, output in zip(asked, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy(prompt, 20)
        assert output.prompt_logprobs is not None
        assert [None if d is None else list(d)[-1] for d in output.prompt_logprobs] == [None, *prompt[1:]]


def test_streams_run_beside_each_other_and_closing_one_aborts_it(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12)
    first, second, third = (llm.stream([i, i + 1], params) for i in (1, 2, 3))
    seen = [len(next(first).outputs[0].token_ids) for _ in range(3)]
    assert seen == [1, 2, 3]
    next(second)
    second.close()
    (beside,) = llm.generate([[9, 9]], params, use_tqdm=False)
    assert beside.outputs[0].token_ids == greedy([9, 9], 12)
    assert list(third)[-1].outputs[0].token_ids == greedy([3, 4], 12)
    rest = list(first)
    assert rest[-1].outputs[0].token_ids == greedy([1, 2], 12)
    assert rest[-1].finished
    assert list(second) == []
    assert not llm.text_engine.has_unfinished_requests()
    assert llm.stats().free_blocks == llm.stats().num_blocks


def test_a_dropped_stream_gives_its_blocks_back(llm: LLM) -> None:
    stream = llm.stream([1, 2, 3], SamplingParams(temperature=0, max_tokens=400))
    next(stream)
    del stream
    gc.collect()
    llm.generate([[4]], GREEDY, use_tqdm=False)
    assert not llm.text_engine.has_unfinished_requests()


def test_streams_from_several_threads(llm: LLM) -> None:
    asked, found = prompts(6), {}
    params = SamplingParams(temperature=0, max_tokens=20)

    def run(i: int) -> None:
        with llm.stream(asked[i], params) as stream:
            found[i] = list(stream)[-1].outputs[0].token_ids

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(6)] == [greedy(p, 20) for p in asked]


def test_the_engine_under_it(llm: LLM) -> None:
    engine = llm.text_engine
    engine.add_request("a", [1, 2], GREEDY)
    with pytest.raises(RequestError, match="'a' is still running"):
        engine.add_request("a", [1, 2], GREEDY)
    engine.add_request("bad", [], GREEDY)
    engine.abort_request("unknown")
    last = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            before = last.get(output.request_id)
            if before is not None and output.error is None:
                assert len(output.outputs[0].token_ids) >= len(before.outputs[0].token_ids)
            last[output.request_id] = output
    assert last["a"].outputs[0].token_ids == greedy([1, 2], 6)
    assert last["bad"].error is not None
    engine.add_request("a", [1, 2], GREEDY)  # an ended id may be used again
    engine.abort_request("a")
    (aborted,) = engine.step()
    assert aborted.outputs[0].finish_reason == "abort"
    assert engine.step() == []


def test_priority_goes_first(tmp_path: Path) -> None:
    with mock_llm(tmp_path, max_num_seqs=1, scheduling_policy="priority") as llm:
        for name, priority in (("low", 5), ("high", -1), ("mid", 0)):
            llm.text_engine.add_request(name, [1, 2], GREEDY, priority)
        order = []
        while llm.text_engine.has_unfinished_requests():
            order += [o.request_id for o in llm.text_engine.step() if o.finished]
    assert order == ["high", "mid", "low"]


def test_cache_salt_separates(llm: LLM) -> None:
    prompt = prompts(1, shortest=32, longest=32)[0]

    def hits(salt: str | None) -> int:
        return llm.generate([prompt], SamplingParams(temperature=0, cache_salt=salt), use_tqdm=False)[
            0
        ].num_cached_tokens

    assert [hits(None), hits(None), hits("a"), hits("a"), hits("b")] == [0, 28, 0, 28, 0]


def test_resetting_the_prefix_cache(llm: LLM) -> None:
    prompt = prompts(1, shortest=32, longest=32)[0]

    def hits() -> int:
        return llm.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens

    assert [hits(), hits()] == [0, 28]
    llm.reset_prefix_cache()
    assert [hits(), hits()] == [0, 28]
    with llm.stream(prompt, GREEDY) as stream:
        next(stream)
        with pytest.raises(NanoEngineError, match="requests are running"):
            llm.reset_prefix_cache()


def test_a_closed_engine_resets_nothing(tmp_path: Path) -> None:
    with mock_llm(tmp_path) as llm:
        pass
    with pytest.raises(EngineClosed):
        llm.reset_prefix_cache()


def test_metrics_are_in_order(llm: LLM) -> None:
    metrics = llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0].metrics
    assert metrics.first_scheduled is not None
    assert metrics.first_token is not None
    assert metrics.finished is not None
    assert metrics.arrival <= metrics.first_scheduled <= metrics.first_token <= metrics.finished
    assert metrics.num_generated == 6
    assert metrics.ttft is not None
    assert metrics.itl == (metrics.finished - metrics.first_token) / 5


def test_samples_of_one_prompt_do_not_make_the_time_between_tokens_shorter(llm: LLM) -> None:
    metrics = llm.generate([[1, 2, 3]], SamplingParams(n=3, max_tokens=6), use_tqdm=False)[0].metrics
    assert metrics.finished is not None
    assert metrics.first_token is not None
    assert metrics.num_generated == 18
    assert metrics.itl == (metrics.finished - metrics.first_token) / 5


def test_closing_ends_everything(tmp_path: Path) -> None:
    llm = mock_llm(tmp_path)
    stream = llm.stream([1, 2], GREEDY)
    next(stream)
    llm.close()
    llm.close()
    for call in (
        lambda: next(stream),
        lambda: next(stream),
        lambda: llm.generate([[1]], GREEDY),
        lambda: llm.stream([1]),
    ):
        with pytest.raises(EngineClosed):
            call()
    stream.close()


def test_misused_arguments_are_named(llm: LLM) -> None:
    for call, text in (
        (lambda: llm.generate(None, GREEDY), "prompts must be"),
        (lambda: llm.generate(5, GREEDY), "prompts must be"),
        (lambda: llm.generate([1], {"max_tokens": 3}), "must be SamplingParams"),
        (lambda: llm.generate([[1], [2]], "greedy"), "must be SamplingParams"),
        (lambda: llm.generate([1], GREEDY, sampling_params=GREEDY), "two names"),
        (lambda: llm.generate([1], GREEDY, priority="high"), "whole number"),
        (lambda: llm.generate([[1], [2]], GREEDY, priority=[1, 1.5]), "whole number"),
        (lambda: llm.chat("hello", GREEDY), "messages must be"),
        (lambda: llm.chat({"role": "user"}, GREEDY), "messages must be"),
        (lambda: llm.stream([1], {"max_tokens": 3}), "must be SamplingParams"),
        (lambda: llm.stream([1], {}), "must be SamplingParams"),
        (lambda: llm.stream([1], GREEDY, sampling_params=GREEDY), "two names"),
    ):
        with pytest.raises(ParamsError, match=text):
            call()  # type: ignore[no-untyped-call]
    assert llm.stats().steps == 0
    assert not llm.text_engine.has_unfinished_requests()
    (output,) = llm.generate([1, 2], sampling_params=GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == greedy([1, 2], 6)


def test_options_are_checked_by_type(tmp_path: Path) -> None:
    for option, text in (
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be"),
        ({"seed": "a"}, "seed must be"),
        ({"max_num_seqs": "64"}, "max_num_seqs must be"),
        ({"dtype": "fp16"}, "dtype must be"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=text):
            mock_llm(tmp_path, **option)  # type: ignore[arg-type]
    with mock_llm(tmp_path, dtype=torch.float32, device=torch.device("cpu")) as llm:
        llm.generate([1], GREEDY, use_tqdm=False)


def test_counters_after_closing(tmp_path: Path) -> None:
    llm = mock_llm(tmp_path)
    next(llm.stream([1, 2], GREEDY))
    llm.close()
    stats = llm.stats()
    assert stats.running == stats.waiting == 0
    assert stats.free_blocks == stats.num_blocks


def test_public_names_are_there() -> None:
    import nanoengine

    for name in nanoengine.__all__:
        assert getattr(nanoengine, name) is not None
        assert name in dir(nanoengine)


def test_two_engines_in_one_process(tmp_path: Path) -> None:
    with mock_llm(tmp_path) as one, mock_llm(tmp_path, block_size=8) as two:
        a, b = one.stream([1, 2], GREEDY), two.stream([1, 2], GREEDY)
        assert [x.outputs[0].token_ids for x in a] == [x.outputs[0].token_ids for x in b]


def test_wrong_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_num_seq'.*did you mean 'max_num_seqs'"):
        mock_llm(tmp_path, max_num_seq=3)
    with pytest.raises(ConfigError, match="max_model_len is 9999, but the model was made for 512"):
        mock_llm(tmp_path, max_model_len=9999)
    with pytest.raises(ConfigError, match="kv_cache_memory"):
        mock_llm(tmp_path, num_gpu_blocks_override=None, kv_cache_memory=10)
    with pytest.raises(NanoEngineError, match=r"mokc.*mock"):
        LLM(tmp_path / "mock", attention="mokc", load_format="dummy", plugins=[mock_model])


HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda llm: llm.chat(HELLO, temperature=0),
            r"LLM\.chat has no keyword 'temperature'; temperature is a field of SamplingParams: pass "
            r"SamplingParams\(temperature=0\)$",
        ),
        (lambda llm: llm.generate([1], max_tokens=5), r"generate has no .* pass SamplingParams\(max_tokens=5\)"),
        (lambda llm: llm.stream([1], top_p=0.5), r"stream has no .* pass SamplingParams\(top_p=0\.5\)"),
        (lambda llm: llm.stream([1], stop=["a"]), r"pass SamplingParams\(stop=\.\.\.\)"),
        (lambda llm: llm.stream([1], use_tqdm=False), r"use_tqdm is a keyword of LLM\.generate"),
        (lambda llm: llm.chat_prompt(HELLO, use_tqdm=False), r"use_tqdm is a keyword of LLM\.generate"),
        (lambda llm: llm.generate([1], tools=[]), r"tools is a keyword of LLM\.chat"),
        (lambda llm: llm.generate([1], max_model_len=9), r"give it to LLM\(model, max_model_len=9\)"),
        (lambda llm: llm.generate([1], revision="main"), r"give it to LLM\(model, revision='main'\)"),
        (
            lambda llm: llm.generate([1], temprature=0),
            r"did you mean 'temperature'\? temperature is a field of SamplingParams: .* Valid: on_error, params, pr",
        ),
        (lambda llm: llm.generate([1], use_tdqm=0), r"did you mean 'use_tqdm'\? Valid: on_error, params, prio"),
        (lambda llm: llm.generate([1], best_of=2), r"vLLM's 'best_of' is not supported: request n samples"),
        (lambda llm: llm.generate(prompt_token_ids=[[1]]), r"'prompt_token_ids'; token ids are a prompt of"),
        (lambda llm: llm.chat(HELLO, enable_thinking=False), r"a variable of the chat template goes into chat_t"),
        (lambda llm: llm.hidden_states([1], temperature=0), r"hidden_states has no .* pass SamplingParams"),
        (lambda llm: llm.tap([1], module="x"), r"tap has no .*; did you mean 'modules'\? Valid: modules,"),
        (lambda llm: llm.observe(print, observe=print), r"observe has no keyword 'observe'"),
        (lambda llm: llm.stats(reset=True), r"stats has no keyword 'reset'; .*Valid: \(none\)"),
        (lambda llm: llm.close(wait=True), r"close has no keyword 'wait'"),
        (lambda llm: llm.reset_prefix_cache(force=1), r"reset_prefix_cache has no keyword 'force'"),
        (lambda llm: llm.get_tokenizer(fast=1), r"get_tokenizer has no keyword 'fast'"),
        (lambda llm: LLM.from_config("a.yaml", seed=1), r"LLM\.from_config has no keyword 'seed'"),
        (lambda llm: LLM.from_config("a", temperature=0), r'give overrides=\["sampler\.temperature=0"\]$'),
        (lambda llm: LLM.from_config("a", max_num_seqs=8), r'give overrides=\["engine\.max_num_seqs=8"\]$'),
        (lambda llm: LLM.from_config("a", overlap=False), r'give overrides=\["engine\.overlap=false"\]$'),
        (lambda llm: LLM.from_config("a", revision="v1"), r'give overrides=\["model\.revision=v1"\]$'),
        (lambda llm: LLM.from_config("a", attention="torch"), r'give overrides=\["attention=torch"\]$'),
        (lambda llm: LLM.from_config("a", temprature=0), r"did you mean 'temperature'\? .*sampler\.temperature=0"),
        (lambda llm: LLM.from_run_config(None, seed=1), r'give load_config\(path, \["sampler\.seed=1"\]\)$'),
        (lambda llm: llm.chat(HELLO, stream=True), r"stream is a separate method: llm\.stream\(messages, params\)"),
        (lambda llm: llm.generate([1], stream=True), r"stream is a separate method: llm\.stream\(prompt, params\)"),
        (lambda llm: llm.chat(HELLO, add_generation_prompt="x"), r"add_generation_prompt must be True or False"),
        (lambda llm: llm.chat_prompt(HELLO, chat_template_kwargs=["a"]), r"chat_template_kwargs must be a mapping"),
        (lambda llm: llm.chat(HELLO, continue_final_message=1), r"continue_final_message must be True or False"),
        (lambda llm: llm.chat(HELLO, sanitize_control_tokens="no"), r"sanitize_control_tokens must be True or False"),
        (lambda llm: LLM.from_config("a.yaml", plugin=()), r"did you mean 'plugins'\? Valid: overrides, path, plugins"),
    ],
)  # fmt: skip
def test_a_keyword_that_a_method_lacks_is_named_with_its_place(llm: LLM, call: Any, message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        call(llm)
    assert llm.stats().steps == 0
    assert not llm.text_engine.has_unfinished_requests()


def test_a_variable_of_the_template_is_no_option_that_is_a_little_like_it(llm: LLM) -> None:
    with pytest.raises(ParamsError, match=r"goes into chat_template_kwargs=\{'enable_thinking': False\}$") as caught:
        llm.chat(HELLO, enable_thinking=False)  # type: ignore[call-arg]
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("get_default_sampling_params", "it is the attribute default_params"),
        ("llm_engine", "it is the attribute engine"),
        ("abort", "close the stream"),
        ("genrate", "did you mean 'generate'"),
    ],
)
def test_a_member_that_is_not_there_is_named_with_what_to_use(llm: LLM, name: str, message: str) -> None:
    with pytest.raises(AttributeError, match=message):
        getattr(llm, name)
    assert not hasattr(llm, name)


def test_the_repr_of_an_output_is_short_and_has_what_matters(llm: LLM) -> None:
    [output] = llm.generate([list(range(1, 60))], GREEDY.replace(max_tokens=30), use_tqdm=False)
    text = repr(output)
    assert len(text) < 700
    assert "prompt_token_ids=(1, 2, 3, 4, 5, 6, 7, 8, ...), outputs=[CompletionOutput(index=0, " in text
    assert "finish_reason='length'" in text
    assert "logprobs" not in text  # which are None
    assert "error=RequestError('the prompt is empty" in repr(llm.generate([[]], GREEDY, use_tqdm=False)[0])


def test_every_public_method_names_keywords_that_it_lacks(llm: LLM) -> None:
    methods = [name for name, found in vars(LLM).items() if not name.startswith("_") and callable(getattr(llm, name))
               and not isinstance(found, property)]  # fmt: skip
    assert {"generate", "chat", "stream", "tap", "from_run_config"} < set(methods)
    for name in methods:
        with pytest.raises(ParamsError, match=f"^LLM.{name} has no keyword 'sparkle'; "):
            getattr(llm, name)(sparkle=1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": 0}, r"'temperature'; temperature is a field of SamplingParams: pass SamplingParams\(temp"),
        ({"use_tqdm": False}, r"'use_tqdm'; use_tqdm is a keyword of LLM\.generate"),
        ({"temprature": 0}, r"did you mean 'temperature'\? temperature is a field of SamplingParams"),
        ({"atention": "torch"}, r"did you mean 'attention'\? Valid: "),
        ({"max_num_seq": 1}, r"did you mean 'max_num_seqs'\? Valid: "),
    ],
)  # fmt: skip
def test_an_option_that_the_engine_lacks_is_named_with_its_place(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM("no-such-model", **option)


@pytest.mark.parametrize("call", [lambda: SamplingParams(1, 2, 3), lambda: SamplingParams().replace({"top_p": 1})])
def test_sampling_parameters_without_a_name_are_refused_in_words(call: Any) -> None:
    with pytest.raises(ParamsError, match=r"takes keywords only, but .* has no name: write for example"):
        call()


@pytest.mark.parametrize("name", sorted(KEYWORDS_OF_CALLS))
def test_a_call_s_keyword_among_sampling_parameters_is_named(llm: LLM, name: str) -> None:
    with pytest.raises(ParamsError, match=f"no field '{name}'; it is a keyword of LLM"):
        llm.generate([1], SamplingParams(**{name: 1}))
    for method in re.findall(r"LLM\.(\w+)", KEYWORDS_OF_CALLS[name]):
        assert name in keywords._own(getattr(LLM, method))


def test_an_engine_option_among_sampling_parameters_is_named(llm: LLM) -> None:
    with pytest.raises(ParamsError, match=r"no field 'max_model_len'; it is an option of the engine: LLM\(model, max"):
        llm.generate([1], SamplingParams(max_model_len=9))
    with pytest.raises(ParamsError, match=r"no field 'temprature'; did you mean 'temperature'"):
        llm.generate([1], SamplingParams(temprature=0))


def test_processors_of_a_plugin_have_their_fields_named_too(tmp_path: Path) -> None:
    from . import processors_plugin

    with (
        mock_llm(tmp_path, plugins=[processors_plugin]) as llm,
        pytest.raises(ParamsError, match="forbid_last is a field"),
    ):
        llm.generate([1], forbid_last=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("others_step", [False, True])
def test_a_failed_requests_stream_raises_behind_what_came(tmp_path: Path, others_step: bool) -> None:
    from . import processors_plugin

    params = SamplingParams(temperature=0, forbid_last=1, explode_at=5, max_tokens=9)
    with mock_llm(tmp_path, plugins=[processors_plugin]) as llm, llm.stream([1, 2], params) as stream:
        if others_step:  # all that came waits in the stream then
            llm.generate([[3, 4]], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
        lengths: list[int] = []
        with pytest.raises(RequestError, match="exploded on the host") as raised:
            lengths.extend(len(output.outputs[0].token_ids) for output in stream)
        assert lengths == ([3] if others_step else [1, 2, 3])
        assert raised.value.code == "processor_failed"
        assert list(stream) == []
        assert llm.stats().running == 0


def test_a_refused_requests_stream_raises(llm: LLM) -> None:
    with pytest.raises(RequestError, match="the prompt is empty") as raised:
        next(llm.stream([], GREEDY))
    assert raised.value.code == "invalid_prompt"


def test_after_closing_a_stream_nothing_runs(llm: LLM) -> None:
    long = SamplingParams(temperature=0, max_tokens=400)
    stream = llm.stream([1, 2, 3], long)
    next(stream)
    assert llm.stats().running == 1
    stream.close()
    stats = llm.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    for _ in llm.stream([1, 2, 3], long):
        break
    gc.collect()
    assert llm.stats().running == 0
    with llm.stream([4], long), llm.stream([5], long) as kept:
        next(kept)
    assert (llm.stats().running, llm.stats().waiting) == (0, 0)
    assert llm.text_engine.step() == []  # their last outputs go to the closed streams
    assert not llm.text_engine.has_unfinished_requests()
    assert len(llm.hidden_states([[1, 2]])) == 1  # needs an engine without requests


@pytest.mark.parametrize("where", ["launch", "sink"])
def test_after_ctrl_c_nothing_runs(llm: LLM, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    long = SamplingParams(temperature=0, max_tokens=400)

    def interrupt(*_: Any) -> Any:
        monkeypatch.undo()
        raise KeyboardInterrupt

    def generate() -> None:
        llm.generate([[1], [2, 3]], long, use_tqdm=False)

    for streams in (False, True):
        stream = llm.stream([4, 5], long)
        call: Any = partial(list, stream) if streams else generate
        next(stream)
        if where == "launch":
            monkeypatch.setattr(llm.engine._executor, "launch", interrupt)
        else:
            monkeypatch.setattr(llm.engine._requests, "deliver", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call()
        stream.close()
        stats = llm.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert len(llm.hidden_states([[1, 2]])) == 1
        assert tokens_of(llm.generate([[1, 2]], GREEDY, use_tqdm=False)) == [greedy([1, 2], 6)]
        stats = llm.stats()
        assert stats.free_blocks == stats.num_blocks


def test_ctrl_c_closes_the_stream_that_it_met(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = llm.stream([4, 5], SamplingParams(temperature=0, max_tokens=400))
    next(stream)
    other = llm.stream([6], GREEDY)

    def interrupt(*_: Any) -> Any:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine._requests, "deliver", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert llm.stats().running + llm.stats().waiting == 1
    assert list(stream) == []
    assert list(other)[-1].outputs[0].token_ids == greedy([6], 6)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "gone"), SystemExit(3), ValueError("closed")])
def test_a_bar_that_cannot_be_written_costs_no_output(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    class Broken:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise error

        def flush(self) -> None:
            raise error

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Broken())
    monkeypatch.setenv("TERM", "xterm")
    assert tokens_of(llm.generate([[1, 2], [3]], GREEDY)) == [greedy([1, 2], 6), greedy([3], 6)]


def test_a_stream_of_deltas_joins_to_the_whole_whoever_makes_the_steps(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, n=2)
    first, second = llm.stream([1, 2], params, delta=True), llm.stream([3, 4], params, delta=True)
    for stream, prompt in ((first, [1, 2]), (second, [3, 4])):  # the steps of the first make outputs of the second
        found: dict[int, list[int]] = {0: [], 1: []}
        outputs = list(stream)
        assert len(outputs) > 4
        assert outputs[-1].finished
        for output in outputs:
            for sample in output.outputs:
                assert sample.finish_reason is not None or len(sample.token_ids) == 1
                found[sample.index] += sample.token_ids
        assert [tuple(tokens) for tokens in found.values()] == [greedy(prompt, 8)] * 2


def test_log_probs_of_a_prompt_in_chunks_come_with_the_first_token_of_a_stream_of_deltas(tmp_path: Path) -> None:
    """They were dropped with the chunks, which have no token."""
    params, prompt = (
        SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=0),
        prompts(1, shortest=9, longest=9)[0],
    )
    with mock_llm(tmp_path, max_num_batched_tokens=4) as llm:
        first, *rest = llm.stream(prompt, params, delta=True)
        [whole] = llm.generate([prompt], params, use_tqdm=False)
        assert llm.stats().chunks == 4
    assert first.prompt_logprobs == whole.prompt_logprobs
    assert len(first.prompt_logprobs or ()) == 9
    assert [each.prompt_logprobs for each in rest] == [None, None]


@pytest.mark.parametrize("several", [["a", "b"], [[1], [2]], [{"prompt_token_ids": [1]}], ["a"], ([1], [2])])
def test_a_stream_refuses_a_list_of_prompts_in_words(llm: LLM, several: Any) -> None:
    with pytest.raises(ParamsError, match="one prompt, not a list of prompts: for several call generate, or open a"):
        llm.stream(several, GREEDY)
    with pytest.raises(ParamsError, match="tools is for messages"):
        llm.stream([1, 2], GREEDY, tools=[])
    with pytest.raises(ParamsError, match="delta must be True or False"):
        llm.stream([1, 2], GREEDY, delta="yes")  # type: ignore[arg-type]


def test_on_error_raise_raises_the_error_of_the_prompt_and_aborts_the_others(llm: LLM) -> None:
    long = SamplingParams(temperature=0, max_tokens=400)
    with pytest.raises(RequestError, match="the prompt is empty") as raised:
        llm.generate([[1, 2], [], [3]], long, use_tqdm=False, on_error="raise")
    assert raised.value.code == "invalid_prompt"
    assert (llm.stats().running, llm.stats().waiting) == (0, 0)
    assert llm.stats().steps < 50
    outputs = llm.generate([[1, 2], []], GREEDY, use_tqdm=False, on_error="return")
    assert [output.error is None for output in outputs] == [True, False]
    assert tokens_of(llm.generate([[1, 2]], GREEDY, use_tqdm=False, on_error="raise")) == [greedy([1, 2], 6)]
    with pytest.raises(ParamsError, match='on_error must be "return" or "raise", not \'stop\''):
        llm.generate([1], GREEDY, on_error="stop")  # type: ignore[arg-type]


def test_an_llm_shows_its_model_attention_and_length(llm: LLM) -> None:
    assert re.fullmatch(r"<LLM \S+: attention \w+, max_model_len=\d+>", repr(llm)), repr(llm)
