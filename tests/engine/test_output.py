"""The output processor alone: what becomes of several tokens a step, and ranks among equals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanoengine.api.deltas import LogprobRows
from nanoengine.core.outputs import OutputProcessor, RequestState
from nanoengine.core.request import Request
from nanoengine.core.scheduling.messages import Update
from nanoengine.core.step import f32, i32
from nanoengine.params.input_processor import CheckedRequest
from nanoengine.params.sampling_params import ResolvedParams
from nanoengine.text import Tokenizer


def a_request(outputs: OutputProcessor, params: ResolvedParams) -> tuple[RequestState, Request]:
    given = CheckedRequest(request_id="r", prompt_token_ids=(1, 2), params=params)
    state = RequestState(given, 0.0)
    request = Request(id="r/0", parent="r", prompt_token_ids=[1, 2], params=params, seed=0, sample_index=0, arrival=0)
    state.samples.append(outputs.make_sample(request))
    return state, request


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


def step(request: Request, text: str, reason: Any = None) -> Update:
    ids = list(text.encode())
    request.output_token_ids += ids
    return Update(request, tuple(ids), reason, None, rows_of(ids), None)


@pytest.mark.parametrize("reason", [None, "length"])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_amid_a_steps_tokens_cuts_them(tokenizer: Tokenizer, include: bool, reason: Any) -> None:
    outputs = OutputProcessor(tokenizer)
    params = ResolvedParams(stop=("cd",), include_stop_str_in_output=include, logprobs=0)
    state, request = a_request(outputs, params)
    (first,), ended, _ = outputs.apply([step(request, "ab")], {"r": state}, 1.0)
    assert not ended
    assert first.outputs[0].token_ids == tuple(b"ab")
    (last,), ended, _ = outputs.apply([step(request, "xcdyz", reason)], {"r": state}, 2.0)
    sample = last.outputs[0]
    assert ended == [(request, "stop")]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", "cd")
    assert sample.token_ids == tuple(b"abxcd")
    assert sample.text == ("abxcd" if include else "abx")
    assert sample.logprobs is not None
    assert [next(iter(row)) for row in sample.logprobs] == list(b"abxcd")
    assert sample.cumulative_logprob == pytest.approx(-sum(b"abxcd") / 100)
    assert last.finished
    assert last.metrics.num_generated == 5


def test_without_a_match_every_token_of_a_step_counts(tokenizer: Tokenizer) -> None:
    outputs = OutputProcessor(tokenizer)
    state, request = a_request(outputs, ResolvedParams(stop=("zz",), logprobs=0))
    (last,), _, _ = outputs.apply([step(request, "xcdyz", "length")], {"r": state}, 2.0)
    assert last.outputs[0].token_ids == tuple(b"xcdyz")
    assert last.outputs[0].text == "xcdyz"
    assert last.outputs[0].logprobs is not None
    assert len(last.outputs[0].logprobs) == 5


def test_equals_share_the_lowest_rank() -> None:
    outputs = OutputProcessor(None)
    state, request = a_request(outputs, ResolvedParams(logprobs=5))
    best = [(7, -0.5), (3, -1.0), (9, -1.0), (4, -1.0), (8, -2.0)]
    rows = rows_of([11], [best])
    request.output_token_ids.append(11)
    rows.ranks[0] = 6
    (output,), _, _ = outputs.apply([Update(request, (11,), None, None, rows, None)], {"r": state}, 1.0)
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
