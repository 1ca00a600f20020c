"""Text through the engine: stop strings, bad words, chat, streams; what ends in text has ended in the scheduler."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import decoders

from nanoengine import LLM, ParamsError, SamplingParams
from nanoengine.api.errors import NanoEngineError, RequestError, UnsupportedError, WorkerError
from nanoengine.core.request import Status
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.text.outputs import SampleOutput

from .pair_text import Ended, ids_of, masked_greedy, stopped, text_llm, text_of
from .support import greedy, prompts, tokens_of

LONG = 300  # more tokens than any request here should generate
ASKED = prompts(10, shortest=5, longest=26, seed=11)


def stop_of(prompt: list[int], at: int) -> str:
    """The text of token `at` with a character before and one behind it: it stands over two borders of tokens."""
    tokens = greedy(prompt, at + 3)
    start, end = len(text_of(tokens[:at])), len(text_of(tokens[: at + 1]))
    return text_of(tokens)[max(0, start - 1) : end + 1]


def asked_to_stop(include: bool = False, **more: Any) -> tuple[list[SamplingParams], list[Ended]]:
    """Parameters that stop each of `ASKED` somewhere, the first ones at once; and how each must end."""
    params, ends = [], []
    for i, prompt in enumerate(ASKED):
        stops = [stop_of(prompt, 3 * i % 14), stop_of(prompt, 17), "nowhere"]
        fields = {"stop": stops, "include_stop_str_in_output": include, **more}
        params.append(SamplingParams(temperature=0, max_tokens=LONG, **fields))
        ends.append(stopped(greedy(prompt, 40), stops, include=include, min_tokens=more.get("min_tokens", 0)))
    assert all(end.stop is not None for end in ends)
    return params, ends


def ended(llm: LLM, params: list[SamplingParams]) -> list[Ended]:
    found = []
    for output in llm.generate(ASKED, params, use_tqdm=False):
        assert output.error is None
        (sample,) = output.outputs
        assert sample.finish_reason == "stop"
        assert isinstance(sample.stop_reason, str)
        found.append(Ended(sample.token_ids, sample.text, sample.stop_reason))
    return found


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 2},  # others enter the slots and blocks that a stop string freed
        {"max_num_batched_tokens": 5},  # first tokens come at the edge of a chunk
        {"num_gpu_blocks_override": 90, "max_num_batched_tokens": 16, "max_num_seqs": 4},
    ],
)
def test_stop_strings(tmp_path: Path, options: dict[str, Any], overlap: bool, include: bool) -> None:
    params, ends = asked_to_stop(include)
    with text_llm(tmp_path, overlap=overlap, **options) as llm:
        assert ended(llm, params) == ends
    assert min(len(end.token_ids) for end in ends) <= 2
    assert max(len(end.token_ids) for end in ends) >= 12


def test_a_stop_string_below_min_tokens_does_not_count(tmp_path: Path) -> None:
    params, ends = asked_to_stop(min_tokens=8)
    _, early = asked_to_stop()
    with text_llm(tmp_path) as llm:
        assert ended(llm, params) == ends
    assert sum(end != other for end, other in zip(ends, early, strict=True)) > 2


def test_the_stop_string_named_first_wins(tmp_path: Path) -> None:
    tokens = greedy([1, 2], 10)
    text = text_of(tokens)
    end = len(text_of(tokens[:6]))
    for stops in ([text[end - 3 : end], text[end - 2 : end]], [text[end - 2 : end], text[end - 3 : end]]):
        with text_llm(tmp_path) as llm:
            params = SamplingParams(temperature=0, max_tokens=10, stop=stops)
            (output,) = llm.generate([[1, 2]], params, use_tqdm=False)
        expected = stopped(tokens, stops)
        assert expected.stop == stops[0]
        assert (output.outputs[0].stop_reason, output.outputs[0].text) == (stops[0], expected.text)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("before", [0, 1])
def test_a_stop_string_that_is_a_special_token_stops(tmp_path: Path, before: int, include: bool) -> None:
    """Though the text leaves special tokens out; alone, and behind a word."""
    tokens = greedy([1, 2], 10)
    special = text_of(tokens[4:5])
    stop = text_of(tokens[4 - before : 5])
    assert special not in (text_of([token]) for token in tokens[:4])
    params = SamplingParams(temperature=0, max_tokens=LONG, stop=[stop], include_stop_str_in_output=include)
    with text_llm(tmp_path, specials=[special]) as llm:
        (output,) = llm.generate([[1, 2]], params, use_tqdm=False)
        texts = shown(llm, [1, 2], params)
    sample = output.outputs[0]
    assert (sample.finish_reason, sample.stop_reason, sample.token_ids) == ("stop", stop, tokens[:5])
    assert sample.text == texts[-1] == text_of(tokens[: 4 - before]) + (stop if include else "")
    assert all(texts[-1].startswith(text) for text in texts)


def test_a_stop_string_and_the_length_at_one_token(tmp_path: Path) -> None:
    tokens = greedy([1, 2], 6)
    with text_llm(tmp_path) as llm:
        params = SamplingParams(temperature=0, max_tokens=6, stop=text_of(tokens[4:]))
        (output,) = llm.generate([[1, 2]], params, use_tqdm=False)
    sample = output.outputs[0]
    assert (sample.token_ids, sample.text) == (tokens, text_of(tokens[:4]))
    assert (sample.finish_reason, sample.stop_reason) == ("stop", text_of(tokens[4:]))


# -- the scheduler knows of it ----------------------------------------------------------------------------------------


def driven(llm: LLM, params: list[SamplingParams], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All of `ASKED` until nothing is unfinished: tokens, rows of ended requests at commit, and what is left over."""
    dead, commit = 0, Scheduler.commit

    def spy(self: Scheduler, step: Any, result: Any) -> Any:
        nonlocal dead
        dead += sum(request.status is Status.FINISHED for request, _ in step.rows)
        return commit(self, step, result)

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "commit", spy)
        outputs = llm.generate(ASKED, params, use_tqdm=False)
    stats = llm.stats()
    return {
        "tokens": tokens_of(outputs),
        "dead": dead,
        "steps": stats.steps,
        "running": stats.running,
        "held": stats.num_blocks - stats.free_blocks,
    }


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stopped_sample_leaves_slot_and_blocks_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    params, ends = asked_to_stop()
    with text_llm(tmp_path, overlap=overlap, max_num_seqs=1) as llm:
        seen = driven(llm, params, monkeypatch)
    assert seen["tokens"] == [end.token_ids for end in ends]
    assert (seen["running"], seen["held"]) == (0, 0)
    drawn = sum(len(end.token_ids) for end in ends)
    assert drawn <= seen["steps"] <= drawn + (len(ASKED) if overlap else 0)  # one row run ahead of each stop
    assert (seen["dead"] > 0) == overlap


def _never_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "abort", lambda self, request: None)


def _match_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SampleOutput, "decode", lambda self, new: None)


def test_mutants_of_stopping_are_caught(tmp_path: Path) -> None:
    """A scheduler that is not asked to abort goes on to `LONG`; a match that is ignored gives more tokens."""
    params, ends = asked_to_stop()
    expected, drawn = [end.token_ids for end in ends], sum(len(end.token_ids) for end in ends)
    for mutant, same_tokens in ((_never_finished, True), (_match_ignored, False)):
        with pytest.MonkeyPatch.context() as patch, text_llm(tmp_path, max_num_seqs=2) as llm:
            mutant(patch)
            seen = driven(llm, params, patch)
        assert (seen["tokens"] == expected) == same_tokens, mutant
        assert seen["steps"] > 4 * drawn, mutant
    assert all(len(tokens) == LONG for tokens in seen["tokens"])


# -- streams ----------------------------------------------------------------------------------------------------------


def shown(llm: LLM, prompt: list[int], params: SamplingParams) -> list[str]:
    with llm.stream(prompt, params) as stream:
        return [output.outputs[0].text for output in stream]


def a_long_stop(prompt: list[int]) -> SamplingParams:
    """A stop string of the texts of four tokens, the twelfth to the fifteenth."""
    return SamplingParams(temperature=0, max_tokens=LONG, stop=text_of(greedy(prompt, 15)[11:]))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stream_never_shows_a_part_of_a_stop_string(tmp_path: Path, overlap: bool) -> None:
    with text_llm(tmp_path, overlap=overlap) as llm:
        for prompt in ASKED[:4]:
            expected = stopped(greedy(prompt, 20), [a_long_stop(prompt).stop])
            texts = shown(llm, prompt, a_long_stop(prompt))
            assert texts[-1] == expected.text
            assert all(expected.text.startswith(text) for text in texts)
            assert texts == sorted(texts, key=len)
            assert len(set(texts)) > 5


def test_a_stream_that_holds_nothing_back_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.text import detokenizer

    monkeypatch.setattr(detokenizer._Text, "held", 0)
    with text_llm(tmp_path) as llm:
        texts = shown(llm, ASKED[0], a_long_stop(ASKED[0]))
    assert any(not texts[-1].startswith(text) for text in texts)


# -- text in ----------------------------------------------------------------------------------------------------------


def test_text_prompts_and_one_that_is_no_text(tmp_path: Path) -> None:
    """Half of a surrogate pair is refused in its place, alone."""
    asked = ["A0B1J9C", "\udc80", "H6H7", "9A"]
    with text_llm(tmp_path) as llm:
        outputs = llm.generate(asked, SamplingParams(temperature=0, max_tokens=7), use_tqdm=False)
    refused = outputs.pop(1)
    assert refused.error is not None
    assert refused.error.code == "invalid_prompt"
    assert "not valid Unicode" in str(refused.error)
    for text, output in zip([asked[0], *asked[2:]], outputs, strict=True):
        assert output.prompt == text
        assert list(output.prompt_token_ids) == ids_of(text)
        assert output.outputs[0].token_ids == greedy(ids_of(text), 7)
        assert output.outputs[0].text == text_of(greedy(ids_of(text), 7))


def test_one_bad_conversation_among_good_ones_is_refused_in_its_place(tmp_path: Path) -> None:
    def says(text: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": text}]

    asked: list[Any] = [says("A1"), [{"role": "user"}], says("B2C3"), says("\udc80"), says("D")]
    with text_llm(tmp_path) as llm:
        outputs = llm.chat(asked, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    for i, output in enumerate(outputs):
        if i in (1, 3):
            assert output.error is not None
            assert output.error.code == "invalid_prompt"
            continue
        text = asked[i][0]["content"] + "J9"
        assert output.prompt == text
        assert tokens_of([output]) == [greedy(ids_of(text), 5)]


def test_a_conversation_on_which_the_template_runs_away_fails_alone(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% if m.content == 'A9' %}{{ m.content * 10**9 }}{% endif %}"
    template += "{% if m.content == 'A8' %}" + "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3 + "{% endif %}"
    template += "{% endfor %}"
    asked = [[{"role": "user", "content": text}] for text in ("A1", "A9", "A8", "B2")]
    params = SamplingParams(temperature=0, max_tokens=5)
    with text_llm(tmp_path, chat_template_timeout=2.0, chat_template_memory=64 << 20) as llm:
        outputs = llm.chat(asked, params, chat_template=template, sanitize_control_tokens=True, use_tqdm=False)
    errors = [str(output.error) for output in outputs]
    assert "took more than 64 MiB (chat_template_memory)" in errors[1]
    assert "took longer than 2 s (chat_template_timeout)" in errors[2]
    good = [outputs[0], outputs[3]]
    assert tokens_of(good) == [greedy(ids_of(text), 5) for text in ("A1", "B2")]


def test_a_prompt_far_too_long_is_refused_before_it_is_tokenized(tmp_path: Path) -> None:
    with text_llm(tmp_path, max_model_len=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=5)
        long, good = llm.generate(["A0" * 10**4, "A0B1"], params, use_tqdm=False)
    assert long.error is not None
    assert long.error.code == "too_long"
    assert "at most 512 fit in 64 tokens" in str(long.error)
    assert tokens_of([good]) == [greedy(ids_of("A0B1"), 5)]


def test_a_text_on_which_the_tokenizer_panics_fails_alone(tmp_path: Path) -> None:
    """`Strip` of two at the end of a token of one: the Rust library panics, which is no `Exception`."""
    panics = decoders.Sequence([decoders.Strip("F", 0, 2), decoders.Fuse()])
    params = [SamplingParams(temperature=0, max_tokens=4, allowed_token_ids=[i]) for i in (11, 5, 12)]
    with text_llm(tmp_path, decoder=panics) as llm:
        outputs = llm.generate([[1], [2], [3]], params, use_tqdm=False)
        again = llm.generate([[1]], params[0], use_tqdm=False)
    assert outputs[1].error is not None
    assert outputs[1].error.code == "text_failed"
    assert "PanicException" in str(outputs[1].error)
    assert [output.outputs[0].text for output in (outputs[0], outputs[2], *again)] == ["1111", "2222", "1111"]


def test_words_that_the_tokenizer_refuses_are_an_error_of_the_parameters(tmp_path: Path) -> None:
    with text_llm(tmp_path, max_model_len=64) as llm:
        for fields in ({"bad_words": ["A" * 10**4]}, {"stop": "A" * 10**4}):
            with pytest.raises(ParamsError, match=r"'A+\.\.\.' in the parameters has no tokens: the text has 10000"):
                llm.generate([[1]], SamplingParams(**fields), use_tqdm=False)


# -- what masks tokens ------------------------------------------------------------------------------------------------


def test_bad_words(tmp_path: Path) -> None:
    """A word of one token, and one of two that is forbidden only where its first token stands before it."""
    checked = 0
    with text_llm(tmp_path) as llm:
        for prompt in ASKED:
            free = greedy(prompt, 16)
            words = [text_of(free[2:3]), text_of(free[5:7])]
            if ids_of(words[1]) != list(free[5:7]):
                continue
            params = SamplingParams(temperature=0, max_tokens=16, bad_words=words)
            (found,) = tokens_of(llm.generate([prompt], params, use_tqdm=False))
            assert found == masked_greedy(prompt, 16, bad=words)
            assert found != free
            assert free[2] not in found
            (found,) = tokens_of(llm.generate([prompt], params.replace(bad_words=words[1:]), use_tqdm=False))
            assert found[:6] == free[:6]
            assert found[6] != free[6]
            checked += 1
    assert checked >= 5


STOP_IDS = list(range(0, 97, 3))


def preempted(tmp_path: Path) -> list[tuple[int, ...]]:
    """Requests with `min_tokens`, in a pool so small that they are preempted below it."""
    asked = prompts(8, shortest=6, longest=14)
    params = SamplingParams(temperature=0, max_tokens=24, min_tokens=18, stop_token_ids=STOP_IDS)
    with text_llm(tmp_path, num_gpu_blocks_override=24) as llm:
        found = tokens_of(llm.generate(asked, params, use_tqdm=False))
        assert llm.stats().preemptions > 2
    return found


def test_min_tokens_after_a_preemption(tmp_path: Path) -> None:
    found = preempted(tmp_path)
    expected = [masked_greedy(p, 24, STOP_IDS, 18) for p in prompts(8, shortest=6, longest=14)]
    assert found == expected
    assert any(tokens[-1] in STOP_IDS and len(tokens) < 24 for tokens in found)


def test_min_tokens_lost_at_readmission_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.core.scheduling import draft

    good, original, lost = preempted(tmp_path), draft._new_slots, 0

    def new_slots(new: Any) -> Any:
        nonlocal lost
        made = original(new)
        again = np.diff(made.token_offsets) > made.prompt_lens
        lost += int(again.sum())
        return replace(made, min_lens=np.where(again, 0, made.min_lens).astype(np.int32))

    monkeypatch.setattr(draft, "_new_slots", new_slots)
    bad = preempted(tmp_path)
    assert lost > 2
    assert bad != good
    assert all(bad)


# -- seeds ------------------------------------------------------------------------------------------------------------


def unseeded(tmp_path: Path, seed: int) -> list[tuple[int, ...]]:
    """Six equal requests without a seed, the last one with three samples."""
    params = SamplingParams(temperature=1.5, max_tokens=8)
    with text_llm(tmp_path, seed=seed) as llm:
        outputs = llm.generate([[1, 2, 3]] * 6, [params] * 5 + [params.replace(n=3)], use_tqdm=False)
    return [sample.token_ids for output in outputs for sample in output.outputs]


def are_their_own(find: Callable[[int], list[tuple[int, ...]]]) -> bool:
    first = find(1)
    return len(set(first)) == len(first) == 8 and find(1) == first and not set(find(2)) & set(first)


def test_unseeded_requests_differ_and_repeat_with_the_engines_seed(tmp_path: Path) -> None:
    assert are_their_own(lambda seed: unseeded(tmp_path, seed))


def test_one_seed_for_all_unseeded_requests_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.core import outputs as output

    monkeypatch.setattr(output, "request_seed", lambda engine_seed, ordinal: engine_seed)
    tokens = unseeded(tmp_path, 1)
    assert all(len(row) == 8 for row in tokens)
    assert not are_their_own(lambda seed: unseeded(tmp_path, seed))


@pytest.mark.parametrize("cls", [NanoEngineError, ParamsError, partial(RequestError, "invalid_prompt"),
                                 lambda text: UnsupportedError(text, [text]),
                                 partial(WorkerError, 0, 2, "idle")])  # fmt: skip
def test_any_error_that_quotes_half_a_surrogate_pair_can_be_printed_and_pickled(cls: Any) -> None:
    error = cls("a\ud800é")
    assert "a\\ud800é" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
