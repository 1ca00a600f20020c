"""The step loop and its clients, in this process and over a socket: aborts, deadlines, limits, drain, the end."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from nanoengine import LLM, SamplingParams
from nanoengine.api.errors import EngineUnavailable, ParamsError, RequestError, WorkerError
from nanoengine.service import connection, loop
from nanoengine.service.client import ClientRequest, ServiceStats, Usage
from nanoengine.service.connection import Connection
from nanoengine.service.contracts import Limits, Meter, Queued
from nanoengine.service.frames import Kind, add_frame, frame
from nanoengine.service.loop import EngineService
from nanoengine.service.parts import service_of
from nanoengine.testing import mock_model
from nanoengine.testing.mock_model import write_mock_checkpoint
from tests.engine.support import VOCAB, greedy, prompts
from tests.service.support import connected, pass_deadlines, request, tokens, until, whole

BOTH = pytest.mark.parametrize("kind", ["local", "remote"])
BUSY = 2000  # tokens of a request that runs as long as a test needs it


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = write_mock_checkpoint(tmp_path_factory.mktemp("mock"), vocab_size=VOCAB, max_position_embeddings=4096)
    options: dict[str, Any] = {
        "max_num_seqs": 8,
        "block_size": 4,
        "num_gpu_blocks_override": 2048,
        "max_num_batched_tokens": 64,
    }
    with LLM(folder, attention="mock", load_format="dummy", plugins=[mock_model], **options) as made:
        yield made


class Unclosed(EngineService):
    """Leaves its engine open, for the next test."""


def on(
    llm: LLM,
    kind: str,
    main: Callable[[Any, EngineService], Awaitable[None]],
    *,
    limits: Limits | None = None,
    meter: Meter | None = None,
    idle: Callable[[], bool] | None = None,
) -> None:
    """Run `main` with a client of a new service of this engine, which is then ready for the next one."""
    service = service_of(llm, limits=limits, meter=meter)
    service._idle = idle

    async def run() -> None:
        service.start()
        try:
            async with connected(service, kind) as client:
                await asyncio.wait_for(main(client, service), 60)
        finally:
            service.stop()

    asyncio.run(run())
    while llm.engine.has_unfinished_requests():
        llm.engine.advance()
    assert llm.stats().free_blocks == llm.stats().num_blocks


@BOTH
def test_requests_from_one_loop_get_their_tokens(llm: LLM, kind: str) -> None:
    async def main(client: Any, service: EngineService) -> None:
        given = prompts(20)
        found = await asyncio.gather(*(tokens(client, request(f"r{i}", p, max_tokens=9)) for i, p in enumerate(given)))
        assert found == [greedy(p, 9) for p in given]
        stats = await client.stats()
        assert (stats.requests, stats.queued_requests, stats.queued_tokens, stats.queued_by_client) == (0, 0, 0, {})
        assert stats.free_blocks == stats.num_blocks > 0
        assert client.info.vocab_size == VOCAB
        assert "temperature" in client.info.sampling_names
        assert client.health.ready

    on(llm, kind, main)


@BOTH
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_requests_that_pool_get_their_vectors_beside_others(llm: LLM, kind: str, pooling: Any) -> None:
    given = [*prompts(10), [i % VOCAB for i in range(300)]]
    wanted = llm.embed(given, pooling, normalize=False, use_tqdm=False)

    def pooled(request_id: str, prompt: list[int], **fields: Any) -> ClientRequest:
        ids = {"prompt_token_ids": tuple(prompt), **fields}
        return ClientRequest(**{"request_id": request_id, "params": SamplingParams(), "pooling": pooling, **ids})

    async def main(client: Any, service: EngineService) -> None:
        assert client.info.pooling == llm._built.assembly.pooling
        streams = [await client.add(pooled(f"v{i}", prompt)) for i, prompt in enumerate(given)]
        texts = [tokens(client, request(f"t{i}", prompt, max_tokens=9)) for i, prompt in enumerate(given)]
        assert await asyncio.gather(*texts) == [greedy(prompt, 9) for prompt in given]
        for stream, want in zip(streams, wanted, strict=True):
            delta = await whole(stream)
            assert delta.finished
            assert delta.pooled is not None
            assert want.embedding is not None
            assert delta.pooled.tolist() == pytest.approx(want.embedding.tolist(), rel=1e-5)
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"pooling": "cls"}, "pooling must be 'mean' or 'last', not 'cls'"),
            ({"params": SamplingParams(temperature=0)}, "takes cache_salt and priority only"),
            ({"generated": ((1,),)}, "takes cache_salt and priority only"),
        ]
        for fields, said in wrong:
            with pytest.raises(ParamsError, match=said):
                await client.add(pooled("wrong", [1], **fields))
        with pytest.raises(RequestError, match="4097 tokens and max_model_len is 4096: shorten the prompt to 4096"):
            await client.add(pooled("long", [1] * 4097))
        assert (await whole(await client.add(pooled("longest", [1] * 4096)))).pooled is not None

    on(llm, kind, main)


@pytest.mark.parametrize("late", [False, True])
def test_a_request_may_end_before_its_client_knows_that_it_was_taken(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """The step loop's thread writes deltas, the event loop's the answer to `add`: either may be the first."""
    send, held = Connection._send, list[bytes]()

    def hold(self: Connection, data: bytes) -> None:
        if late and data[0] == Kind.TAKEN:
            held.append(data)
            self._loop.call_later(0.2, send, self, data)
        else:
            send(self, data)

    monkeypatch.setattr(Connection, "_send", hold)

    async def main(client: Any, service: EngineService) -> None:
        stream = await client.add(request("r", [1, 2, 3], max_tokens=1))
        assert (await whole(stream)).samples[0].token_ids == greedy([1, 2, 3], 1)
        await asyncio.sleep(0.3 * late)
        assert await tokens(client, request("next", [1, 2, 3], max_tokens=1)) == greedy([1, 2, 3], 1)

    on(llm, "remote", main)
    assert len(held) == 2 * late


@BOTH
def test_what_is_wrong_with_a_request_is_raised_by_add(llm: LLM, kind: str) -> None:
    async def main(client: Any, service: EngineService) -> None:
        stream = await client.add(request("a", [1], max_tokens=BUSY))
        for asked, code in (
            (request("b", []), "invalid_prompt"),
            (request("b", [VOCAB]), "invalid_prompt"),
            (request("b", [1] * 100_000), "too_long"),
            (request("a", [1]), "duplicate_id"),
            (request("b", [1, 2], max_tokens=4, generated=(greedy([1, 2], 4),)), "already_ended"),
        ):
            with pytest.raises(RequestError) as caught:
                await client.add(asked)
            assert caught.value.code == code
        for wrong in ({"temprature": 1}, {"temperature": -1}, {"stop_token_ids": [VOCAB]}, {"logit_bias": {VOCAB: 1}}):
            with pytest.raises(ParamsError, match=next(iter(wrong)).partition("_")[0]):
                await client.add(request("b", [1], **wrong))
        stream.close()

    on(llm, kind, main)


@BOTH
def test_a_request_that_fails_later_has_its_error_as_its_last_delta(llm: LLM, kind: str) -> None:
    async def main(client: Any, service: EngineService) -> None:
        masked = {"min_tokens": 2, "stop_token_ids": list(range(VOCAB))}  # no token is left
        found = await whole(await client.add(request("r", [1, 2], max_tokens=4, **masked)))
        assert found.finished
        assert found.error is not None
        assert found.error.code == "nothing_left"
        assert "masked" in str(found.error)

    on(llm, kind, main)


@BOTH
@pytest.mark.parametrize("when", ["queued", "prefill", "running"])
def test_a1_an_abort_frees_blocks_within_two_steps(llm: LLM, kind: str, when: str) -> None:
    """Closed at the first token, while it waits, and while its prompt is computed."""

    async def main(client: Any, service: EngineService) -> None:
        others = [
            await client.add(request(f"o{i}", [i + 1], max_tokens=BUSY)) for i in range(8 if when == "queued" else 1)
        ]
        for other in others:
            await anext(other)
        long = prompts(1, shortest=600, longest=600)[0] if when == "prefill" else [7, 8, 9]
        stream = await client.add(request("r", long, max_tokens=BUSY, progress=when == "prefill"))
        if when == "queued":
            await until(lambda: len(llm.engine.scheduler.waiting) == 1)
        else:
            delta = await anext(stream)
            assert bool(delta.samples) == (when == "running")
            assert delta.num_computed_tokens < 600
        at, gone = await freed_after(service, stream.close, "r")
        assert gone - at <= 2
        await until(lambda: service.stats().requests == len(others))
        for other in others:
            assert (await anext(other)).samples  # they go on
            other.close()

    on(llm, kind, main)


async def freed_after(service: EngineService, close: Callable[[], None], request_id: str) -> tuple[int, int]:
    """How many steps there were when the engine learned of the abort, and when the scheduler had nothing of it left."""
    engine, scheduler = service.engine, service.engine.scheduler
    advance, abort = engine.advance, engine.abort_request
    aborted, free = list[int](), list[int]()

    def watched() -> None:
        advance()
        if aborted and not any(r.parent == request_id for r in [*scheduler.waiting, *scheduler.running]):
            free.append(scheduler.stats().steps)

    def noted(*given: Any, **named: Any) -> None:
        abort(*given, **named)
        aborted.append(scheduler.stats().steps)

    engine.advance, engine.abort_request = watched, noted  # type: ignore[method-assign]
    try:
        close()
        await until(lambda: bool(free))
    finally:
        del engine.advance, engine.abort_request
    return aborted[0], free[0]


@BOTH
@pytest.mark.parametrize("queued", [True, False])
def test_a2_cancelling_one_of_many_changes_no_token_of_the_others(llm: LLM, kind: str, queued: bool) -> None:
    """100 requests, of which 8 run at a time: one that waits is cancelled, or one that runs."""

    async def main(client: Any, service: EngineService) -> None:
        given = prompts(100, longest=12)
        streams = [await client.add(request(f"r{i}", p, max_tokens=6)) for i, p in enumerate(given)]
        cancelled = 99 if queued else 0
        streams[cancelled].close()
        rest = [i for i in range(100) if i != cancelled]
        found = await asyncio.gather(*(whole(streams[i]) for i in rest))
        assert [delta.samples[0].token_ids for delta in found] == [greedy(given[i], 6) for i in rest]
        assert [delta async for delta in streams[cancelled]] == []

    on(llm, kind, main)


@BOTH
def test_a3_a_thousand_random_disconnects_leave_no_block_and_no_request(llm: LLM, kind: str) -> None:
    """While queued, in prefill and in decoding; by closing, by dropping the stream and by leaving with all of them."""
    rng = random.Random(3)

    async def one(client: Any, name: str) -> None:
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 5, 200]))]
        stream = await client.add(request(name, prompt, max_tokens=rng.choice([1, 50]), n=rng.choice([1, 1, 2])))
        for _ in range(rng.choice([0, 0, 1, 3])):
            if await anext(stream, None) is None:
                break
        if rng.random() < 0.5:
            stream.close()

    async def main(client: Any, service: EngineService) -> None:
        for wave in range(10):
            async with connected(service, kind) as leaving:
                kept = [await leaving.add(request(f"k{wave}-{i}", [i], max_tokens=BUSY)) for i in range(4)]
                await asyncio.gather(*(one(client, f"w{wave}-{i}") for i in range(96)))
                await anext(kept[0])
        await until(lambda: not service.stats().requests, "the end of all requests")
        stats = await client.stats()
        assert stats.free_blocks == stats.num_blocks
        assert (stats.running, stats.waiting, stats.queued_tokens) == (0, 0, 0)
        assert await tokens(client, request("after", [1, 2, 3], max_tokens=5)) == greedy([1, 2, 3], 5)

    on(llm, kind, main)


@BOTH
def test_a30_a_deadline_ends_a_request_that_waits_and_no_other(llm: LLM, kind: str) -> None:
    async def main(client: Any, service: EngineService) -> None:
        busy = [await client.add(request(f"b{i}", [i], max_tokens=BUSY, timeout=60)) for i in range(8)]
        for stream in busy:
            await anext(stream)
        late = await client.add(request("late", [1, 2, 3], timeout=50))
        computed = service.stats().prompt_tokens
        pass_deadlines(service)
        patient = await client.add(request("patient", [1, 2], max_tokens=3, timeout=60))
        found = await whole(late)
        assert found.error is not None
        assert found.error.code == "deadline"
        assert "after 50 seconds" in str(found.error)
        assert service.stats().prompt_tokens == computed  # before any of it was computed
        for stream in busy:
            assert (await anext(stream)).error is None  # they had started
            stream.close()
        assert (await whole(patient)).samples[0].token_ids == greedy([1, 2], 3)

    on(llm, kind, main)


class AtMost:
    def __init__(self, requests: int) -> None:
        self.requests = requests
        self.seen: list[tuple[int, int, Mapping[str, int]]] = []

    def check(self, request: ClientRequest, queue: Queued) -> None:
        self.seen.append((queue.queued_requests, queue.queued_tokens, dict(queue.queued_by_client)))
        if queue.queued_requests >= self.requests:
            raise RequestError("overloaded", f"{self.requests} requests wait", 3.0)


@BOTH
def test_limits_see_what_waits_and_refuse_with_a_time_to_come_back(llm: LLM, kind: str) -> None:
    limits = AtMost(3)

    async def main(client: Any, service: EngineService) -> None:
        busy = []
        for i in range(8):
            busy.append(await client.add(request(f"b{i}", [i], max_tokens=BUSY)))
            await anext(busy[-1])
        await until(lambda: not service.stats().queued_requests)
        waiting = [await client.add(request(f"w{i}", [1, 2], client="ann")) for i in range(3)]
        with pytest.raises(RequestError) as caught:
            await client.add(request("x", [1], client="bob"))
        assert (caught.value.code, caught.value.retry_after) == ("overloaded", 3.0)
        assert limits.seen[-1] == (3, 6, {"ann": 3})
        assert service.stats().requests == 11
        for stream in busy + waiting:
            stream.close()

    on(llm, kind, main, limits=limits)


@BOTH
def test_progress_of_a_long_prompt_is_reported_to_who_wants_it(llm: LLM, kind: str) -> None:
    async def main(client: Any, service: EngineService) -> None:
        prompt = prompts(1, shortest=640, longest=640)[0]
        for wanted in (True, False):
            stream = await client.add(request("r", prompt, max_tokens=1, progress=wanted))
            deltas = [delta async for delta in stream]
            before = [delta.num_computed_tokens for delta in deltas if not delta.samples]
            assert before == sorted(set(before))
            assert bool(before) == wanted
            assert deltas[-1].samples[0].token_ids == greedy(prompt, 1)
            llm.reset_prefix_cache() if not service.stats().requests else None

    on(llm, kind, main)


@BOTH
def test_drain_refuses_new_requests_and_waits_for_the_open_ones(llm: LLM, kind: str) -> None:
    async def main(client: Any, service: EngineService) -> None:
        stream = await client.add(request("r", [1, 2], max_tokens=30))
        endless = await client.add(request("endless", [1], max_tokens=BUSY))
        assert not await client.drain(0.01)
        await until(lambda: bool(client.health.draining))
        assert not client.health.ready
        with pytest.raises(EngineUnavailable, match="draining"):
            await client.add(request("new", [1]))
        assert (await whole(stream)).samples[0].token_ids == greedy([1, 2], 30)
        endless.close()
        assert await client.drain(30)

    on(llm, kind, main)


@BOTH
def test_abort_by_id_counts_and_a_trace(llm: LLM, kind: str) -> None:
    usages: list[Usage] = []

    class Counting:
        def count(self, usage: Usage) -> None:
            usages.append(usage)

        def step(self, seconds: float, gaps: Mapping[float, int], queued: Sequence[float]) -> None:
            """Another test has it."""

        def render(self, stats: ServiceStats) -> bytes:
            return f"usages {len(usages)} requests {stats.requests}\n".encode()

    async def main(client: Any, service: EngineService) -> None:
        stream = await client.add(request("r 1", [1], max_tokens=BUSY))
        usage = Usage(client="ann", prompt_tokens=3, finish_reasons=("stop", "length"), ttft=0.5)
        await client.count(usage)
        trace = json.loads(await client.trace(0.05))
        assert any(event["name"] == "launch" for event in trace)
        assert await client.metrics() == b"usages 1 requests 1\n"
        assert usages == [usage]
        assert await client.abort("r") == 1
        found = await whole(stream)
        assert found.samples[0].finish_reason == "abort"
        assert not await client.abort("r")
        with pytest.raises(RequestError, match="60"):
            await client.trace(1e9)

    on(llm, kind, main, meter=Counting())


@BOTH
def test_a_worker_failure_ends_the_service_with_its_cause(llm: LLM, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(client: Any, service: EngineService) -> None:
        stream = await client.add(request("r", [1], max_tokens=BUSY))
        await anext(stream)

        def fail() -> None:
            raise WorkerError(1, 2, "step 3", "it was killed")

        monkeypatch.setattr(llm.engine, "advance", fail)
        if kind == "local":
            found = await whole(stream)
            assert found.error is not None
            assert "it was killed" in str(found.error)
        await until(lambda: not client.health.alive)
        assert "it was killed" in str(client.health.reason)
        with pytest.raises(EngineUnavailable, match="it was killed"):
            await client.add(request("s", [1]))
        assert isinstance(service.cause, WorkerError)
        monkeypatch.undo()
        stream.close()
        llm.engine.abort_request("r")

    on(llm, kind, main)


def test_an_error_of_the_step_loop_is_logged_and_it_goes_on(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    async def main(client: Any, service: EngineService) -> None:
        def fail() -> None:
            raise ZeroDivisionError("once")

        service.between_steps(fail)
        assert await tokens(client, request("r", [1, 2], max_tokens=3)) == greedy([1, 2], 3)
        assert client.health.ready

    on(llm, "local", main)
    assert "ZeroDivisionError: once" in caplog.text


def test_a_client_whose_output_raises_loses_its_requests_alone(llm: LLM) -> None:
    class Broken:
        def deliver(self, batch: Any) -> None:
            raise OSError("no more")

        def beat(self) -> None: ...
        def ended(self, cause: Any, batch: Any) -> None: ...

    async def main(client: Any, service: EngineService) -> None:
        member = service.join(Broken())
        member.add(0, request("broken", [1], max_tokens=BUSY))
        assert await tokens(client, request("r", [1, 2], max_tokens=30)) == greedy([1, 2], 30)
        await until(lambda: not service.stats().requests)

    on(llm, "local", main)


def test_the_end_of_a_request_is_no_reason_for_a_beat(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wake the processes of all clients; a beat is due each `BEAT_SECONDS`."""
    monkeypatch.setattr(loop, "BEAT_SECONDS", 600.0)
    beats = list[None]()

    class Watched:
        def deliver(self, batch: Any) -> None: ...
        def ended(self, cause: Any, batch: Any) -> None: ...
        def beat(self) -> None:
            beats.append(None)

    async def main(client: Any, service: EngineService) -> None:
        service.join(Watched())
        for index in range(10):
            assert await tokens(client, request(f"r{index}", [1, 2], max_tokens=3)) == greedy([1, 2], 3)

    on(llm, "remote", main)
    assert not beats


def test_requests_are_added_by_the_thread_that_makes_the_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it makes none, and between two: another one would wait for the interpreter's lock."""
    monkeypatch.setattr(connection, "_LATE_SECONDS", 600.0)

    async def main(client: Any, service: EngineService) -> None:
        threads, add = [], service.add

        def added(*given: Any, **named: Any) -> None:
            threads.append(threading.current_thread())
            add(*given, **named)

        monkeypatch.setattr(service, "add", added)
        busy = await client.add(request("busy", [1], max_tokens=BUSY))
        found = [client.add(request(f"r{i}", [i], max_tokens=3)) for i in range(4)]
        for stream in await asyncio.gather(*found):
            assert len((await whole(stream)).samples[0].token_ids) == 3
        busy.close()
        assert threads == [service._thread] * 5

    on(llm, "remote", main)


def test_a_client_is_answered_while_a_step_hangs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_LATE_SECONDS", 0.01)
    goes_on, hangs, advance = threading.Event(), threading.Event(), llm.engine.advance

    def hang() -> None:
        hangs.set()
        assert goes_on.wait(60)
        advance()

    monkeypatch.setattr(llm.engine, "advance", hang)

    async def main(client: Any, service: EngineService) -> None:
        try:
            asked = await client.add(request("r", [1, 2], max_tokens=3))
            await until(hangs.is_set)
            assert (await client.stats()).requests == 1
            with pytest.raises(ParamsError, match="top_q"):
                await client.add(request("wrong", [1], top_q=1))
        finally:
            goes_on.set()
        assert (await whole(asked)).samples[0].token_ids == greedy([1, 2], 3)

    on(llm, "remote", main)


def test_a_remote_client_that_does_not_read_never_blocks_the_others(llm: LLM) -> None:
    """Its deltas are merged while its socket is full; when it reads again it has all tokens."""

    async def main(client: Any, service: EngineService) -> None:
        async with connected(service, "remote") as slow:
            given = prompts(6)
            streams = [await slow.add(request(f"s{i}", p, max_tokens=400, logprobs=2)) for i, p in enumerate(given)]
            asyncio.get_running_loop().remove_reader(slow._socket.fileno())
            found = await tokens(client, request("r", [1, 2], max_tokens=300))
            assert found == greedy([1, 2], 300)
            await until(lambda: not service.stats().requests)
            asyncio.get_running_loop().add_reader(slow._socket.fileno(), slow._readable)
            for stream, prompt in zip(streams, given, strict=True):
                assert (await whole(stream)).samples[0].token_ids == greedy(prompt, 400)

    on(llm, "local", main)


@BOTH
def test_a_stream_may_be_dropped_by_any_thread(llm: LLM, kind: str) -> None:
    """As the garbage collector does, which runs in whatever thread allocates."""

    async def main(client: Any, service: EngineService) -> None:
        streams = [await client.add(request(f"r{i}", [i], max_tokens=BUSY)) for i in range(20)]
        kept = await client.add(request("kept", [1, 2], max_tokens=40))

        def drop() -> None:
            while streams:
                streams.pop()

        await asyncio.gather(*(asyncio.to_thread(drop) for _ in range(4)))
        assert (await whole(kept)).samples[0].token_ids == greedy([1, 2], 40)
        await until(lambda: not service.stats().requests)

    on(llm, kind, main)


def test_a_hanging_engine_is_not_waited_for_and_a_slow_event_loop_is_no_hanging_engine(llm: LLM) -> None:
    async def main(client: Any, service: EngineService) -> None:
        await client.stats()
        client._deadline = 0.3
        client._heard -= 1
        if not client._has_data():
            await asyncio.sleep(0)
            while not client._has_data():  # the event loop is held up, until the engine beats
                threading.Event().wait(0.05)
        assert client.health.ready
        connection = next(member.output for member in service._members)
        connection._receive = lambda: None  # it reads nothing any more
        service.inbox.remove(connection._number)
        for ask in (client.stats(), client.abort("x"), client.metrics(), client.drain(0.1), client.trace(0.1)):
            with pytest.raises(EngineUnavailable, match="did not answer"):
                await ask

    on(llm, "remote", main)


@pytest.mark.parametrize("wrong", [b"\xff" * 8, frame(Kind.HELLO, b"{}"), frame(Kind.ABORT, b"[]"), "twice"])
def test_a_client_that_sends_nonsense_is_sent_away_alone(llm: LLM, wrong: Any) -> None:
    async def main(client: Any, service: EngineService) -> None:
        async with connected(service, "remote") as other:
            stream = await other.add(request("other", [1], max_tokens=BUSY))
            sent = add_frame(0, request("again", [1])) if wrong == "twice" else wrong
            other._socket.send(sent)
            await until(lambda: not other.health.alive)
            assert await tokens(client, request("r", [1, 2], max_tokens=3)) == greedy([1, 2], 3)
            await until(lambda: not service.stats().requests)
            stream.close()

    on(llm, "local", main)


def test_a_service_that_is_stopped_reports_no_engine(llm: LLM) -> None:
    service = service_of(llm)
    service.start()
    service.stop()
    with pytest.raises(EngineUnavailable, match="closed"):
        service.check_takes()


def test_health_is_the_age_of_the_last_sign(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that hangs: the step loop gives no sign, and health says so at the deadline."""
    held = threading.Event()

    async def main(client: Any, service: EngineService) -> None:
        client._deadline = 0.6
        advance = llm.engine.advance
        monkeypatch.setattr(llm.engine, "advance", lambda: (held.wait(60), advance()))
        stream = await client.add(request("r", [1], max_tokens=3))
        await until(lambda: not client.health.alive)
        assert "no progress" in str(client.health.reason)
        assert client.health.since_progress > 0.6
        held.set()
        await whole(stream)
        await until(lambda: bool(client.health.ready))
        monkeypatch.undo()

    on(llm, "remote", main)


def test_idle_time_is_used_piece_by_piece_and_not_while_a_request_runs(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until nothing is left. In between requests are answered."""
    monkeypatch.setattr(loop, "_QUIET_SECONDS", 0.0)
    left, running = [40], list[bool]()

    def idle() -> bool:
        running.append(llm.engine.has_unfinished_requests())
        left[0] -= 1
        return left[0] > 0

    async def main(client: Any, service: EngineService) -> None:
        await until(lambda: left[0] < 40)
        found = await tokens(client, request("r", [1, 2], max_tokens=300))
        assert found == greedy([1, 2], 300)
        await until(lambda: left[0] == 0)
        await asyncio.sleep(0.05)

    on(llm, "local", main, idle=idle)
    assert running == [False] * 40


def test_idle_time_begins_a_while_after_the_last_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_QUIET_SECONDS", 3600.0)
    used = list[int]()

    async def main(client: Any, service: EngineService) -> None:
        for i in range(3):
            await tokens(client, request(f"r{i}", [1, 2], max_tokens=3))
        assert not used

        def later() -> bool:
            service._quiet_since = float("-inf")
            service.inbox.ring()
            return bool(used)

        await until(later)

    on(llm, "local", main, idle=lambda: bool(used.append(1)))
    assert used == [1]
