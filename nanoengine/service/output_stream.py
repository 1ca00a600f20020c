"""`OutputStream`: the outputs of one request, for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from nanoengine.api.deltas import RequestDelta
from nanoengine.api.errors import RequestError
from nanoengine.api.outputs import RequestOutput
from nanoengine.service.client import RequestStream
from nanoengine.text.outputs import OutputAssembler


class OutputStream(AsyncIterator[RequestOutput]):
    """The outputs of one request, as they come; several that a slow reader did not take are one. The request begins
    with the first iteration. Dropping the stream, closing it, or cancelling an iteration aborts the request."""

    def __init__(
        self,
        request_id: str,
        add: Callable[[], Awaitable[tuple[OutputAssembler, RequestStream]]],
        *,
        delta: bool,
    ) -> None:
        self.request_id, self._add, self._delta = request_id, add, delta
        self._stream: RequestStream | None = None
        self._assembler: OutputAssembler | None = None
        self._error: RequestError | None = None  # that is raised next
        self._ended = False

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        try:
            if self._stream is None:
                self._assembler, self._stream = await self._add()
            return await self._next(self._stream)
        except BaseException:  # also cancellation: a task that is kept would keep its frames, and so this stream
            self.close()
            raise

    async def _next(self, stream: RequestStream) -> RequestOutput:
        assembler = self._assembler
        assert assembler is not None
        while self._error is None:
            delta = await anext(stream)
            if delta.error is not None:
                self._error = delta.error
                if not delta.samples:
                    break
                delta = delta._replace(error=None, finished=False)
            self._take(stream, assembler, delta)
            if assembler.error is not None:
                self._error = assembler.error
                break
            output = assembler.new_output() if self._delta else assembler.output()
            if output is not None:
                if output.finished:
                    self.close()
                return output
        raise self._error

    def _take(self, stream: RequestStream, assembler: OutputAssembler, delta: RequestDelta) -> None:
        for index in assembler.take(delta):
            stream.abort_sample(index)

    def close(self) -> None:
        """Abort the request if it still runs; the stream ends. Idempotent."""
        self._ended = True
        if self._stream is not None:
            self._stream.close()

    async def aclose(self) -> None:
        """`close`, for `contextlib.aclosing`."""
        self.close()
