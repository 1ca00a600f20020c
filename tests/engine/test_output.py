"""Outputs made of deltas: what becomes of several tokens a step, and ranks among equals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanoengine.api.deltas import LogprobRows, RequestDelta, SampleDelta
from nanoengine.core.step import f32, i32
from nanoengine.params.input_processor import CheckedRequest
from nanoengine.params.resolver import ResolvedParams
from nanoengine.text import Tokenizer
from nanoengine.text.outputs import OutputAssembler


def assembler(tokenizer: Tokenizer | None, params: ResolvedParams) -> OutputAssembler:
    return OutputAssembler(CheckedRequest(request_id="r", prompt_token_ids=(1, 2), params=params), tokenizer)


def rows_of(token_ids: list[int], best: list[list[tuple[int, float]]] | None = None) -> LogprobRows:
    """One row a token with log-prob -id / 100; `best`: the likeliest of each row, best first."""
    best = best or [[] for _ in token_ids]
    offsets = [0]
    for row in best:
        offsets.append(offsets[-1] + len(row))
    return LogprobRows(
        rows=i32([0] * len(token_ids)),
        positions=i32(range(2, 2 + len(token_ids))),
        token_ids=i32(token_ids),
        logprobs=f32([-t / 100 for t in token_ids]),
        ranks=i32([1] * len(token_ids)),
        top_ids=i32([t for row in best for t, _ in row]),
        top_logprobs=f32([value for row in best for _, value in row]),
        top_offsets=i32(offsets),
    )


def delta(text: str, reason: Any = None) -> RequestDelta:
    ids = list(text.encode())
    return RequestDelta("r", (SampleDelta(0, tuple(ids), rows_of(ids), reason),), reason is not None)


@pytest.mark.parametrize("reason", [None, "length"])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_amid_a_steps_tokens_cuts_them(tokenizer: Tokenizer, include: bool, reason: Any) -> None:
    made = assembler(tokenizer, ResolvedParams(stop=("cd",), include_stop_str_in_output=include, logprobs=0))
    assert made.take(delta("ab")) == ()
    assert made.output().outputs[0].token_ids == tuple(b"ab")
    assert made.take(delta("xcdyz", reason)) == ((0,) if reason is None else ())
    last = made.output()
    sample = last.outputs[0]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", "cd")
    assert sample.token_ids == tuple(b"abxcd")
    assert sample.text == ("abxcd" if include else "abx")
    assert sample.logprobs is not None
    assert [next(iter(row)) for row in sample.logprobs] == list(b"abxcd")
    assert sample.cumulative_logprob == pytest.approx(-sum(b"abxcd") / 100)
    assert last.finished
    assert last.metrics.num_generated == 5


def test_without_a_match_every_token_of_a_step_counts(tokenizer: Tokenizer) -> None:
    made = assembler(tokenizer, ResolvedParams(stop=("zz",), logprobs=0))
    made.take(delta("xcdyz", "length"))
    last = made.output()
    assert last.outputs[0].token_ids == tuple(b"xcdyz")
    assert last.outputs[0].text == "xcdyz"
    assert last.outputs[0].logprobs is not None
    assert len(last.outputs[0].logprobs) == 5


def test_equals_share_the_lowest_rank() -> None:
    made = assembler(None, ResolvedParams(logprobs=5))
    best = [(7, -0.5), (3, -1.0), (9, -1.0), (4, -1.0), (8, -2.0)]
    rows = rows_of([11], [best])
    rows.ranks[0] = 6
    made.take(RequestDelta("r", (SampleDelta(0, (11,), rows),)))
    output = made.output()
    assert output.outputs[0].logprobs is not None
    (row,) = output.outputs[0].logprobs
    assert {token: each.rank for token, each in row.items()} == {7: 1, 3: 2, 9: 2, 4: 2, 8: 5, 11: 6}
    assert list(row) == [7, 3, 9, 4, 8, 11]


def test_equals_share_the_lowest_rank_through_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits cut to whole numbers are full of equals; ranks are counted anew from the log-probs of all tokens."""
    from nanoengine import SamplingParams
    from nanoengine.testing.mock_model import MockModel

    from .support import mock_llm

    original = MockModel.compute_logits
    monkeypatch.setattr(MockModel, "compute_logits", lambda self, hidden: original(self, hidden).floor())
    with mock_llm(tmp_path, max_logprobs=-1) as llm:
        params = SamplingParams(logprobs=-1, prompt_logprobs=-1, max_tokens=4, seed=1)
        (output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    rows = [*(output.outputs[0].logprobs or ()), *(row for row in output.prompt_logprobs or () if row)]
    assert len(rows) == 4 + 2
    for row in rows:
        values = sorted((each.logprob for each in row.values()), reverse=True)
        assert len(set(values)) < len(values) / 2
        assert all(each.rank == 1 + values.index(each.logprob) for each in row.values())
