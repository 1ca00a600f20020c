"""An engine ends and another takes its place: streams go on, with the tokens of a run that nothing disturbed."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoengine import LLM, RequestOutput, SamplingParams
from nanoengine.api.deltas import RequestDelta
from nanoengine.api.errors import EngineUnavailable
from nanoengine.service import resume, trials
from nanoengine.service.client import ClientRequest, RequestStream
from nanoengine.service.connection import Connection
from nanoengine.service.loop import EngineService
from nanoengine.service.merge import merge_all
from nanoengine.service.output_stream import OutputStream
from nanoengine.service.parts import service_of
from nanoengine.service.remote import RemoteClient
from nanoengine.service.resume import OpenStream
from nanoengine.service.text import checked_on_this_side
from nanoengine.testing import mock_model
from nanoengine.testing.byte_tokenizer import END, write_byte_tokenizer
from nanoengine.testing.mock_model import write_mock_checkpoint
from nanoengine.text.outputs import OutputAssembler
from tests.engine.support import VOCAB, greedy, prompts
from tests.service.support import request, until, whole
from tests.service.test_client import plain


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one client: what it tries alone need not wait for others."""
    monkeypatch.setattr(trials, "_APART_SECONDS", 0.0)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = write_mock_checkpoint(tmp_path_factory.mktemp("mock"), vocab_size=VOCAB, max_position_embeddings=4096)
    options: dict[str, Any] = {"max_num_seqs": 8, "block_size": 4, "num_gpu_blocks_override": 2048}
    with LLM(folder, attention="mock", load_format="dummy", plugins=[mock_model], **options) as made:
        yield made


class Engines:
    """One engine after the other, for one client. The mock engine underneath is the same, without its cache."""

    def __init__(self, llm: LLM, client: RemoteClient) -> None:
        self._llm, self._client = llm, client
        self.service: EngineService | None = None
        self._connection: Connection | None = None
        self.started = 0

    def start(self) -> None:
        self.service = service_of(self._llm)
        self.service.start()
        self.connect()
        self.started += 1

    def connect(self) -> None:
        assert self.service is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection = Connection(self.service, theirs, lambda connection: None)
        self._client.connect(ours)

    def part(self) -> None:
        """The connection ends, and the engine goes on."""
        assert self._connection is not None
        self._connection.close("a test")

    async def kill(self) -> None:
        """As SIGKILL: what was not sent is lost."""
        assert self._connection is not None
        assert self.service is not None
        self._connection.close(None)
        await asyncio.to_thread(self.service.stop)
        while self._llm.engine.has_unfinished_requests():
            self._llm.engine.advance()
        self._llm.reset_prefix_cache()


def undisturbed(llm: LLM, asked: list[ClientRequest]) -> list[RequestDelta]:
    async def main() -> list[RequestDelta]:
        client = RemoteClient()
        engines = Engines(llm, client)
        engines.start()
        await client.ready()
        streams = [await client.add(each) for each in asked]
        found = list(await asyncio.gather(*map(whole, streams)))
        await client.close()
        await engines.kill()
        return found

    return asyncio.run(main())


def disturbed(llm: LLM, asked: list[ClientRequest], kills: int, seed: int = 0) -> tuple[list[RequestDelta], int]:
    """The same requests, while so many engines die at random. Returns also how many streams were open then."""
    rng = random.Random(seed)

    async def main() -> tuple[list[RequestDelta], int]:
        client, continued = RemoteClient(), 0
        engines = Engines(llm, client)
        engines.start()
        await client.ready()
        streams = await asyncio.gather(*map(client.add, asked))  # at once, or some end before the others begin
        reading = [asyncio.create_task(whole(stream)) for stream in streams]
        for _ in range(kills):
            assert engines.service is not None
            steps = engines.service.stats().steps + rng.randrange(1, 12)
            await until(lambda steps=steps: engines.service.stats().steps >= steps or not client._open)
            await engines.kill()
            continued += len(client._open)
            await until(lambda: not client.health.alive)
            with pytest.raises(EngineUnavailable):
                await client.add(request("refused", [1]))
            engines.start()
        found = list(await asyncio.wait_for(asyncio.gather(*reading), 60))
        await client.close()
        await engines.kill()
        return found, continued

    return asyncio.run(main())


def test_a_stream_goes_on_where_its_connection_breaks_and_its_engine_lives(llm: LLM) -> None:
    asked = [request(str(i), [i + 1], max_tokens=300, ignore_eos=True, temperature=1.0, seed=i) for i in range(4)]
    expected = undisturbed(llm, asked)

    async def main() -> list[RequestDelta]:
        client = RemoteClient()
        engines = Engines(llm, client)
        engines.start()
        await client.ready()
        reading = [asyncio.create_task(whole(await client.add(each))) for each in asked]
        await until(lambda: engines.service is not None and engines.service.stats().steps > 10)
        engines.part()
        await until(lambda: not client.is_connected)
        assert len(client._open) == 4
        engines.connect()
        found = list(await asyncio.wait_for(asyncio.gather(*reading), 60))
        await client.close()
        await engines.kill()
        return found

    found = asyncio.run(main())
    assert [each.samples for each in found] == [each.samples for each in expected]


def test_an_engine_in_the_place_of_one_that_drained_takes_nothing_new(llm: LLM) -> None:
    async def main() -> None:
        client = RemoteClient()
        engines = Engines(llm, client)
        engines.start()
        await client.ready()
        asked = request("open", [1, 2, 3], max_tokens=2000, ignore_eos=True)
        stream = await client.add(asked)
        assert not await client.drain(0.01)
        await engines.kill()
        await until(lambda: not client.health.alive)
        engines.start()
        await client.ready()
        assert engines.service is not None
        await until(lambda: engines.service is not None and engines.service.is_draining)
        assert client.health.draining
        with pytest.raises(EngineUnavailable, match="draining"):
            await client.add(request("new", [1]))
        assert (await whole(stream)).finished, "what was open goes on"
        await client.close()
        await engines.kill()

    asyncio.run(main())


def test_requests_that_pool_begin_again_in_another_engine(llm: LLM) -> None:
    """Most wait or are in their prompts when an engine dies: there is nothing that they could go on behind."""
    asked = [
        ClientRequest(request_id=f"v{i}", prompt_token_ids=tuple([i] * 4000), params=SamplingParams(), pooling="last")
        for i in range(1, 33)
    ]
    wanted = [delta.pooled for delta in undisturbed(llm, asked)]
    found, continued = disturbed(llm, asked, kills=2)
    assert continued >= 4
    for delta, want in zip(found, wanted, strict=True):
        assert delta.error is None
        assert delta.pooled is not None
        assert want is not None
        assert delta.pooled.tolist() == want.tolist()


_PARAMS: list[dict[str, Any]] = [
    {"seed": 4},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 1.0, "seed": 5, "n": 3},
    {"temperature": 1.0, "seed": 6, "n": 3, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 0.7, "seed": 7, "min_tokens": 20, "stop_token_ids": list(range(0, VOCAB, 3))},
    {
        "temperature": 1.3,
        "seed": 8,
        "n": 2,
        "min_tokens": 20,
        "stop_token_ids": list(range(0, VOCAB, 9)),
        "logprobs": 0,
    },
    {"temperature": 1.0, "seed": 9, "repetition_penalty": 1.5, "presence_penalty": 0.5},
]


@pytest.mark.parametrize("fields", _PARAMS, ids=str)
def test_a_stream_goes_on_unbroken_in_another_engine(llm: LLM, fields: dict[str, Any]) -> None:
    given = prompts(6, shortest=3, longest=30, seed=3)
    asked = [request(f"r{i}", prompt, **{"max_tokens": 40, **fields}) for i, prompt in enumerate(given)]
    expected = undisturbed(llm, asked)
    found, continued = disturbed(llm, asked, kills=3)
    assert continued >= 6  # streams that were open when an engine died
    for got, wanted in zip(found, expected, strict=True):
        assert same(got) == same(wanted)


@pytest.mark.parametrize("mutant", [{"generated": ()}, {"seed": 1}, {}], ids=["no tokens", "another seed", "none"])
def test_the_comparison_sees_a_stream_that_does_not_go_on(
    llm: LLM, mutant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = OpenStream.resumed

    def wrong(stream: OpenStream, now: float) -> ClientRequest | None:
        asked = resumed(stream, now)
        assert asked is not None
        if "seed" in mutant:
            return replace(asked, params=asked.params.replace(seed=99))
        return replace(asked, **mutant)

    monkeypatch.setattr(OpenStream, "resumed", wrong)
    asked = [request(f"r{i}", [i + 1, 5], max_tokens=60, temperature=1.0, seed=5) for i in range(4)]
    found, continued = disturbed(llm, asked, kills=1)
    assert continued
    is_equal = [same(got) for got in found] == [same(wanted) for wanted in undisturbed(llm, asked)]
    assert is_equal == (not mutant)


def same(delta: RequestDelta) -> Any:
    """Without what says when it ran, and in which row of a step."""
    found = plain(delta._replace(first_scheduled=None, num_computed_tokens=0, num_cached_tokens=0))

    def without_rows(listed: Any) -> Any:
        return None if listed is None else listed[1:]

    samples = [sample._replace(logprobs=without_rows(sample.logprobs)) for sample in found.samples]
    return found._replace(samples=samples, prompt_logprobs=without_rows(found.prompt_logprobs))


def test_a_seed_that_the_first_engine_made_is_that_of_the_next(llm: LLM) -> None:
    asked = [request(f"r{i}", [i + 1, 2], max_tokens=60, temperature=1.0) for i in range(4)]
    found, continued = disturbed(llm, asked, kills=2, seed=4)
    assert continued
    seeds = [delta.seed for delta in found]
    assert len(set(seeds)) == 4
    again = [request(f"r{i}", [i + 1, 2], max_tokens=60, temperature=1.0, seed=seed) for i, seed in enumerate(seeds)]
    for got, wanted in zip(found, undisturbed(llm, again), strict=True):
        assert got.samples[0].token_ids == wanted.samples[0].token_ids


def test_nothing_that_was_sent_is_repeated_and_ended_samples_stay_ended(llm: LLM) -> None:
    """A sample that its reader ended, as at a stop string, and one that a stop token ended."""

    async def main() -> None:
        client = RemoteClient()
        engines = Engines(llm, client)
        engines.start()
        await client.ready()
        seeds = range(1000)
        fields = {"n": 3, "temperature": 1.0, "max_tokens": 200, "stop_token_ids": [3, 4], "prompt_logprobs": 1}
        stream = await client.add(request("r", [1, 2, 3], seed=seeds[11], **fields))
        before, ended = list[RequestDelta](), set[int]()
        async for delta in stream:
            before.append(delta)
            ended |= {s.sample_index for s in delta.samples if s.finish_reason is not None}
            if ended:
                break
        by_reader = next(i for i in range(3) if i not in ended)
        stream.abort_sample(by_reader)
        await engines.kill()
        engines.start()
        after = [delta async for delta in stream]
        assert not [s for d in after for s in d.samples if s.sample_index in ended]
        late = [s for d in after for s in d.samples if s.sample_index == by_reader]
        assert {s.finish_reason for s in late} <= {"abort", None}
        got = merge_all([*before, *after])
        positions = got.prompt_logprobs.positions.tolist() if got.prompt_logprobs is not None else None
        assert positions == [1, 2]
        await client.close()
        await engines.kill()
        (wanted,) = await asyncio.to_thread(undisturbed, llm, [request("r", [1, 2, 3], seed=seeds[11], **fields)])
        for i in set(range(3)) - {by_reader}:
            mine, theirs = (next(s for s in d.samples if s.sample_index == i) for d in (got, wanted))
            assert mine == theirs

    asyncio.run(main())


def test_a_request_that_is_queued_or_not_taken_yet_goes_on_too(llm: LLM) -> None:
    async def main() -> None:
        client = RemoteClient()
        engines = Engines(llm, client)
        engines.start()
        await client.ready()
        given = prompts(20, longest=8)
        streams = [await client.add(request(f"r{i}", p, max_tokens=30, timeout=50)) for i, p in enumerate(given)]
        adding = asyncio.create_task(client.add(request("adding", [5, 6], max_tokens=3)))
        await asyncio.sleep(0)
        await engines.kill()
        assert len(client._open) > 8
        engines.start()
        found = await asyncio.gather(*map(whole, streams))
        assert [d.samples[0].token_ids for d in found] == [greedy(p, 30) for p in given]
        assert (await whole(await adding)).samples[0].token_ids == greedy([5, 6], 3)
        await client.close()
        await engines.kill()

    asyncio.run(main())


@pytest.mark.parametrize("delta", [False, True])
def test_text_and_stop_strings_go_on_over_the_end_of_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delta: bool
) -> None:
    """A stop string that begins in one engine and ends in another; what `AsyncLLM` gives is what `LLM` gives."""
    monkeypatch.setattr(resume, "MOST_RESUMES", 100)  # outputs that had come already kill engines without a token, too
    folder = tmp_path / "mock"
    folder.mkdir()
    end = write_byte_tokenizer(folder).token_to_id(END)
    write_mock_checkpoint(folder, vocab_size=320, max_position_embeddings=4096, eos_token_id=end)
    options: dict[str, Any] = {"max_num_seqs": 8, "block_size": 4, "num_gpu_blocks_override": 2048}
    made = LLM(folder, attention="mock", load_format="dummy", plugins=[mock_model], **options)
    tokenizer = made._built.need_tokenizer()
    plain_params = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=80, logprobs=1, logit_bias={end: -100})
    (unstopped,) = made.generate(["hello"], plain_params, use_tqdm=False)
    stop = tokenizer.hf.decode(unstopped.outputs[0].token_ids[30:34])
    assert unstopped.outputs[0].text.count(stop) == 1
    assert stop not in unstopped.outputs[1].text
    params = plain_params.replace(stop=[stop])
    (expected,) = made.generate(["hello"], params, use_tqdm=False)
    assert expected.outputs[0].stop_reason == stop

    async def main() -> list[RequestOutput]:
        client = RemoteClient()
        engines = Engines(made, client)
        engines.start()
        info = await client.ready()

        async def add() -> tuple[OutputAssembler, RequestStream]:
            ids = tokenizer.encode("hello")
            given = checked_on_this_side("r", ids, params, (), info, tokenizer)
            asked = ClientRequest(request_id="r", prompt_token_ids=tuple(ids), params=params)
            return OutputAssembler(given, tokenizer, "hello"), await client.add(asked)

        found = list[RequestOutput]()
        async for output in OutputStream("r", add, delta=delta):
            found.append(output)
            if not output.finished and engines.started < 40:
                await engines.kill()  # an engine for each token or two, also within the stop string
                engines.start()
        await client.close()
        await engines.kill()
        assert engines.started > 20
        return found

    found = asyncio.run(main())
    texts = ["".join(s.text for o in found for s in o.outputs if s.index == i) for i in range(2)]
    if not delta:
        texts = [sample.text for sample in found[-1].outputs]
        assert [sample.logprobs for sample in found[-1].outputs] == [sample.logprobs for sample in expected.outputs]
    assert texts == [sample.text for sample in expected.outputs]
    made.close()


@pytest.mark.parametrize("how", ["never", "too late", "again and again"])
def test_a_stream_that_nothing_takes_over_fails_and_says_why(llm: LLM, how: str) -> None:
    async def main() -> None:
        client = RemoteClient(resume_seconds=0.05 if how == "too late" else 300)
        engines = Engines(llm, client)
        engines.start()
        await client.ready()
        stream = await client.add(request("r", [1], max_tokens=3000))
        await anext(stream)
        await engines.kill()
        await until(lambda: not client.health.alive)
        if how == "never":
            client.fail("the engine has ended and is not started again")
        for _ in range(6 if how == "again and again" else 0):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            service = service_of(llm)  # which makes no step before it is gone
            connection = Connection(service, theirs, lambda connection: None)
            client.connect(ours)
            await client.ready()
            await asyncio.sleep(0.01)
            connection.close(None)
            await until(lambda: not client.health.alive)
            while llm.engine.has_unfinished_requests():
                llm.engine.advance()
        last = merge_all([delta async for delta in stream])
        assert last.error is not None
        assert last.error.code == "unavailable"
        words = {"never": "not started again", "too late": "ended", "again and again": "without a new token"}
        assert words[how] in str(last.error)
        await client.close()

    asyncio.run(main())
    llm.reset_prefix_cache()


def test_the_first_token_of_what_is_cached_stays_what_was_reported(llm: LLM) -> None:
    """cached_tokens of a stream is what its first engine found, also where the next finds nothing."""
    prompt = prompts(1, shortest=64, longest=64)[0]

    async def main() -> None:
        client = RemoteClient()
        engines = Engines(llm, client)
        engines.start()
        await client.ready()
        await whole(await client.add(request("warm", prompt, max_tokens=1)))
        stream = await client.add(request("r", prompt, max_tokens=200))
        first = await anext(stream)
        assert first.num_cached_tokens >= 60
        await engines.kill()
        engines.start()
        rest = [delta async for delta in stream]
        assert {delta.num_cached_tokens for delta in rest} == {first.num_cached_tokens}
        assert np.array_equal(merge_all([first, *rest]).samples[0].token_ids, greedy(prompt, 200))
        await client.close()
        await engines.kill()

    asyncio.run(main())
