"""The engine for callers with text: it encodes prompts, and makes `RequestOutput`s of what the engine reports."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from nanoengine.api.deltas import RequestDelta
from nanoengine.api.embeddings import EmbeddingOutput
from nanoengine.api.errors import WorkerError, is_failure, text_failure
from nanoengine.api.outputs import RequestOutput
from nanoengine.build_engine import BuiltEngine
from nanoengine.core.engine import Engine
from nanoengine.params.arguments import encoded_prompt
from nanoengine.params.generated import Generated
from nanoengine.params.input_processor import CheckedRequest
from nanoengine.params.pooling import PoolingChoice
from nanoengine.params.resolver import ResolvedParams
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.text.detokenizer import IncrementalDetokenizer
from nanoengine.text.outputs import OutputAssembler

TEXT_BLOCK = 32  # tokens whose text is decoded at once where only the final output is wanted
OutputSink = Callable[[RequestOutput], None]
EmbeddingSink = Callable[[EmbeddingOutput], None]
_NO_TOKENS = SamplingParams()


@dataclass(frozen=True, slots=True)
class _Client:
    """Gets one request's deltas, and passes on what they make."""

    engine: Engine
    assembler: OutputAssembler
    final_only: bool
    sink: OutputSink
    delta: bool = False

    def put(self, delta: RequestDelta) -> None:
        assembler = self.assembler
        if assembler.finished:  # by a stop string: the rest is of no use
            return
        for index in assembler.take(delta):
            self.engine.abort_request(delta.request_id, index)
        if assembler.finished and not delta.finished:
            self.engine.abort_request(delta.request_id)  # the rest, where its text failed
            self.engine.apply_inbox()  # now, so that its id is free when its last output is there
        if assembler.finished or not self.final_only:
            output = assembler.new_output() if self.delta else assembler.output()
            if output is not None:
                self.sink(output)


class TextEngine:
    """Requests with text, over an engine that knows tokens only. Any thread may call it, as the engine."""

    def __init__(self, built: BuiltEngine) -> None:
        self.engine, self._built, self._tokenizer = built.engine, built, built.tokenizer
        self._ready: deque[RequestOutput] = deque()
        self._make_reader = partial(IncrementalDetokenizer.from_params, built.tokenizer)

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        priority: int | None = None,
        *,
        prompt_text: str | None = None,
        generated: Generated = (),
        final_only: bool = False,
        delta: bool = False,
        sink: OutputSink | None = None,
    ) -> None:
        """Add a request; it starts with the next `step()`.

        Args:
            request_id, priority, generated: as in `Engine.add_request`.
            prompt: text, or token ids.
            prompt_text: what `RequestOutput.prompt` shows when ids are given; valid Unicode.
            final_only: one output, at the end, instead of one a step.
            delta: outputs have only what is new since the one before. Not with `final_only`.
            sink: is called with this request's outputs, which `step()` then does not return. If it raises, that is
                logged and this request is aborted; nothing else is affected.

        Raises:
            ParamsError, TokenizerMissing, EngineClosed, RequestError("duplicate_id"). A prompt that cannot be run
            raises nothing: its output has an error; so if its generated tokens end it already.
        """
        self.engine.check_open()
        ids, text, wrong = encoded_prompt(prompt, prompt_text, self._encode)
        given = self._built.inputs.process(request_id, ids, params, priority, generated, make_reader=self._make_reader)
        if wrong is not None and given.error is None:
            given = replace(given, error=wrong)
        given, assembler = self._assembler(given, text)
        client = _Client(self.engine, assembler, final_only, self._ready.append if sink is None else sink, delta)
        self.engine.add_checked(given, self._every(given.params) if final_only else 1, client.put)

    def add_embedding(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        choice: PoolingChoice,
        priority: int | None = None,
        *,
        prompt_text: str | None = None,
        sink: EmbeddingSink,
    ) -> None:
        """Add a request that pools. `sink` is called once, with its embedding. The rest is as in `add_request`."""
        self.engine.check_open()
        ids, text, wrong = encoded_prompt(prompt, prompt_text, self._encode)
        given = self._built.inputs.process(request_id, ids, _NO_TOKENS, priority, pooling=choice.pooling)
        if wrong is not None and given.error is None:
            given = replace(given, error=wrong)

        output = EmbeddingOutput(request_id=request_id, prompt=text, prompt_token_ids=given.prompt_token_ids)

        def put(delta: RequestDelta) -> None:
            if delta.finished:
                sink(output.ended(delta, choice.finish))

        self.engine.add_checked(given, sink=put)

    def abort_request(self, request_id: str) -> None:
        """End a request; its last output has the tokens so far. No effect where the id is unknown or has ended."""
        self.engine.abort_request(request_id)

    def has_unfinished_requests(self) -> bool:
        """Whether a request runs, or an output has not gone to its client yet."""
        return bool(self._ready) or self.engine.has_unfinished_requests()

    def step(self) -> list[RequestOutput]:
        """`Engine.advance`, and return the outputs of requests without a sink. Outputs are cumulative.

        An empty list does not mean that the engine is done: see `has_unfinished_requests`.
        """
        try:
            self.engine.advance()
        except WorkerError as error:
            error.outputs = self._take_ready()
            raise
        return self._take_ready()

    def _take_ready(self) -> list[RequestOutput]:
        return [self._ready.popleft() for _ in range(len(self._ready))]

    def _encode(self, text: str) -> list[int]:
        return self._built.need_tokenizer().encode(text)

    def _every(self, params: ResolvedParams) -> int:
        """Text and log-probs are made in blocks, while the device works. A stop string must be found where it comes."""
        if (self._tokenizer is None or not params.detokenize) and params.logprobs is None:
            return sys.maxsize
        return 1 if params.stop else TEXT_BLOCK

    def _assembler(self, given: CheckedRequest, text: str | None) -> tuple[CheckedRequest, OutputAssembler]:
        """Also the request, with an error where the tokenizer raised one."""
        try:
            return given, OutputAssembler(given, self._tokenizer, text)
        except BaseException as error:
            if not is_failure(error):
                raise
            given = replace(given, error=text_failure(error))
            return given, OutputAssembler(given, self._tokenizer, text)
