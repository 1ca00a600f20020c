"""A request that begins with generated tokens gets those that it would have had: any finished run, cut anywhere and
continued in another engine, is the same output. Bit for bit on the mock model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import decoders

from nanoengine import LLM, RequestOutput, SamplingParams
from nanoengine.api.errors import RequestError
from nanoengine.api.stats import EngineStats
from nanoengine.core import host_states
from nanoengine.core.execution.finish_step import FinishStep
from nanoengine.core.execution.slots import VocabHistory
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.testing.checkpoints import tiny_llama
from nanoengine.testing.invariants import check_scheduler
from nanoengine.text import IncrementalDetokenizer
from nanoengine.text.outputs import SampleOutput
from nanoengine.text.stops import StopMatcher

from . import chain_plugin
from .pair_text import text_llm, text_of
from .support import VOCAB, mock_llm, prompts, tokens_of
from .test_drafts import Oracle
from .test_same_tokens import COUNT, WAYS, seeded

EOS = [3, 40, 41]
PLUGINS = [Path(chain_plugin.__file__)]


class Engines(NamedTuple):
    """The second one has another seed, chunks, drafts, and no run-ahead."""

    first: LLM
    second: LLM


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    options: dict[str, Any] = {"eos": EOS, "plugins": PLUGINS}
    with (
        text_llm(tmp_path_factory.mktemp("first"), **options) as first,
        text_llm(
            tmp_path_factory.mktemp("second"),
            seed=7,
            overlap=False,
            max_num_batched_tokens=11,
            speculation={"method": "ngram", "tokens": 3, "min_n": 1, "min_acceptance": 0.0},
            **options,
        ) as second,
    ):
        yield Engines(first, second)


def run(llm: LLM, prompt: Sequence[int], params: SamplingParams, generated: Any = ()) -> RequestOutput:
    asked = {"prompt_token_ids": prompt, "generated_token_ids": generated}
    (output,) = llm.generate([asked], params, use_tqdm=False)
    return output


def check_same(whole: RequestOutput, rest: RequestOutput, generated: Sequence[Sequence[int]]) -> None:
    """`rest` began with `generated`, and is `whole` otherwise."""
    assert rest.error is None, rest.error
    assert rest.seed == whole.seed
    assert rest.metrics.num_generated == whole.metrics.num_generated - sum(map(len, generated))
    for a, b, ids in zip(whole.outputs, rest.outputs, generated, strict=True):
        assert (a.token_ids, a.text, a.finish_reason, a.stop_reason) == (
            b.token_ids,
            b.text,
            b.finish_reason,
            b.stop_reason,
        )
        assert b.num_given_tokens == len(ids)
        assert (b.num_given_chars == 0) >= (not ids)
        assert b.num_given_chars <= len(b.text)
        if a.logprobs is not None:
            assert b.logprobs is not None
            assert b.logprobs[: len(ids)] == (None,) * len(ids)
            for x, y in zip(a.logprobs[len(ids) :], b.logprobs[len(ids) :], strict=True):
                assert x is not None
                assert y is not None
                assert {t: e.rank for t, e in x.items()} == {t: e.rank for t, e in y.items()}
            own = [x[t].logprob for x, t in zip(a.logprobs, a.token_ids, strict=True) if x is not None]
            assert b.cumulative_logprob == pytest.approx(sum(own[len(ids) :]), abs=1e-4)


def check_cut(
    engines: Engines,
    prompt: Sequence[int],
    params: SamplingParams,
    cuts: Sequence[int],
    mutant: Callable[[pytest.MonkeyPatch], None] | None = None,
) -> None:
    """Run in the first engine; continue behind so many tokens of each sample in the second one."""
    whole = run(engines.first, prompt, params)
    if whole.error is not None:  # `chain` may allow only tokens that min_tokens or bad words forbid
        rest = run(engines.second, prompt, params.replace(seed=whole.seed))
        assert rest.error is not None
        assert (whole.error.code, rest.error.code) == ("nothing_left", "nothing_left"), whole.error
        assert "chain" in params.processor_fields
        return
    generated = [sample.token_ids[:cut] for sample, cut in zip(whole.outputs, cuts, strict=False)]
    asked = params.replace(seed=whole.seed)
    with pytest.MonkeyPatch.context() as patch:
        if mutant is not None:
            mutant(patch)
        rest = run(engines.second, prompt, asked, generated[0] if len(generated) == 1 else generated)
    if all(len(ids) == len(sample.token_ids) for ids, sample in zip(generated, whole.outputs, strict=True)):
        assert rest.error is not None
        assert rest.error.code == "already_ended"
    else:
        check_same(whole, rest, generated)
    check_scheduler(engines.second.engine.scheduler)
    assert engines.second.stats().free_blocks == engines.second.stats().num_blocks


STOPS = st.lists(st.sampled_from(["A", "F", "7", "B0", "C", "1A", "G2H", "33", "nowhere"]), min_size=1, max_size=3)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 3),
    "seed": st.none() | st.integers(-5, 5),
    "temperature": st.sampled_from([0, 0.8, 1.5]),
    "top_k": st.integers(2, 20),
    "top_p": st.sampled_from([0.5, 0.9]),
    "presence_penalty": st.sampled_from([-1.0, 0.7, 1.9]),
    "frequency_penalty": st.sampled_from([-0.5, 1.2]),
    "repetition_penalty": st.sampled_from([0.7, 1.5]),
    "logit_bias": st.just({3: 2.0, 5: 4.0}),
    "min_tokens": st.integers(0, 6),
    "stop": STOPS,
    "include_stop_str_in_output": st.booleans(),
    "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
    "ignore_eos": st.booleans(),
    "bad_words": st.lists(st.sampled_from(["A0", "B", "C1D", "E2"]), min_size=1, max_size=3),
    "logprobs": st.integers(0, 3),
    "chain": st.integers(2, 6),
    "detokenize": st.just(True),
}
PARAMS = st.fixed_dictionaries({"max_tokens": st.integers(6, 20)}, optional=FIELDS).map(lambda f: SamplingParams(**f))


@settings(max_examples=80)
@given_by(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    params=PARAMS,
    cuts=st.lists(st.integers(0, 20), min_size=3, max_size=3),
)
def test_any_run_cut_anywhere_goes_on_the_same(
    engines: Engines, prompt: list[int], params: SamplingParams, cuts: list[int]
) -> None:
    check_cut(engines, prompt, params, cuts)


def test_a_run_with_nothing_left_to_draw_fails_in_both(engines: Engines) -> None:
    """After 93 and 61 the chain allows 3 and 40, which end the output; min_tokens forbids them."""
    params = SamplingParams(max_tokens=6, min_tokens=3, chain=2, temperature=0, logit_bias={93: 90.0, 61: 90.0})
    assert chain_plugin.allowed(chain_plugin.hashed([7, 93, 61]), 2, VOCAB) == [3, 40]
    assert run(engines.first, [7], params).error is not None
    check_cut(engines, [7], params, [0])


# Mutants: what a continuation could forget


def counts_not_rebuilt(patch: pytest.MonkeyPatch) -> None:
    """Given tokens count as prompt."""
    enter = VocabHistory.enter

    def broken(self: VocabHistory, new: Any) -> None:
        enter(self, replace(new, prompt_lens=torch.tensor(new.token_offsets).diff().int().numpy()))

    patch.setattr(VocabHistory, "enter", broken)


def position_off_by_one(patch: pytest.MonkeyPatch) -> None:
    draw_rows = FinishStep._draw_rows
    patch.setattr(FinishStep, "_draw_rows", lambda self, slots, at, how: draw_rows(self, slots, at + 1, how))


def match_lost_at_the_seam(patch: pytest.MonkeyPatch) -> None:
    begin = SampleOutput.begin

    def broken(*args: Any) -> Any:
        sample = begin(*args)
        text: Any = sample.detokenizer
        fresh, fresh._position = StopMatcher(text._text._matcher._stops), text._text._matcher._position
        text._text._matcher = fresh
        return sample

    patch.setattr(SampleOutput, "begin", broken)


def length_from_the_seam(patch: pytest.MonkeyPatch) -> None:
    """max_tokens counts new tokens only."""
    add = Scheduler.add

    def broken(self: Scheduler, request: Any) -> None:
        request.params = replace(request.params, max_tokens=request.params.max_tokens + len(request.output_token_ids))
        add(self, request)

    patch.setattr(Scheduler, "add", broken)


def min_tokens_from_the_seam(patch: pytest.MonkeyPatch) -> None:
    add = Scheduler.add

    def broken(self: Scheduler, request: Any) -> None:
        request.min_len += len(request.output_token_ids)
        add(self, request)

    patch.setattr(Scheduler, "add", broken)


def states_begin_at_the_seam(patch: pytest.MonkeyPatch) -> None:
    start = host_states.supplied_columns

    def broken(step: Any, *args: Any) -> Any:
        for request, _ in step.rows:
            for bound in request.host_states:
                bound.fed = bound.fed or len(request.output_token_ids)
        return start(step, *args)

    patch.setattr("nanoengine.core.engine.supplied_columns", broken)


PROMPT = [4, 5, 6, 4, 9]
PENALTIES = SamplingParams(temperature=0, max_tokens=16, presence_penalty=1.9, frequency_penalty=1.5, ignore_eos=True)
MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], SamplingParams] = {
    counts_not_rebuilt: PENALTIES,
    position_off_by_one: SamplingParams(temperature=1.5, seed=3, max_tokens=12, ignore_eos=True),
    match_lost_at_the_seam: SamplingParams(temperature=1.5, seed=3, max_tokens=16, stop=["?"], ignore_eos=True),
    length_from_the_seam: SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
    min_tokens_from_the_seam: SamplingParams(temperature=1.5, seed=3, max_tokens=16, min_tokens=3),
    states_begin_at_the_seam: SamplingParams(temperature=1.5, seed=3, max_tokens=12, chain=4, ignore_eos=True),
}


def at_a_seam(engines: Engines, params: SamplingParams) -> SamplingParams:
    """With a stop string that begins in a token and ends in the one behind it; with a stop token at an early place."""
    (sample,) = run(engines.first, PROMPT, params.replace(stop=None)).outputs
    if params.stop is not None:
        before = len(engines.first._built.need_tokenizer().hf.decode(sample.token_ids[:9]))
        return params.replace(stop=[sample.text[before - 1 : before + 1]])
    return params.replace(stop_token_ids=[sample.token_ids[5]]) if params.min_tokens else params


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutants_are_caught(engines: Engines, mutant: Callable[[pytest.MonkeyPatch], None]) -> None:
    params = at_a_seam(engines, MUTANTS[mutant])
    caught = 0
    for cut in range(1, len(run(engines.first, PROMPT, params).outputs[0].token_ids)):
        check_cut(engines, PROMPT, params, [cut])
        try:
            check_cut(engines, PROMPT, params, [cut], mutant)
        except AssertionError:
            caught += 1
    assert caught


# Ways to run


CONTINUED: dict[str, Callable[[EngineStats], bool]] = {
    "batch 1": lambda s: s.mixed_steps == 0,
    "no overlap": lambda s: s.steps > 0,
    "chunked": lambda s: s.chunks > 8,
    "mixed": lambda s: s.mixed_steps > 3,
    "budget below rows": lambda s: s.chunks > 6,
    "cached": lambda s: s.prefix_hit_tokens >= 20 * 8,
    "preempted": lambda s: s.preemptions > 0,
    "preempted, chunked, cached": lambda s: s.preemptions > 0 and s.chunks > 0 and s.prefix_hit_tokens > 0,
    "one-token blocks": lambda s: s.steps > 0,
}


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("name", CONTINUED)
def test_in_every_way_of_running(tmp_path: Path, name: str, drafts: bool) -> None:
    """With and without drafts, of which most are right."""
    options, asked, _ = WAYS[name]
    asked = [[i, *prompt] for i, prompt in enumerate(asked)] if drafts else asked  # the oracle goes by the prompt
    params = seeded(len(asked))
    with mock_llm(tmp_path, max_num_seqs=1, enable_prefix_caching=False) as llm:
        whole = tokens_of(llm.generate(asked, params, use_tqdm=False))
    given = [tokens[: 1 + 5 * i % 17] for i, tokens in enumerate(whole)]
    begun = [{"prompt_token_ids": p, "generated_token_ids": ids} for p, ids in zip(asked, given, strict=True)]
    with mock_llm(tmp_path, **options) as llm:
        oracle = Oracle({(tuple(p), 0): ids for p, ids in zip(asked, whole, strict=True)}, tokens=4, accuracy=0.8)
        if drafts:
            llm.engine.scheduler._roster._speculation = llm.engine.scheduler._speculation = oracle
        assert tokens_of(llm.generate(begun, params, use_tqdm=False)) == whole
        stats = llm.stats()
    assert drafts or CONTINUED[name](stats), stats
    assert (oracle.accepted > 0) is drafts
    assert stats.free_blocks == stats.num_blocks


def test_the_engine_that_ran_it_has_its_blocks(tmp_path: Path) -> None:
    """All full ones, of prompt and output. What is left is one token: a decode row is then its first."""
    prompt, records = [7] * 9, list[Any]()
    params = SamplingParams(temperature=1.1, max_tokens=COUNT, ignore_eos=True)
    with mock_llm(tmp_path) as llm:
        whole = run(llm, prompt, params)
        before = llm.stats()
        with llm.observe(records.append):
            rest = run(llm, prompt, params.replace(seed=whole.seed), whole.outputs[0].token_ids[:20])
        after = llm.stats()
    check_same(whole, rest, [whole.outputs[0].token_ids[:20]])
    assert rest.num_cached_tokens == 28
    assert (after.prompt_tokens - before.prompt_tokens, after.prefix_hit_tokens - before.prefix_hit_tokens) == (29, 28)
    assert records[0].num_decode_rows == 1
    assert rest.metrics.first_scheduled is not None
    assert rest.metrics.ttft is not None


def test_an_unseeded_request_needs_the_seed_that_it_had(tmp_path: Path) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True)
    with mock_llm(tmp_path) as llm:
        first, second = llm.generate([[5]] * 2, params, use_tqdm=False)
        given = first.outputs[0].token_ids[:4]
        other = run(llm, [5], params, given)
        same = run(llm, [5], params.replace(seed=first.seed), given)
    assert first.seed != second.seed
    assert first.outputs[0].token_ids != second.outputs[0].token_ids
    assert other.seed not in (first.seed, second.seed)
    assert other.outputs[0].token_ids[:4] == given
    assert other.outputs[0].token_ids != first.outputs[0].token_ids == same.outputs[0].token_ids


def test_a_real_model_goes_on_the_same(tmp_path: Path) -> None:
    """In float32 a chunk rounds otherwise than steps of one token: no near tie lies in these tokens."""
    folder, asked = tiny_llama(tmp_path), prompts(6, shortest=3, longest=30)
    params = [SamplingParams(temperature=i % 3 * 0.6, seed=i, max_tokens=20, ignore_eos=True) for i in range(6)]
    options: dict[str, Any] = {"skip_tokenizer_init": True, "num_gpu_blocks_override": 128, "dtype": "float32"}
    with LLM(folder, device="cpu", max_model_len=128, **options) as llm:
        whole = tokens_of(llm.generate(asked, params, use_tqdm=False))
    begun = [
        {"prompt_token_ids": prompt, "generated_token_ids": ids[: 1 + 3 * i]}
        for i, (prompt, ids) in enumerate(zip(asked, whole, strict=True))
    ]
    with LLM(folder, device="cpu", max_model_len=128, max_num_batched_tokens=16, **options) as llm:
        assert tokens_of(llm.generate(begun, params, use_tqdm=False)) == whole
        assert llm.stats().chunks > 0


# What the outputs hold


@pytest.mark.parametrize("decoder", [None, decoders.Fuse()], ids=["byte level", "window"])
def test_a_stream_starts_behind_the_given_tokens(tmp_path: Path, decoder: Any) -> None:
    """Cumulative outputs have them and their text; deltas start behind `num_given_tokens` and `num_given_chars`."""
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=1, stop=["nowhere"])
    with text_llm(tmp_path, decoder=decoder) as llm:
        whole = run(llm, [5], params)
        given, text = whole.outputs[0].token_ids[:5], whole.outputs[0].text
        outputs = list(llm.stream({"prompt_token_ids": [5], "generated_token_ids": given}, params))
    samples = [output.outputs[0] for output in outputs]
    assert [sample.token_ids for sample in samples] == [whole.outputs[0].token_ids[:i] for i in range(6, 13)]
    assert [output.metrics.num_generated for output in outputs] == list(range(1, 8))
    assert {sample.num_given_tokens for sample in samples} == {5}
    (chars,) = {sample.num_given_chars for sample in samples}
    assert text[:chars] == text_of(given)
    assert samples[-1].text == text
    assert all(text.startswith(sample.text) and len(sample.text) >= chars for sample in samples)
    itl = outputs[-1].metrics.itl
    assert itl is not None


def test_a_sample_that_has_ended_stays_as_it_is(tmp_path: Path) -> None:
    """With n > 1 the others go on; its log-probs are not known again."""
    params = SamplingParams(temperature=1.5, n=3, max_tokens=40, seed=4, logprobs=0, prompt_logprobs=1)
    with mock_llm(tmp_path, eos=list(range(20))) as llm:
        whole = run(llm, [5, 6, 7], params)
        lengths = [len(sample.token_ids) for sample in whole.outputs]
        for cut in lengths:
            generated = [sample.token_ids[:cut] for sample in whole.outputs]
            ended = [len(ids) == n for ids, n in zip(generated, lengths, strict=True)]
            rest = run(llm, [5, 6, 7], params, generated)
            if all(ended):
                assert rest.error is not None
                continue
            check_same(whole, rest, generated)
            assert any(ended)
            assert rest.prompt_logprobs is not None
            assert len(rest.prompt_logprobs) == 3, "the first sample that runs asks for them"
        check_scheduler(llm.engine.scheduler)
    assert len(set(lengths)) == 3
    assert max(lengths) != lengths[0]


def test_an_abort_keeps_the_given_tokens(tmp_path: Path) -> None:
    """Before its first step, and while it is prepared."""
    got = list[RequestOutput]()
    params = SamplingParams(temperature=0, n=2, max_tokens=12)
    with text_llm(tmp_path) as llm:
        llm.text_engine.add_request("a", [5], params, generated=[[7, 8], [9]], sink=got.append)
        llm.engine.abort_request("a")
        llm.text_engine.step()
        state: Any = llm.engine._requests
        state.preparations.submit = lambda jobs, finish: state.preparations.tasks.clear()
        llm.engine._inputs.preparations = lambda given: [lambda: None]  # type: ignore[method-assign]
        llm.text_engine.add_request("b", [5], params, generated=[[7, 8], [9]], sink=got.append)
        llm.engine.abort_request("b")
        llm.text_engine.step()
    assert len(got) == 2
    for output in got:
        assert [sample.token_ids for sample in output.outputs] == [(7, 8), (9,)]
        assert [sample.text for sample in output.outputs] == ["HI", "J"]
        assert {sample.finish_reason for sample in output.outputs} == {"abort"}
        assert output.metrics.num_generated == 0


# What is refused


REFUSED: list[tuple[Any, dict[str, Any], str, str]] = [
    ([1, VOCAB], {}, "invalid_generated", r"generated\[1\] is 97, outside the vocabulary 0\.\.96"),
    ([1, -1], {}, "invalid_generated", r"generated\[1\] is -1, outside the vocabulary"),
    ([1, "x"], {}, "invalid_generated", r"generated\[1\] is 'x', not a token id"),
    ([True], {}, "invalid_generated", r"generated must be token ids, not \[True\]"),
    ([1.5], {}, "invalid_generated", r"generated must be token ids, not \[1\.5\]"),
    ([None, [1]], {"n": 2}, "invalid_generated", r"one for each sample, not \[None, \[1\]\]"),
    ("text", {}, "invalid_generated", "generated must be token ids, not str"),
    ({"a": 1}, {}, "invalid_generated", r"not a dict with \['a'\]"),
    (5, {}, "invalid_generated", "reading the generated tokens raised TypeError"),
    ([[1], [2]], {}, "invalid_generated", r"generated must be token ids, not \[\[1\], \[2\]\]"),
    ([1, 2], {"n": 2}, "invalid_generated", "generated must be a list of 2 lists of token ids, one for each sample"),
    ([[1], [2], [3]], {"n": 2}, "invalid_generated", "a list of 2 lists"),
    ([[1], [2, 99]], {"n": 2}, "invalid_generated", r"generated\[1\]\[1\] is 99, outside the vocabulary"),
    ([1, 50], {"stop_token_ids": [50]}, "already_ended", r"at its token 2 of 2: 50 is a stop token\. Nothing is left"),
    ([1, 50, 2], {"stop_token_ids": [50]}, "already_ended", r"at its token 2 of 3, and 1 more follow: 50 is a stop"),
    ([40], {}, "already_ended", "40 is an end token"),
    ([1, 2, 4], {"max_tokens": 3}, "already_ended", "with 3 tokens it has max_tokens, or reaches max_model_len"),
    ([1, 2, 4, 5], {"max_tokens": 3}, "already_ended", "at its token 3 of 4, and 1 more follow"),
    ([1] * 600, {"max_tokens": None}, "already_ended", "reaches max_model_len"),
    ([0, 9, 1], {"stop": ["JB"]}, "already_ended", "the stop string 'JB' is complete. .* or change the parameter"),
    ([0, 9, 1, 2, 4], {"stop": ["JB"]}, "already_ended", "at its token 3 of 5, and 2 more follow: the stop string"),
    ([[1], [2, 50, 2]], {"n": 2, "stop_token_ids": [50]}, "already_ended", r"generated\[1\] ends the output at its"),
    (
        [[50], [2, 50]],
        {"n": 2, "stop_token_ids": [50]},
        "already_ended",
        "each of generated ends the output at its token 2 of 2",
    ),
]


@pytest.mark.parametrize(("generated", "fields", "code", "message"), REFUSED)
def test_tokens_that_cannot_go_on_are_refused(
    engines: Engines, generated: Any, fields: dict[str, Any], code: str, message: str
) -> None:
    llm = engines.first
    output = run(llm, [5], SamplingParams(**{"temperature": 0, "max_tokens": 700, **fields}), generated)
    assert output.outputs == []
    with pytest.raises(RequestError, match=message) as caught:
        raise output.error or AssertionError("it ran")
    assert caught.value.code == code
    check_scheduler(llm.engine.scheduler)
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)


@pytest.mark.parametrize("generated", [(), [], None, [[]], torch.tensor([], dtype=torch.int64)])
def test_no_generated_tokens_are_none(engines: Engines, generated: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=5)
    assert tokens_of([run(engines.first, [5], params, generated)]) == tokens_of([run(engines.first, [5], params)])


@pytest.mark.parametrize("make", [tuple, iter, torch.tensor, lambda ids: torch.tensor(ids).numpy(), lambda ids: [ids]])
def test_ids_of_any_kind(engines: Engines, make: Callable[[list[int]], Any]) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, seed=1)
    whole = run(engines.first, [5], params)
    check_same(whole, run(engines.first, [5], params, make([*whole.outputs[0].token_ids[:3]])), [(1, 2, 3)])


def test_more_tokens_than_the_cache_holds_are_refused(tmp_path: Path) -> None:
    with mock_llm(tmp_path, num_gpu_blocks_override=8) as llm:
        output = run(llm, [5] * 20, SamplingParams(temperature=0, max_tokens=100), [1] * 20)
    assert output.error is not None
    assert output.error.code == "does_not_fit"
    assert "20 tokens and the 20 generated ones need 10 KV blocks of 4 and the cache has 8" in str(output.error)


def test_a_tokenizer_that_fails_on_given_tokens_fails_their_request_alone(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = IncrementalDetokenizer.push

    def broken(self: IncrementalDetokenizer, token_ids: Any) -> str | None:
        if 11 in token_ids:
            raise ValueError("no text")
        return push(self, token_ids)

    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    fine = run(engines.first, [5], params)
    monkeypatch.setattr(IncrementalDetokenizer, "push", broken)
    for given in ([11, 12], [12, 11]):
        asked = [{"prompt_token_ids": [5], "generated_token_ids": ids} for ids in ((), given)]
        other, failed = engines.first.generate(asked, params, use_tqdm=False)
        assert other.outputs[0].token_ids == fine.outputs[0].token_ids
        assert failed.error is not None
        assert failed.error.code == "text_failed"
        check_scheduler(engines.first.engine.scheduler)
