"""An engine that was started for this program: on a thread of this process, or in a process of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from nanoengine.api.errors import EngineUnavailable
from nanoengine.service.client import EngineClient, EngineInfo
from nanoengine.service.engine_process import EngineProcess
from nanoengine.service.source import EngineSource
from nanoengine.service.text import tokenizer_of

if TYPE_CHECKING:
    from nanoengine.llm import LLM
    from nanoengine.text import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """connect: makes a client for the event loop that runs. end: ends the engine; idempotent, in any thread.

    process: that of the engine; None: it is this one.
    """

    info: EngineInfo
    tokenizer: Tokenizer | None
    connect: Callable[[], Coroutine[Any, Any, EngineClient]]
    end: Callable[[], None]
    process: EngineProcess | None = None


def start_here(llm: LLM) -> StartedEngine:
    """A service makes the steps of this LLM, on a thread of its own."""
    from nanoengine.service.local import LocalClient
    from nanoengine.service.parts import service_of

    service = service_of(llm)
    service.start()

    def end() -> None:
        service.stop()
        llm.close()

    async def connect() -> EngineClient:
        return LocalClient(service)

    return StartedEngine(service.info, llm._built.tokenizer, connect, end)


def start_process(source: EngineSource, log_level: str) -> StartedEngine:
    """Returns when the engine's process is ready. Raises what `EngineProcess.wait_ready` raises."""
    from nanoengine.service.remote import RemoteClient

    process = EngineProcess.start(source, log_level=log_level)
    try:
        info = _run(process.wait_ready())
        tokenizer = tokenizer_of(info)
    except BaseException:
        process.close()
        raise

    def end() -> None:
        process.close()
        if tokenizer is not None:
            tokenizer.close()

    async def connect() -> EngineClient:
        client = RemoteClient(resume_seconds=0.0)
        try:
            client.connect(process.connect())
            await client.ready()
        except (OSError, EngineUnavailable):
            client.fail("the engine's process has ended")
        return client

    return StartedEngine(info, tokenizer, connect, end, process)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, also where an event loop runs in this thread."""
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(asyncio.run(work))
        except BaseException as error:  # noqa: BLE001 - it is raised below
            raised.append(error)

    thread = threading.Thread(target=run, name="nanoengine-start")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]
