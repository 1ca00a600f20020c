"""CPU time of the HTTP application for a chunk of a stream, over an engine that only counts. Needs no GPU, no model.

    python benchmarks/server_chunks.py --streams 1000 --rate 20 --seconds 10 --endpoint chat

A server process (uvicorn, one event loop) has `streams` open streams, each of which gets `rate` tokens a second; this
process reads them. Printed: chunks a second as they were read, CPU time of the server process a chunk, how late its
event loop was, and how long GET /live took meanwhile. `--no-text`: token ids only, without a detokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanoengine.api.deltas import RequestDelta, SampleDelta
from nanoengine.service.client import ClientRequest, DeltaBox, EngineInfo, RequestStream
from nanoengine.testing.fake_engine import Answer, FakeEngine

GROUPS = 20


class Ticking(FakeEngine):
    """Gives each open stream one token, `rate` times a second, and notes how late it was itself."""

    def __init__(self, rate: float, vocab_size: int) -> None:
        info = EngineInfo(model="stub", tokenizer=None, vocab_size=vocab_size, max_model_len=1 << 20)
        super().__init__(lambda request: Answer(samples=[[0]]), info)
        self._rate, self._boxes = rate, [dict[str, DeltaBox]() for _ in range(GROUPS)]
        self.late: list[float] = []

    async def add(self, request: ClientRequest) -> RequestStream:
        group = min(self._boxes, key=len)
        box = group[request.request_id] = DeltaBox()
        return RequestStream(request.request_id, box, lambda index: group.pop(request.request_id, None) and None)

    async def tick(self) -> None:
        """Streams take turns within a period, in groups, so that the work is spread."""
        loop, number = asyncio.get_running_loop(), 0
        due = loop.time()
        while True:
            due += 1 / self._rate / GROUPS
            await asyncio.sleep(max(0.0, due - loop.time()))
            self.late.append(max(0.0, loop.time() - due))
            number += 1
            token = 97 + number // GROUPS % 26
            for request_id, box in list(self._boxes[number % GROUPS].items()):
                box.put(RequestDelta(request_id, (SampleDelta(0, (token,)),), False, None, 0, 4, 1))


def serve(options: argparse.Namespace) -> None:
    import uvicorn
    from transformers import PreTrainedTokenizerFast

    from nanoengine.server.app import create_app
    from nanoengine.server.auth import Keys
    from nanoengine.server.config import ServerConfig
    from nanoengine.server.gate import Gate
    from nanoengine.testing.byte_tokenizer import byte_tokenizer
    from nanoengine.text import Tokenizer

    hf = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())
    hf.chat_template = "{{ messages[0].content }}"
    tokenizer = None if options.no_text else Tokenizer(hf)
    engine = Ticking(options.rate, 300)
    config = ServerConfig()
    app = Gate(create_app(engine, config, tokenizer), config, Keys({}))

    async def with_figures(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/late":
            body = " ".join(f"{each:.6f}" for each in sorted(engine.late)).encode()
            engine.late.clear()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})
            return
        if options.bare:
            await bare(scope, receive, send)
        else:
            await app(scope, receive, send)

    async def bare(scope: Any, receive: Any, send: Any) -> None:
        """What the server and its sockets cost by themselves: the same bytes for every token."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        chunk = b'data: {"id":"%s","choices":[{"index":0,"text":"a"}]}\n\n' % (b"x" * 120)
        if scope["path"] != "/live":
            async for _ in await engine.add(ClientRequest(request_id=str(id(scope)), prompt_token_ids=(), params=None)):  # type: ignore[arg-type]
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    server = uvicorn.Server(uvicorn.Config(
        with_figures, port=options.port, loop="uvloop", http="httptools", access_log=False, log_level="warning",
        lifespan="off", ws="none", backlog=4096,
    ))  # fmt: skip

    async def main() -> None:
        # The end of the parent ends this process, too.
        asyncio.get_running_loop().run_in_executor(None, lambda: (sys.stdin.read(), os._exit(0)))
        ticking = asyncio.create_task(engine.tick())
        gc.freeze()
        await server.serve()
        ticking.cancel()

    import uvloop

    uvloop.run(main())


class Reader(asyncio.Protocol):
    """Sends one request and counts the chunks that come."""

    def __init__(self, request: bytes) -> None:
        self._request, self.count = request, 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.count += data.count(b"data: ")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def get(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    found = await reader.read(-1)
    writer.close()
    return found


async def measure(options: argparse.Namespace, pid: int) -> None:
    while True:
        try:
            await get(options.port, "/live")
            break
        except OSError:
            assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z", "the server has ended"
            await asyncio.sleep(0.05)
    path = "/v1/completions" if options.endpoint == "completions" else "/v1/chat/completions"
    fields = '"prompt": [97]' if options.endpoint == "completions" else '"messages": [{"role": "user", "content": "a"}]'
    more = ', "return_token_ids": true' if options.no_text else ""
    body = f'{{{fields}, "stream": true, "max_tokens": 100000{more}}}'
    request = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    loop, readers = asyncio.get_running_loop(), list[Reader]()
    for _ in range(options.streams):
        _, reader = await loop.create_connection(lambda: Reader(request), "127.0.0.1", options.port)
        readers.append(reader)
    await asyncio.sleep(2)
    await get(options.port, "/late")
    cpu, before, start, live = cpu_seconds(pid), sum(r.count for r in readers), time.monotonic(), list[float]()
    while time.monotonic() - start < options.seconds:
        asked = time.monotonic()
        await get(options.port, "/live")
        live.append(time.monotonic() - asked)
        await asyncio.sleep(0.05)
    seconds = time.monotonic() - start
    used, chunks = cpu_seconds(pid) - cpu, sum(r.count for r in readers) - before
    late = [float(each) for each in (await get(options.port, "/late")).split(b"\r\n\r\n")[1].split() if b"." in each]
    name = "bare" if options.bare else f"{options.endpoint}{' ids' if options.no_text else ''}"
    print(
        f"{name}: {options.streams} streams, {chunks / seconds:,.0f} "
        f"chunks/s of {options.streams * options.rate:,.0f}; server {1e6 * used / chunks:.1f} us of CPU a chunk "
        f"({used / seconds:.0%} of a core); loop late p50 {1e3 * at(late, 0.5):.1f} p99 {1e3 * at(late, 0.99):.1f} ms; "
        f"/live p50 {1e3 * at(live, 0.5):.1f} p99 {1e3 * at(live, 0.99):.1f} ms"
    )
    for reader in readers:
        reader.transport.abort()


def at(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=10.0, help="tokens a second and stream")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--endpoint", choices=["completions", "chat"], default="completions")
    parser.add_argument("--no-text", action="store_true")
    parser.add_argument("--bare", action="store_true", help="without the application, for comparison")
    parser.add_argument("--port", type=int, default=18765)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    with subprocess.Popen([sys.executable, __file__, "--serve", *sys.argv[1:]], stdin=subprocess.PIPE) as child:
        try:
            import uvloop

            uvloop.run(measure(options, child.pid))
        finally:
            child.terminate()


if __name__ == "__main__":
    main()
