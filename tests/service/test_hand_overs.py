"""A28: what the step loop does for its clients does not grow with their streams but for the deltas themselves."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from nanoengine import LLM
from nanoengine.service.loop import EngineService
from nanoengine.service.parts import service_of
from nanoengine.testing import mock_model
from nanoengine.testing.mock_model import write_mock_checkpoint
from tests.engine.support import VOCAB, greedy
from tests.service.support import connected, request, tokens

TOKENS = 20


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = write_mock_checkpoint(tmp_path_factory.mktemp("mock"), vocab_size=VOCAB, max_position_embeddings=4096)
    with LLM(
        folder, attention="mock", load_format="dummy", plugins=[mock_model], max_num_seqs=256, block_size=16,
        num_gpu_blocks_override=1024, max_num_batched_tokens=1024,
    ) as made:  # fmt: skip
        yield made


class Watched:
    """Counts the calls of one thread's objects between the turns of the step loop."""

    def __init__(self, service: EngineService, clients: list[Any], kind: str) -> None:
        self.turns: list[Counter[str]] = []
        self._now: Counter[str] = Counter()
        self.deltas, self._thread = 0, service._thread
        turn = service._turn

        def counted() -> None:
            self._now = Counter()
            turn()
            self.turns.append(self._now)
            self._now = Counter()

        service._turn = counted  # type: ignore[method-assign]
        for number, member in enumerate(service._members):
            output: Any = member.output
            self._count(output, "deliver", f"deliver {number}")
            if kind == "remote":
                self._count(output, "_write", f"write {number}")
        loop = asyncio.get_running_loop()
        self._count(loop, "call_soon_threadsafe", "wake")
        self._loop = loop

    def _count(self, owner: Any, name: str, kind: str) -> None:
        plain = getattr(owner, name)

        def counted(*args: Any, **named: Any) -> Any:
            if threading.current_thread() is self._thread:
                self._now[kind] += 1
                if name == "deliver":
                    self.deltas += len(args[0])
            return plain(*args, **named)

        setattr(owner, name, counted)

    def end(self) -> None:
        del self._loop.call_soon_threadsafe  # type: ignore[method-assign]


class OneByOne(EngineService):
    """The mutant: each delta is handed over when it comes."""

    def took(self, *args: Any) -> None:
        super().took(*args)
        self._flush()


def most_calls(llm: LLM, kind: str, streams: int, *, mutant: bool = False) -> tuple[Counter[str], int]:
    """The most calls of each kind in one turn of the step loop, with two clients; and how many deltas there were."""
    service = service_of(llm)
    if mutant:
        service.__class__ = OneByOne

    async def main() -> Watched:
        async with connected(service, kind) as one, connected(service, kind) as other:
            watched = Watched(service, [one, other], kind)
            service.start()
            try:
                given = [[i % VOCAB, i % 7] for i in range(streams)]
                asked = [
                    tokens((one, other)[i % 2], request(f"r{i}", prompt, max_tokens=TOKENS))
                    for i, prompt in enumerate(given)
                ]
                found = await asyncio.wait_for(asyncio.gather(*asked), 100)
                assert found[:16] == [greedy(prompt, TOKENS) for prompt in given[:16]]
            finally:
                await asyncio.to_thread(service.stop)
                watched.end()
            return watched

    watched = asyncio.run(main())
    most: Counter[str] = Counter()
    for turn in watched.turns:
        most |= turn
    return most, watched.deltas


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a28_a_step_is_one_hand_over_to_each_client_however_many_streams(llm: LLM, kind: str) -> None:
    most, deltas = most_calls(llm, kind, 400)
    assert deltas == 400 * TOKENS
    assert (most["deliver 0"], most["deliver 1"]) == (1, 1)
    assert most["wake"] <= 2  # of each client's event loop; over a socket only where it is full
    if kind == "remote":  # the deltas, an answer to all that was taken, and four times a second a beat
        assert 1 <= max(most["write 0"], most["write 1"]) <= 3


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_hand_over_for_each_stream_would_be_seen(llm: LLM, kind: str) -> None:
    most, _ = most_calls(llm, kind, 100, mutant=True)
    assert most["deliver 0"] > 10
