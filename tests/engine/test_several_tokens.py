"""Steps that bring several tokens of a request: its outputs are those of the plain run, in text, ends and log-probs,
and what is counted counts tokens. `test_drafts.py` has the rows, `test_speculation.py` the drafters."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from text.text_zoo import ZOO

from nanoengine import LLM, CompletionOutput, RequestOutput, SamplingParams
from nanoengine.cli.conversation import Conversation
from nanoengine.observe.steps import StepRecord
from nanoengine.testing import mock_model
from nanoengine.testing.mock_model import write_mock_checkpoint
from nanoengine.text.outputs import SampleOutput
from nanoengine.text_engine import TEXT_BLOCK

from .pair_text import stopped, text_llm, text_of
from .support import greedy, prompts
from .test_drafts import Oracle

LONG = 40
ASKED = [[i, *prompt] for i, prompt in enumerate(prompts(8, longest=12))]
WHOLE = [greedy(prompt, LONG) for prompt in ASKED]


def drafting(llm: LLM, whole: Mapping[tuple[int, ...], Sequence[int]], accuracy: float = 1.0) -> Oracle:
    """From here on rows have up to 6 drafts."""
    oracle = Oracle({(prompt, 0): ids for prompt, ids in whole.items()}, tokens=6, accuracy=accuracy)
    llm.engine.scheduler._speculation = llm.engine.scheduler._roster._speculation = oracle
    return oracle


def check_same(plain: CompletionOutput, found: CompletionOutput) -> None:
    for field in ("token_ids", "text", "finish_reason", "stop_reason"):
        assert getattr(plain, field) == getattr(found, field), field
    if plain.logprobs is None:
        assert found.logprobs is None
        assert found.cumulative_logprob is None
        return
    assert found.logprobs is not None
    for a, b in zip(plain.logprobs, found.logprobs, strict=True):  # sums over rows of other numbers round otherwise
        assert a is not None
        assert b is not None
        assert {t: (e.rank, e.decoded_token) for t, e in a.items()} == {
            t: (e.rank, e.decoded_token) for t, e in b.items()
        }
        assert [e.logprob for e in a.values()] == pytest.approx([e.logprob for e in b.values()], abs=1e-5)
    own = [each[t].logprob for each, t in zip(found.logprobs, found.token_ids, strict=True) if each is not None]
    assert found.cumulative_logprob == sum(own)  # exactly: rounded as a sum of one after the other
    assert found.cumulative_logprob == pytest.approx(plain.cumulative_logprob, abs=1e-4)


def endings() -> list[SamplingParams]:
    """Stop strings at each place of a row, over borders of tokens, some with a length or a stop token behind them."""
    found = []
    for i, ids in enumerate(WHOLE):
        text, at = text_of(ids), len(text_of(ids[: 3 + 2 * i]))
        fields: dict[str, Any] = {"stop": [text[at - 1 : at + 1 + i % 3], "nowhere"]}
        if i % 4 == 2:
            fields["stop_token_ids"] = [ids[3 + 2 * i + 2]]
        if i % 4 == 3:
            fields["min_tokens"] = 3 + 2 * i
        found.append(SamplingParams(temperature=0, max_tokens=LONG - i % 2 * 20, logprobs=i % 3 or None, **fields))
    return found


def check_stop_strings(folder: Path, overlap: bool, include: bool, accuracy: float) -> None:
    params = [each.replace(include_stop_str_in_output=include) for each in endings()]
    with text_llm(folder, overlap=overlap) as llm:
        plain = llm.generate(ASKED, params, use_tqdm=False)
        records = list[StepRecord]()
        drafting(llm, {tuple(p): ids for p, ids in zip(ASKED, WHOLE, strict=True)}, accuracy)
        with llm.observe(records.append):
            found = llm.generate(ASKED, params, use_tqdm=False)
        stats = llm.stats()
    rows = [row for record in records for row in record.rows]
    assert {output.outputs[0].finish_reason for output in plain} >= {"stop"}
    dropped = 0
    for one, other in zip(plain, found, strict=True):
        a, b = one.outputs[0], other.outputs[0]
        check_same(a, b)
        drawn = sum(row.new_tokens for row in rows if row.request == f"{other.request_id}/0")
        dropped += drawn - len(b.token_ids)
        assert other.metrics.num_generated == other.metrics.longest == len(b.token_ids)
    assert dropped > 0, "no stop string ended inside of what was accepted"
    assert stats.free_blocks == stats.num_blocks


@pytest.mark.parametrize("accuracy", [0.7, 1.0])
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_stop_string_inside_accepted_drafts_ends_the_output_there(
    tmp_path: Path, overlap: bool, include: bool, accuracy: float
) -> None:
    check_stop_strings(tmp_path, overlap, include, accuracy)


def test_the_plain_run_ends_where_plain_search_says(tmp_path: Path) -> None:
    params = [each for each in endings() if not each.stop_token_ids and each.max_tokens == LONG]
    asked = [(p, ids, each) for p, ids, each in zip(ASKED, WHOLE, endings(), strict=True) if each in params]
    with text_llm(tmp_path) as llm:
        drafting(llm, {tuple(p): ids for p, ids in zip(ASKED, WHOLE, strict=True)})
        found = llm.generate([p for p, _, _ in asked], [each for _, _, each in asked], use_tqdm=False)
    for output, (_, ids, each) in zip(found, asked, strict=True):
        end = stopped(ids, each.stop)
        sample = output.outputs[0]
        assert (sample.token_ids, sample.text, sample.stop_reason) == (end.token_ids, end.text, end.stop)


def the_whole_row_is_kept(patch: pytest.MonkeyPatch) -> None:
    decode = SampleOutput.decode

    def broken(self: SampleOutput, new: Sequence[int]) -> None:
        before = [*self.token_ids]
        decode(self, new)
        self.token_ids[:] = before

    patch.setattr(SampleOutput, "decode", broken)


def logprobs_of_dropped_tokens(patch: pytest.MonkeyPatch) -> None:
    take = SampleOutput.take

    def broken(self: SampleOutput, delta: Any, logprobs: Any) -> None:
        take(self, delta, logprobs)
        if self.finish_reason == "stop" and self.logprobs is not None:
            self.logprobs[len(self.token_ids) :] = logprobs[-1:]

    patch.setattr(SampleOutput, "take", broken)


@pytest.mark.parametrize("mutant", [the_whole_row_is_kept, logprobs_of_dropped_tokens], ids=lambda m: m.__name__)
def test_mutants_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Callable[..., None]) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check_stop_strings(tmp_path, True, False, 1.0)


# Text of every kind of tokenizer


def zoo_llm(folder: Path, name: str) -> LLM:
    """Greedy tokens of the mock model are all over the vocabulary: bytes of half characters, spaces, added tokens."""
    backend, _ = ZOO[name]
    path = write_mock_checkpoint(folder, vocab_size=backend.get_vocab_size(), eos_token_id=None)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    options: dict[str, Any] = {"block_size": 4, "num_gpu_blocks_override": 256}
    return LLM(path, attention="mock", load_format="dummy", plugins=[mock_model], **options)


def streamed(llm: LLM, params: SamplingParams) -> list[list[RequestOutput]]:
    return [list(llm.stream(prompt, params)) for prompt in ZOO_ASKED]


ZOO_ASKED = [[i + 1, 7] for i in range(3)]


@pytest.mark.parametrize("name", ZOO)
def test_a_stream_shows_what_the_plain_run_shows(tmp_path: Path, name: str) -> None:
    """After the same number of tokens the same text, with whatever is held back; fewer outputs; final_only, too."""
    stops = ["a", " t", "é", "日", "\ufffd\ufffd\ufffd\ufffd", "</s>"]
    kinds = [SamplingParams(temperature=0, max_tokens=LONG), SamplingParams(temperature=0, max_tokens=LONG, stop=stops)]
    with zoo_llm(tmp_path, name) as llm:
        plain = [streamed(llm, params) for params in kinds]
        whole = {tuple(p): outputs[-1].outputs[0].token_ids for p, outputs in zip(ZOO_ASKED, plain[0], strict=True)}
        oracle = drafting(llm, whole)
        found = [streamed(llm, params) for params in kinds]
        at_end = [llm.generate(ZOO_ASKED, params, use_tqdm=False) for params in kinds]
    assert oracle.accepted > 50
    for ones, others, finals in zip(plain, found, at_end, strict=True):
        for one, other, final in zip(ones, others, finals, strict=True):
            shown = {len(output.outputs[0].token_ids): output.outputs[0] for output in one}
            assert len(other) <= len(one)
            for output in other:
                check_same(shown[len(output.outputs[0].token_ids)], output.outputs[0])
            check_same(one[-1].outputs[0], other[-1].outputs[0])
            check_same(one[-1].outputs[0], final.outputs[0])
    assert sum(map(len, found[0])) < sum(map(len, plain[0])) // 2


def test_final_only_text_is_decoded_in_blocks_of_several_tokens(tmp_path: Path) -> None:
    """Rows of 7 tokens step over the borders of blocks."""
    length = 3 * TEXT_BLOCK
    whole = {tuple(p): greedy(p, length) for p in ASKED}
    with text_llm(tmp_path) as llm:
        oracle = drafting(llm, whole)
        params = [SamplingParams(temperature=0, max_tokens=length - i) for i in range(len(ASKED))]
        found = llm.generate(ASKED, params, use_tqdm=False)
    assert oracle.accepted > len(ASKED) * length // 2
    for i, (output, ids) in enumerate(zip(found, whole.values(), strict=True)):
        assert output.outputs[0].token_ids == ids[: length - i]
        assert output.outputs[0].text == text_of(ids[: length - i])


def test_an_abort_has_all_tokens_of_a_row(tmp_path: Path) -> None:
    with text_llm(tmp_path, overlap=False) as llm:
        drafting(llm, {tuple(ASKED[0]): WHOLE[0]})
        stream = llm.stream(ASKED[0], SamplingParams(temperature=0, max_tokens=LONG))
        lengths = [len(next(stream).outputs[0].token_ids) for _ in range(3)]
        stream.close()
        llm.engine.apply_inbox()
        assert lengths == [1, 8, 15]
        assert llm.stats().free_blocks == llm.stats().num_blocks


# What is counted


def test_metrics_count_tokens_not_steps(tmp_path: Path) -> None:
    """`itl` is the mean over tokens, also of those that came together."""
    with text_llm(tmp_path) as llm:
        drafting(llm, {tuple(ASKED[0]): WHOLE[0]})
        start, outputs = time.monotonic(), list(llm.stream(ASKED[0], SamplingParams(temperature=0, max_tokens=29)))
    counts = [output.metrics.num_generated for output in outputs]
    assert counts == [1, 8, 15, 22, 29]
    metrics = outputs[-1].metrics
    assert metrics.first_token is not None
    assert metrics.finished is not None
    assert metrics.itl == pytest.approx((metrics.finished - metrics.first_token) / 28)
    assert start <= metrics.arrival <= metrics.first_token <= metrics.finished


def test_chat_shows_each_piece_once_and_counts_tokens(tmp_path: Path) -> None:
    with text_llm(tmp_path) as llm:
        params = SamplingParams(temperature=0, max_tokens=LONG)
        prompt = llm.chat_prompt([{"role": "user", "content": "A0"}])
        drafting(llm, {tuple(prompt): greedy(prompt, LONG)})
        pieces = list[str]()
        talk = Conversation(llm, params)
        answer = talk.ask("A0", pieces.append, lambda: False)
        stopped_at = talk.ask("B1", pieces.append, lambda: len(pieces) > 0)
    assert "".join(pieces).startswith(answer.text) is True
    assert answer.text == text_of(greedy(prompt, LONG))
    assert len(pieces) < LONG // 2
    assert stopped_at.stopped
    assert talk.generated == LONG + len(stopped_at.output.outputs[0].token_ids)
