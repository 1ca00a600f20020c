"""One request's outputs, as an iterator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from nanoengine.api.errors import RequestError
from nanoengine.api.outputs import RequestOutput
from nanoengine.params.arguments import Prompt, split_prompt
from nanoengine.params.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanoengine.text_engine import TextEngine


class _Mailbox:
    """Outputs that the stream has not returned yet. The engine refers to it and not to the stream: a stream that is
    dropped is collected, and so aborts its request.

    Outputs are cumulative: of several that come between two reads, the latest is enough.
    """

    def __init__(self) -> None:
        self.output: RequestOutput | None = None
        self.error: RequestError | None = None

    def put(self, output: RequestOutput) -> None:
        if output.error is None:
            self.output = output
        else:  # it has no tokens: the output before it is still to be returned
            self.error = output.error


class Stream(Iterator[RequestOutput]):
    """Iterates over one request's cumulative outputs, as they come. `close()`, or the end of its `with`, aborts it.

    The `RequestError` of a request that is refused or fails is raised after the outputs that it had. Ctrl-C closes the
    stream.
    """

    def __init__(
        self, engine: TextEngine, request_id: str, prompt: Prompt, params: SamplingParams, priority: int | None
    ) -> None:
        self._engine, self._box = engine.engine, _Mailbox()
        self._ended = False
        self.request_id = request_id
        given, text, generated = split_prompt(prompt)
        engine.add_request(
            request_id, given, params, priority, prompt_text=text, generated=generated, sink=self._box.put
        )

    def __next__(self) -> RequestOutput:
        try:
            while self._box.output is None and self._box.error is None:
                if self._ended:
                    raise StopIteration
                self._engine.advance()
        except KeyboardInterrupt:
            self.close()
            raise
        if self._box.output is not None:
            output, self._box.output = self._box.output, None
            self._ended = self._ended or output.finished
            return output
        assert self._box.error is not None
        error, self._box.error, self._ended = self._box.error, None, True
        raise error

    def close(self) -> None:
        """Abort the request if it still runs. Idempotent."""
        if not self._ended:
            self._ended = True
            self._box = _Mailbox()  # the engine may still put outputs into the old one
            self._engine.abort_request(self.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_ended"):
            self.close()
