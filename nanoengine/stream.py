"""One request's outputs, as an iterator."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from nanoengine.api.errors import RequestError
from nanoengine.api.outputs import RequestOutput
from nanoengine.params.arguments import GivenPrompt
from nanoengine.params.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanoengine.text_engine import TextEngine


class _Mailbox:
    """Outputs that the stream has not returned yet. The engine refers to it and not to the stream: a stream that is
    dropped is collected, and so aborts its request.

    Of several cumulative outputs that come between two reads, the latest is enough. Deltas are all kept.
    """

    def __init__(self, delta: bool) -> None:
        self.outputs: deque[RequestOutput] = deque(maxlen=None if delta else 1)
        self.error: RequestError | None = None

    def put(self, output: RequestOutput) -> None:
        if output.error is None:
            self.outputs.append(output)
        else:  # it has no tokens: the output before it is still to be returned
            self.error = output.error


class Stream(Iterator[RequestOutput]):
    """Iterates over one request's outputs, as they come: each has all so far, or with `delta` only what is new.

    `close()`, or the end of its `with`, aborts the request.

    The `RequestError` of a request that is refused or fails is raised after the outputs that it had. Ctrl-C closes the
    stream.
    """

    def __init__(
        self,
        engine: TextEngine,
        request_id: str,
        given: GivenPrompt,
        params: SamplingParams,
        priority: int | None,
        delta: bool = False,
    ) -> None:
        self._engine, self._box = engine.engine, _Mailbox(delta)
        self._ended = False
        self.request_id = request_id
        prompt, text, generated = given
        engine.add_request(
            request_id, prompt, params, priority, prompt_text=text, generated=generated, delta=delta,
            sink=self._box.put,
        )  # fmt: skip

    def __next__(self) -> RequestOutput:
        try:
            while not self._box.outputs and self._box.error is None:
                if self._ended:
                    raise StopIteration
                self._engine.advance()
        except KeyboardInterrupt:
            self.close()
            raise
        if self._box.outputs:
            output = self._box.outputs.popleft()
            self._ended = self._ended or output.finished
            return output
        assert self._box.error is not None
        error, self._box.error, self._ended = self._box.error, None, True
        raise error

    def close(self) -> None:
        """Abort the request if it still runs. Idempotent."""
        if not self._ended:
            self._ended = True
            self._box = _Mailbox(False)  # the engine may still put outputs into the old one
            self._engine.abort_request(self.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_ended"):
            self.close()
