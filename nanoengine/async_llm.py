"""`AsyncLLM`: the engine for asyncio. It runs in a process of its own, or on a thread of this one."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from nanoengine.api.deltas import Pooling
from nanoengine.api.embeddings import EmbeddingOutput
from nanoengine.api.errors import EngineClosed, ParamsError, RequestError, TokenizerMissing
from nanoengine.params.arguments import (
    ChatOptions,
    GivenPrompt,
    Prompt,
    check_one_prompt,
    check_params,
    check_priority,
    checked_ids,
    checked_name,
    encoded_prompt,
    one_name,
    split_prompt,
    template_variables,
)
from nanoengine.params.pooling import PoolingChoice, choose_pooling, split_to_pool
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.params.signatures import AsyncLLMSignature
from nanoengine.service.client import ClientRequest, EngineClient, Health, RequestStream, ServiceStats
from nanoengine.service.output_stream import OutputStream
from nanoengine.service.source import EngineSource, fits_a_process
from nanoengine.service.started import StartedEngine, start_here, start_process
from nanoengine.service.text import checked_on_this_side
from nanoengine.setup.config.engine_options import engine_options
from nanoengine.setup.keywords import check_options, missing_member, names_keywords
from nanoengine.setup.plugins.discover import discover_given
from nanoengine.setup.plugins.sources import with_revision
from nanoengine.text.outputs import OutputAssembler

if TYPE_CHECKING:
    from nanoengine.api.attention import AttentionBackend
    from nanoengine.text import Tokenizer

Message = Mapping[str, Any]
_LONG_TEXT = 20_000  # characters: encoding more would hold the event loop up


@names_keywords
class AsyncLLM(AsyncLLMSignature):
    """A model, ready to generate, for asyncio.

    Making it takes as long as making an `LLM`, and holds the event loop up; use it as an async context manager, or
    `close` it. Any number of requests may be open; several event loops may use it.

    Args:
        process: run the engine in a process of its own: the event loop and the engine then share no interpreter.
            attention must then be a name, and plugins paths or modules. False: on a thread of this process. None: in a
            process of its own, if attention and plugins are such.
        log_level: the lowest level that a process of its own logs.
        The others: as of `LLM`.

    Raises what `LLM` raises.
    """

    __signature__ = inspect.signature(AsyncLLMSignature)

    if not TYPE_CHECKING:  # which reads the signature of `AsyncLLMSignature`

        def __init__(
            self,
            model: str | Path,
            *,
            revision: str | None = None,
            attention: str | type[AttentionBackend] = "auto",
            implementation: str | None = None,
            plugins: Sequence[Any] = (),
            process: bool | None = None,
            log_level: str = "warning",
            **options: Any,
        ) -> None:
            self._choose(model, revision, attention, implementation, plugins, process, log_level, options)

        __init__.__doc__ = AsyncLLMSignature.__init__.__doc__

        def __getattr__(self, name: str) -> Any:
            """Python calls this for a name that it does not find."""
            raise AttributeError(missing_member(AsyncLLM, name), name=name, obj=self)

    def _choose(
        self,
        model: str | Path,
        revision: str | None,
        attention: str | type[AttentionBackend],
        implementation: str | None,
        plugins: Sequence[Any],
        process: bool | None,
        log_level: str,
        options: Mapping[str, Any],
    ) -> None:
        several = _several(plugins)
        if not (fits_a_process(attention, several) if process is None else process):
            from nanoengine.llm import LLM

            llm = LLM(
                model, revision=revision, attention=attention, implementation=implementation, plugins=plugins, **options
            )
            self._begin(start_here(llm))
            return
        check_options(AsyncLLM, options, discover_given(plugins))
        named, checked = with_revision(str(model), revision), engine_options(options)
        source = EngineSource.of_parts(named, attention, implementation, checked, None, several)
        self._begin(start_process(source, log_level))

    @classmethod
    def from_config(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        *,
        plugins: Sequence[Any] = (),
        process: bool | None = None,
        log_level: str = "warning",
    ) -> Self:
        """An AsyncLLM as a YAML file describes it, with overrides as on the command line ("sampler.top_p=0.9")."""
        self, several = cls.__new__(cls), _several(plugins)
        if not (fits_a_process("", several) if process is None else process):
            from nanoengine.llm import LLM

            self._begin(start_here(LLM.from_config(path, overrides, plugins=plugins)))
            return self
        from nanoengine.setup.config.config import load_config

        config = load_config(path, overrides, registry=discover_given(plugins))
        self._begin(start_process(EngineSource.of_config(config, several), log_level))
        return self

    def _begin(self, engine: StartedEngine) -> None:
        self._engine, self.info, self._tokenizer = engine, engine.info, engine.tokenizer
        self._end = weakref.finalize(self, engine.end)  # also when it is dropped, and when the interpreter ends
        self._clients: dict[asyncio.AbstractEventLoop, asyncio.Task[EngineClient]] = {}
        self._ids = itertools.count()
        self._closed = False
        self.default_params = SamplingParams(**engine.info.default_sampling)

    # -- generation ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        delta: bool = False,
        priority: int | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> OutputStream:
        """Generate for a prompt: `async for output in llm.generate(...)`. Leaving the loop aborts the request.

        Args:
            prompt: as of `LLM.generate`, one of them.
            params: None: the model's generation_config, or the configuration's `sampler`.
            request_id: unique among the open requests; None: one is made.
            delta: outputs have only what is new since the one before: of the samples that have something new, the new
                text, token ids and log-probs. Otherwise each output has all so far.
            priority: lower runs first. It takes effect with scheduling_policy "priority".
            sampling_params: vLLM's name of `params`.

        Raises:
            ParamsError: for what is wrong with the arguments: here, or by the first iteration. Iterating also raises
                `TokenizerMissing`, and the `RequestError` of a request that is refused or fails, after its outputs.
        """
        given = one_name(params, sampling_params)
        check_one_prompt(prompt, "call generate once for each of them")
        parts = split_prompt(prompt)

        async def made() -> GivenPrompt:
            return parts

        return self._stream(made, given, request_id, priority, delta)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        delta: bool = False,
        priority: int | None = None,
        sampling_params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> OutputStream:
        """Generate the next message of a conversation. `options`: see `ChatOptions`. The rest is as of `generate`."""
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise ParamsError(f"messages must be a list of messages, not {messages!r}")
        variables = template_variables(options)

        async def rendered() -> GivenPrompt:
            return await asyncio.to_thread(self._need_tokenizer().rendered, messages, variables)

        return self._stream(rendered, one_name(params, sampling_params), request_id, priority, delta)

    def _stream(
        self,
        prompt: Callable[[], Awaitable[GivenPrompt]],
        params: Any,
        request_id: str | None,
        priority: int | None,
        delta: bool,
    ) -> OutputStream:
        checked = check_params(self.default_params if params is None else params)
        check_priority(priority)
        name = self._name(request_id)
        return OutputStream(name, partial(self._add, name, prompt, checked, priority), delta=delta)

    def _name(self, request_id: str | None) -> str:
        return f"async-{next(self._ids)}" if request_id is None else checked_name("request_id", request_id)

    async def _add(
        self,
        request_id: str,
        prompt: Callable[[], Awaitable[GivenPrompt]],
        params: SamplingParams,
        priority: int | None,
    ) -> tuple[OutputAssembler, RequestStream]:
        client = await self._client()
        ids, text, generated, wrong = await self._encoded(await prompt())
        given = checked_on_this_side(request_id, ids, params, generated, self.info, self._tokenizer)
        error = given.error or wrong
        if error is not None:
            raise error
        assembler = OutputAssembler(given, self._tokenizer, text)
        request = ClientRequest(
            request_id=request_id,
            prompt_token_ids=given.prompt_token_ids,
            params=params,
            priority=priority,
            generated=tuple(begun.token_ids for begun in given.begun),
        )
        return assembler, await client.add(request)

    async def _encoded(self, given: GivenPrompt) -> tuple[Any, str | None, Any, RequestError | None]:
        """Token ids; text; generated tokens; what is wrong with the text. None of it is checked."""

        def encode(text: str) -> list[int]:
            return self._need_tokenizer().encode(text)

        if isinstance(given.prompt, str) and len(given.prompt) > _LONG_TEXT:
            ids, text, wrong = await asyncio.to_thread(encoded_prompt, given.prompt, given.text, encode)
        else:
            ids, text, wrong = encoded_prompt(given.prompt, given.text, encode)
        return ids, text, given.generated, wrong

    async def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        *,
        dimensions: int | None = None,
        priority: int | None = None,
    ) -> list[EmbeddingOutput]:
        """A vector for each prompt, in input order; all as of `LLM.embed`. Cancelling it aborts what has not ended."""
        assert self.info.pooling is not None, "every engine makes embeddings"
        choice, level = choose_pooling(self.info.pooling, pooling, normalize, dimensions), check_priority(priority)
        tasks = [asyncio.create_task(self._embedded(given, choice, level)) for given in split_to_pool(prompts)]
        try:
            return [await task for task in tasks]
        finally:
            for task in tasks:
                task.cancel()

    async def _embedded(self, given: GivenPrompt, choice: PoolingChoice, priority: int | None) -> EmbeddingOutput:
        name = f"async-{next(self._ids)}"
        ids, text, _, wrong = await self._encoded(given)
        checked = checked_ids(ids, self.info.vocab_size, self.info.max_model_len, new_tokens=0)
        output = EmbeddingOutput(
            request_id=name, prompt=text, prompt_token_ids=() if isinstance(checked, RequestError) else checked
        )
        try:
            if isinstance(checked, RequestError):
                raise checked
            if wrong is not None:
                raise wrong
            request = ClientRequest(
                request_id=name,
                prompt_token_ids=checked,
                params=SamplingParams(),
                priority=priority,
                pooling=choice.pooling,
            )
            with await (await self._client()).add(request) as stream:
                return output.ended([delta async for delta in stream][-1], choice.finish)
        except RequestError as error:
            return replace(output, error=error)

    async def abort(self, request_id: str) -> None:
        """End a request: its last output has what it has so far. No effect where none of this id is open."""
        await (await self._client()).abort(request_id)

    # -- around it -------------------------------------------------------------------------------------------------

    @property
    def sampling_names(self) -> frozenset[str]:
        """The fields of `SamplingParams` that this engine knows: its own, and those of its logits processors."""
        return self.info.sampling_names

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used: the model has a tokenizer with a chat template."""
        return self._tokenizer is not None and self._tokenizer.has_chat_template

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer; raises `TokenizerMissing` where there is none."""
        return self._need_tokenizer().hf

    async def client(self) -> EngineClient:
        """The engine's client of this event loop: requests and deltas of token ids, as a server uses them."""
        return await self._client()

    async def health(self) -> Health:
        """Whether the engine makes progress, and takes requests."""
        return (await self._client()).health

    async def stats(self) -> ServiceStats:
        """Counts, now and since the start."""
        return await (await self._client()).stats()

    async def drain(self, seconds: float) -> bool:
        """Take no new requests, and wait for the open ones. True: all have ended within so many seconds."""
        return await (await self._client()).drain(seconds)

    async def close(self) -> None:
        """Drop what runs and give the memory back. Idempotent. Afterwards `generate` and the like raise
        `EngineClosed`."""
        self._closed = True
        mine = self._clients.pop(asyncio.get_running_loop(), None)
        if mine is not None:
            await asyncio.wait([mine])
            if not mine.cancelled():
                await mine.result().close()
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """`close`, outside of an event loop. Waits for the step that runs."""
        self._closed = True
        self._clients.clear()
        self._end()

    def __repr__(self) -> str:
        return f"<AsyncLLM {self.info.model}: max_model_len={self.info.max_model_len}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _client(self) -> EngineClient:
        if self._closed:
            raise EngineClosed
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients = {each: task for each, task in self._clients.items() if not each.is_closed()}
            self._clients[loop] = loop.create_task(self._engine.connect())
        return await asyncio.shield(self._clients[loop])

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise TokenizerMissing("this engine has no tokenizer; give token ids, or a folder with tokenizer.json")
        return self._tokenizer


def _several(plugins: Any) -> Sequence[Any]:
    return [plugins] if isinstance(plugins, str | Path) else list(plugins or ())
