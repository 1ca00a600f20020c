"""What all clients share: merging for slow readers, streams; and the fake that tests of servers use."""

from __future__ import annotations

import asyncio
import gc
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoengine import SamplingParams
from nanoengine.api.deltas import LogprobRows, RequestDelta, SampleDelta
from nanoengine.api.errors import EngineUnavailable, RequestError
from nanoengine.service.client import ClientRequest, DeltaBox, RequestStream
from nanoengine.service.merge import merge, merge_all
from nanoengine.testing.fake_engine import Answer, FakeEngine, scripted


def request(prompt: tuple[int, ...] = (1, 2), request_id: str = "r", **fields: Any) -> ClientRequest:
    return ClientRequest(request_id=request_id, prompt_token_ids=prompt, params=SamplingParams(**fields))


def rows(tokens: list[int], tops: list[int], at: int) -> LogprobRows:
    counts = tops[: len(tokens)]
    return LogprobRows(
        rows=np.zeros(len(tokens), np.int32),
        positions=np.arange(at, at + len(tokens), dtype=np.int32),
        token_ids=np.asarray(tokens, np.int32),
        logprobs=-np.asarray(tokens, np.float32),
        ranks=np.asarray(tokens, np.int32),
        top_ids=np.arange(sum(counts), dtype=np.int32),
        top_logprobs=-np.arange(sum(counts), dtype=np.float32),
        top_offsets=np.cumsum([0, *counts], dtype=np.int32),
    )


def plain(delta: RequestDelta) -> Any:
    """With samples in their order, arrays as lists."""

    def listed(found: LogprobRows | None) -> Any:
        return None if found is None else [getattr(found, name).tolist() for name in found.__slots__]

    samples = sorted((s._replace(logprobs=listed(s.logprobs)) for s in delta.samples), key=lambda s: s.sample_index)
    pooled = None if delta.pooled is None else delta.pooled.tolist()
    return delta._replace(samples=samples, prompt_logprobs=listed(delta.prompt_logprobs), pooled=pooled)


@st.composite
def requests_deltas(draw: Any) -> list[RequestDelta]:
    """The deltas of one request: each sample has tokens, then an end; the last delta is finished or an error."""
    n, with_logprobs = draw(st.integers(1, 3)), draw(st.booleans())
    steps = draw(st.integers(1, 6))
    ends = [draw(st.integers(0, steps - 1)) for _ in range(n)]
    failed = draw(st.booleans())
    found = []
    for step in range(steps):
        samples, last = [], step == steps - 1
        for i in range(n):
            if step > ends[i] or (last and failed):
                continue
            tokens = draw(st.lists(st.integers(0, 9), max_size=3))
            logprobs = rows(tokens, draw(st.lists(st.integers(0, 3), min_size=3, max_size=3)), step)
            ended = ("stop", draw(st.sampled_from([None, 7]))) if step == ends[i] else (None, None)
            samples.append(SampleDelta(i, tuple(tokens), logprobs if with_logprobs else None, *ended))
        found.append(
            RequestDelta(
                "r",
                tuple(samples),
                last,
                rows([step], [2], step) if draw(st.booleans()) else None,
                3,
                step,
                None if failed and steps == 1 else 11,
                1.5 if step else None,
                np.ones(2, np.float32) if last and not failed else None,
                RequestError("step_failed", "broken") if last and failed else None,
            )
        )
    return found


def is_same(left: RequestDelta, right: RequestDelta) -> bool:
    return bool(plain(left) == plain(right))


@given(requests_deltas(), st.data())
def test_any_merging_gives_the_same_final_output(deltas: list[RequestDelta], data: Any) -> None:
    whole = merge_all(deltas)
    parts = list(deltas)
    while len(parts) > 1:  # neighbours in any order, which a reader's pace decides
        at = data.draw(st.integers(0, len(parts) - 2))
        parts[at : at + 2] = [merge(parts[at], parts[at + 1])]
    assert is_same(parts[0], whole)
    for i in {s.sample_index for delta in deltas for s in delta.samples}:
        of_sample = [s for delta in deltas for s in delta.samples if s.sample_index == i]
        merged = next(s for s in whole.samples if s.sample_index == i)
        assert merged.token_ids == tuple(t for s in of_sample for t in s.token_ids)
        assert (merged.finish_reason, merged.stop_reason) == of_sample[-1][-2:]
        if merged.logprobs is not None:
            assert merged.logprobs.token_ids.tolist() == list(merged.token_ids)
            assert merged.logprobs.top_offsets[-1] == len(merged.logprobs.top_ids)
    assert (whole.finished, whole.error) == (deltas[-1].finished, deltas[-1].error)


def test_a_slow_reader_finds_one_delta() -> None:
    async def read() -> list[RequestDelta]:
        box = DeltaBox()
        for token in range(500):
            box.put(RequestDelta("r", (SampleDelta(0, (token,)),), token == 499))
        return [delta async for delta in RequestStream("r", box, lambda index: None)]

    (only,) = asyncio.run(read())
    assert only.samples[0].token_ids == tuple(range(500))
    assert only.finished


def test_a_stream_that_is_dropped_aborts_its_request_and_one_that_ended_does_not() -> None:
    async def drop() -> list[int | None]:
        aborted: list[int | None] = []
        ended, open_box = DeltaBox(), DeltaBox()
        ended.put(RequestDelta("r", finished=True))
        stream = RequestStream("r", ended, aborted.append)
        assert (await anext(stream)).finished
        assert [delta async for delta in stream] == []
        stream.close()
        del stream
        assert aborted == []
        RequestStream("s", open_box, aborted.append).abort_sample(3)
        gc.collect()
        return aborted

    assert asyncio.run(drop()) == [3, None]


def test_closing_a_stream_ends_the_task_that_reads_it() -> None:
    async def close() -> list[RequestDelta]:
        stream = RequestStream("r", DeltaBox(), lambda index: None)

        async def read() -> list[RequestDelta]:
            return [delta async for delta in stream]

        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        stream.close()
        return await asyncio.wait_for(task, 60)

    assert asyncio.run(close()) == []


def test_errors_keep_what_they_say_through_pickle() -> None:
    for error in (RequestError("overloaded", "full", 2.0), EngineUnavailable("gone", 1.5)):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (copy.code, str(copy), copy.retry_after) == (error.code, str(error), error.retry_after)
    assert EngineUnavailable("gone").code == "unavailable"


# The fake


def test_the_fake_answers_dies_and_refuses() -> None:
    async def run() -> None:
        engine = FakeEngine(scripted({(1, 2): [5, 6, 7], (3,): Answer(samples=[[8] * 10], delay=0.001)}))
        deltas = [delta async for delta in await engine.add(request(logprobs=1))]
        assert [s.token_ids for d in deltas for s in d.samples] == [(5,), (6,), (7,)]
        assert deltas[-1].finished
        assert deltas[-1].samples[0].finish_reason == "stop"
        short = merge_all([d async for d in await engine.add(request(max_tokens=2, n=2))])
        assert [(s.token_ids, s.finish_reason) for s in short.samples] == [((5, 6), "length")] * 2
        with pytest.raises(RequestError, match="no prompt"):
            await engine.add(request((9,)))
        stream = await engine.add(request((3,), "slow"))
        await anext(stream)
        engine.die()
        assert [d.error.code for d in [d async for d in stream] if d.error is not None] == ["unavailable"]
        assert not engine.health.alive
        with pytest.raises(EngineUnavailable):
            await engine.add(request())
        engine.revive()
        stream = await engine.add(request((3,), "again"))
        assert (await engine.stats()).requests == 1
        assert await engine.abort("again")
        assert merge_all([d async for d in stream]).samples[0].finish_reason == "abort"
        assert await engine.drain(1)
        assert not engine.health.ready

    asyncio.run(run())
