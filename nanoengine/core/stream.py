"""One request's outputs, as an iterator."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from nanoengine.core.arguments import Prompt, split_prompt
from nanoengine.core.request import RequestOutput
from nanoengine.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanoengine.core.engine import Engine


class Stream(Iterator[RequestOutput]):
    """Cumulative outputs of one request, as they come. `close()` (or the end of its `with`) aborts what is left."""

    def __init__(
        self, engine: Engine, request_id: str, prompt: Prompt, params: SamplingParams, priority: int | None
    ) -> None:
        # Outputs are cumulative: of those that come while others make the engine step, the latest is enough.
        self._engine, self._outputs = engine, deque[RequestOutput](maxlen=1)
        self._ended = False
        self.request_id = request_id
        given, text = split_prompt(prompt)
        engine.add_request(request_id, given, params, priority, prompt_text=text, sink=self._outputs.append)

    def __next__(self) -> RequestOutput:
        while not self._outputs:
            if self._ended:
                raise StopIteration
            self._engine.advance()
        output = self._outputs.popleft()
        self._ended = self._ended or output.finished
        return output

    def close(self) -> None:
        """Abort the request if it still runs. Idempotent."""
        if not self._ended:
            self._ended = True
            self._outputs = deque()  # the engine may still fill the old one
            self._engine.abort_request(self.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_ended"):
            self.close()
