"""One request's outputs, as an iterator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from nanoengine.api.errors import RequestError
from nanoengine.core.outputs import RequestOutput
from nanoengine.params.arguments import Prompt, split_prompt
from nanoengine.params.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanoengine.core.engine import Engine


class _Mailbox:
    """What has come and was not given yet. The engine holds it, and not the stream, which so ends when it is dropped.

    Outputs are cumulative: of those that come while others make the engine step, the latest is enough.
    """

    def __init__(self) -> None:
        self.output: RequestOutput | None = None
        self.error: RequestError | None = None

    def put(self, output: RequestOutput) -> None:
        if output.error is None:
            self.output = output
        else:  # it has no tokens; those that came before are still to be given
            self.error = output.error


class Stream(Iterator[RequestOutput]):
    """Cumulative outputs of one request, as they come. `close()` (or the end of its `with`) aborts what is left.

    A request that fails, or is refused, raises its `RequestError` behind what it had given. Ctrl-C closes it.
    """

    def __init__(
        self, engine: Engine, request_id: str, prompt: Prompt, params: SamplingParams, priority: int | None
    ) -> None:
        self._engine, self._box = engine, _Mailbox()
        self._ended = False
        self.request_id = request_id
        given, text = split_prompt(prompt)
        engine.add_request(request_id, given, params, priority, prompt_text=text, sink=self._box.put)

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
            self._box = _Mailbox()  # the engine may still fill the old one
            self._engine.abort_request(self.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_ended"):
            self.close()
