"""A request that ends every engine fails alone: the others go on, of all clients."""

from __future__ import annotations

import asyncio
import socket

import pytest

from nanoengine.api.deltas import RequestDelta, SampleDelta
from nanoengine.api.errors import EngineUnavailable
from nanoengine.service import remote
from nanoengine.service.client import EngineInfo
from nanoengine.service.delta_frames import deltas_frame
from nanoengine.service.frames import FrameReader, Kind, info_to_json, json_frame, read_add
from nanoengine.service.remote import RemoteClient
from nanoengine.service.resume import MOST_RESUMES
from nanoengine.service.trials import Trials
from tests.service.support import request, whole

POISON, TOKENS = 13, 5


class Engines:
    """Engines for several clients, one after the other. Each step gives every request a token; a step with a request
    whose prompt begins with POISON ends the engine instead."""

    def __init__(self, clients: list[RemoteClient]) -> None:
        self._clients, self.ends = clients, 0

    async def run(self) -> None:
        while True:
            pairs = [socket.socketpair() for _ in self._clients]
            for client, (ours, theirs) in zip(self._clients, pairs, strict=True):
                theirs.setblocking(False)
                theirs.send(json_frame(Kind.HELLO, **INFO))
                client.connect(ours)
            await self._one([theirs for _, theirs in pairs])
            self.ends += 1
            for _, theirs in pairs:
                theirs.close()
            await asyncio.sleep(0.01)

    async def _one(self, sockets: list[socket.socket]) -> None:
        running: dict[tuple[int, int], int] = {}  # (client, key) -> tokens that are left
        readers = [FrameReader() for _ in sockets]
        while True:
            await asyncio.sleep(0.005)
            poisoned = False
            for number, (sock, reader) in enumerate(zip(sockets, readers, strict=True)):
                try:
                    data = sock.recv(1 << 20)
                except BlockingIOError:
                    continue
                for kind, content in reader.feed(data):
                    if kind is Kind.ADD:
                        added = read_add(content)
                        assert added.request is not None
                        sock.send(json_frame(Kind.TAKEN, key=added.key, error=None))
                        poisoned = poisoned or added.request.prompt_token_ids[0] == POISON
                        running[number, added.key] = TOKENS - len(
                            added.request.generated[0] if added.request.generated else ()
                        )
            if poisoned:
                return
            for (number, key), left in list(running.items()):
                last = left == 1
                sample = SampleDelta(0, (left,), None, "length" if last else None, None)
                sockets[number].send(deltas_frame([(key, RequestDelta("", (sample,), last))]))
                running[number, key] = left - 1
                if last:
                    del running[number, key]


INFO = info_to_json(EngineInfo(model="fake", tokenizer=None, vocab_size=256, max_model_len=4096))


async def outcome(clients: int, innocents: int) -> tuple[int, list[RequestDelta], RequestDelta]:
    """(engines that ended, what the innocent requests gave, what the poison gave)."""
    made = [RemoteClient() for _ in range(clients)]
    engines = Engines(made)
    running = asyncio.create_task(engines.run())
    for client in made:
        await client.ready()
    adding = [made[0].add(request("poison", [POISON]))]
    adding += [made[i % clients].add(request(f"r{i}", [1], max_tokens=TOKENS)) for i in range(innocents)]
    poison, *others = await asyncio.gather(*adding)
    found = await asyncio.wait_for(asyncio.gather(whole(poison), *map(whole, others)), 60)
    running.cancel()
    for client in made:
        await client.close()
    return engines.ends, found[1:], found[0]


@pytest.mark.parametrize(("clients", "innocents"), [(1, 6), (3, 9)])
def test_a_request_that_ends_every_engine_fails_alone(clients: int, innocents: int) -> None:
    ends, others, poison = asyncio.run(outcome(clients, innocents))
    assert ends == MOST_RESUMES + 1
    assert isinstance(poison.error, EngineUnavailable)
    assert [delta.error for delta in others] == [None] * innocents
    assert [delta.samples[0].token_ids for delta in others] == [tuple(range(TOKENS, 0, -1))] * innocents


def test_the_test_would_notice_that_all_are_tried_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Together(Trials):
        def begin(self, keys: object) -> None:
            for key in list(keys):  # type: ignore[call-overload]
                self._add(key)

    monkeypatch.setattr(remote, "Trials", Together)
    _, others, _ = asyncio.run(outcome(1, 6))
    assert all(isinstance(delta.error, EngineUnavailable) for delta in others)
