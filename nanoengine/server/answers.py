"""The answer to a request for text: its generations run, and a renderer writes what they bring, streamed or whole."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from starlette.responses import Response

from nanoengine.api.errors import described, is_failure
from nanoengine.server.context import Context
from nanoengine.server.errors import ApiError, api_error
from nanoengine.server.events import Generation, Running, TokenUsage, Update
from nanoengine.server.gate import Receive, Scope, Send
from nanoengine.server.record import RECORD, Record
from nanoengine.server.sse import Writer, watch
from nanoengine.service.client import Usage

_INLINE = 256  # positions whose log-probs are written at once; more would stop the event loop for long
_log = logging.getLogger("nanoengine.server")


class Renderer(Protocol):
    """Makes bytes of updates: events of a stream, or at the end one body."""

    def take(self, number: int, run: Running, update: Update) -> bytes:
        """What is to be sent of this update of prompt `number`; b"" for nothing."""
        ...

    def end(self, runs: Sequence[Running]) -> bytes:
        """The last events, or the body."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """The last events of a stream that has begun, and fails."""
        ...


@dataclass(slots=True)
class Account:
    """What the record of a request gets, for the engine's counters too. arrival: monotonic; created: since the epoch;
    seconds."""

    context: Context
    client: str
    endpoint: str
    arrival: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    first_token: float | None = None
    status: int = 200

    def close(self, runs: Sequence[Running], record: Record) -> None:
        tokens, now = usage_of(runs), time.monotonic()
        record.usage = Usage(
            client=self.client,
            endpoint=self.endpoint,
            status=self.status,
            prompt_tokens=tokens.prompt_tokens,
            cached_tokens=tokens.cached_tokens,
            completion_tokens=tokens.completion_tokens,
            finish_reasons=tuple(reason or "abort" for run in runs for reason in run.finish_reasons),
            ttft=None if self.first_token is None else self.first_token - self.arrival,
            duration=now - self.arrival,
        )
        record.model, record.first_token = self.context.names[0], self.first_token
        if runs:
            record.params = runs[0].generation.params.given_fields()
            record.first_scheduled = runs[0].first_scheduled


def usage_of(runs: Sequence[Running]) -> TokenUsage:
    return sum((run.usage for run in runs), TokenUsage())


class Answer(Response):
    """Runs generations while it is sent. When the client goes, they are aborted.

    Args:
        request_id: that the client knows. stream: events, or one body.
    """

    def __init__(
        self,
        context: Context,
        account: Account,
        request_id: str,
        generations: Sequence[Generation],
        renderer: Renderer,
        stream: bool,
    ) -> None:
        self._context, self._account, self._id = context, account, request_id
        self._generations, self._renderer, self._stream = generations, renderer, stream
        self._runs: list[Running] = []
        self._gone = False
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = Writer(scope, send)
        helpers = [asyncio.create_task(watch(receive, self._leave))]
        try:
            await self._start()
            seconds = self._context.config.ping_seconds if self._stream else 0
            helpers += [asyncio.create_task(writer.ping(seconds))] if seconds else []
            await self._run(writer)
            if self._gone:
                self._account.status = 499
            else:
                await self._finish(writer, send)
        except BaseException as raised:
            if not is_failure(raised):
                raise
            await self._fail(writer, raised)
        finally:
            for helper in helpers:
                helper.cancel()
            self.close()
            self._account.close(self._runs, scope[RECORD])

    async def _start(self) -> None:
        """All of them, before anything is sent: what the engine refuses has its own HTTP status."""
        for generation in self._generations:
            if self._gone:
                return
            run = await Running.start(self._context.client, generation, self._context.tokenizer)
            self._runs.append(run)
            if self._gone:  # meanwhile
                run.close()

    def _leave(self) -> None:
        self._gone = True
        self.close()

    def close(self) -> None:
        for run in self._runs:
            run.close()

    async def _run(self, writer: Writer) -> None:
        if len(self._runs) == 1:
            await asyncio.create_task(self._pump(0, writer))
        else:
            async with asyncio.TaskGroup() as group:
                for number in range(len(self._runs)):
                    group.create_task(self._pump(number, writer))

    async def _pump(self, number: int, writer: Writer) -> None:
        run, take, write, account = self._runs[number], self._renderer.take, writer.write, self._account
        positions = 0  # of the prompt, whose log-probs wait for the first tokens
        while (update := await run.update()) is not None:
            if account.first_token is None and update.samples and run.pooled is None:
                account.first_token = time.monotonic()
            if update.prompt_logprobs is not None:
                positions += len(update.prompt_logprobs.token_ids)
            if positions > _INLINE and update.samples:
                positions, found = 0, update
                data = await self._context.in_thread(lambda found=found: take(number, run, found))  # type: ignore[misc]
            else:
                data = take(number, run, update)
            if data:
                await write(data)

    async def _finish(self, writer: Writer, send: Send) -> None:
        if self._stream:
            await writer.write(self._renderer.end(self._runs))
            await writer.end()
            return
        core = self._generations[0].params.core
        if core.logprobs is None and core.prompt_logprobs is None:
            body = self._renderer.end(self._runs)
        else:
            body = await self._context.in_thread(lambda: self._renderer.end(self._runs))
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": body})

    async def _fail(self, writer: Writer, raised: BaseException) -> None:
        """The error as an answer of its own, or as the last event of a stream that has begun."""
        cause: BaseException = raised
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        error = api_error(cause)
        self._account.status = 499 if self._gone else error.status
        if error.status >= 500 and not self._gone:
            bug = cause if error.status != 503 else None  # where there is no engine, no place in the code says more
            _log.error("request %s failed: %s", self._id, described(cause), exc_info=bug)
        if not writer.started:
            raise error from cause  # the application's handler answers
        if not self._gone:
            await writer.write(self._renderer.failed(error))
            await writer.end()
