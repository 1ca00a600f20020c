"""A server whose engine and application are stubs: `python stubs.py server JSON`. It starts in a moment, without torch.

JSON: {"server": of `ServerConfig`, "engine": what the engine does}. The engine: {"start": seconds, "fail": a message,
"die": an exit status, "runs": which of its runs do so (default: all)}. With "start": "held" it starts when the file
`go` is in its folder.

/count?N streams N lines; /count?PATH one each 20 ms until that file is there.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanoengine.api.errors import ConfigError
from nanoengine.observe.logs import configure_logs
from nanoengine.server.config import ServerConfig
from nanoengine.server.listening import listen, url
from nanoengine.server.supervisor import Launch, ServerFailed, StartFailed, Supervisor
from nanoengine.service.control import inherit

COMMAND = [sys.executable, __file__]


def server(given: dict[str, Any]) -> int:
    from nanoengine.server.http_process import server_config_of

    options = server_config_of(given["server"])
    configure_logs(options.log_format, options.log_level, "supervisor")
    try:
        with listen(options.host, options.port) as listener:
            launch = Launch(
                listener=listener,
                address=url(listener),
                model="stub",
                engine=given["engine"],
                http={"config": asdict(options), "plugin_files": given.get("plugin_files", [])},
                engine_command=[*COMMAND, "engine"],
                http_command=[*COMMAND, "http"],
            )

            async def run() -> int:
                return await Supervisor(options, launch, silence=given["silence"]).run()

            return asyncio.run(run())
    except (ConfigError, StartFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ServerFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


async def engine() -> None:
    control = inherit(int(sys.argv[2]))
    start = await control.receive()
    assert start is not None
    what = start.fields
    runs = Path(what["folder"]) / "runs"
    number = len(runs.read_text().split()) if runs.exists() else 0
    with runs.open("a") as file:
        file.write(f"{os.getpid()}\n")
    control.send("phase", phase="stub weights")
    if what.get("start") == "held":
        while not Path(what["folder"], "go").exists():
            time.sleep(0.02)
    else:
        time.sleep(what.get("start", 0.0))
    acts = number in what.get("runs", range(100))
    if acts and "fail" in what:
        control.send("failed", error="ConfigError", message=what["fail"], traceback="")
        sys.exit(1)
    control.send("ready", info={})
    clients = []
    while (message := await control.receive()) is not None:
        if message.kind == "client":
            assert message.fd is not None
            clients.append(socket.socket(fileno=message.fd))
            if acts and "die" in what:
                control.send("ended", cause="the stub was asked to die")
                os._exit(what["die"])


def http() -> None:
    from nanoengine.server.auth import Keys
    from nanoengine.server.gate import Gate
    from nanoengine.server.http_process import run_process

    class Stub:
        """Streams numbers; it knows of the engine only whether its socket is open."""

        def __init__(self, config: ServerConfig, plugin_files: Sequence[str]) -> None:
            self.config, self.plugin_files = config, plugin_files
            self.alive, self.came, self.closed = False, asyncio.Event(), asyncio.Event()
            if "unfit" in plugin_files:
                raise ConfigError("the stub cannot serve this")

        @property
        def hanging(self) -> bool:
            return not self.alive or "hanging" in self.plugin_files

        @property
        def connected(self) -> bool:
            return self.alive

        def prepare(self) -> None:
            pass

        async def app(self) -> Any:
            await self.came.wait()
            if "unfit later" in self.plugin_files:
                raise ConfigError("the stub cannot serve this model")
            return self.answer

        def gate(self, inside: Any) -> Any:
            return Gate(inside, self.config, Keys({}))

        def connect(self, sock: socket.socket) -> None:
            self.watch = asyncio.create_task(self._watch(sock))

        async def _watch(self, sock: socket.socket) -> None:
            reader, self.writer = await asyncio.open_connection(sock=sock)
            self.alive = True
            self.came.set()
            await reader.read()
            self.alive = False

        async def close(self, why: str) -> None:
            self.closed.set()

        async def answer(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/break":
                self.writer.close()
            status = 200 if self.alive or scope["path"] not in ("/ready", "/health") else 503
            await send({"type": "http.response.start", "status": status, "headers": []})
            query = scope["query_string"].decode() or "1"
            number = int(query) if query.isdigit() else sys.maxsize
            for each in range(number):
                if number == sys.maxsize and Path(query).exists():
                    break
                await send(
                    {"type": "http.response.body", "body": f"{os.getpid()} {each}\n".encode(), "more_body": True}
                )
                if number > 1:
                    try:
                        await asyncio.wait_for(self.closed.wait(), 0.02)
                        await send({"type": "http.response.body", "body": b"aborted\n", "more_body": True})
                        break
                    except TimeoutError:
                        pass
            await send({"type": "http.response.body", "body": b""})

    run_process(Stub)


if __name__ == "__main__":
    match sys.argv[1]:
        case "server":
            sys.exit(server(json.loads(sys.argv[2])))
        case "engine":
            asyncio.run(engine())
        case "http":
            del sys.argv[1]
            http()
