"""The Python API: `LLM`. A client of the engine: it adds requests, makes steps, and returns outputs in input order."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, cast

from nanoengine.api.embeddings import EmbeddingOutput, ScoreOutput, scored
from nanoengine.api.errors import (
    ModelError,
    ParamsError,
    RequestError,
    WorkerError,
)
from nanoengine.api.outputs import RequestOutput
from nanoengine.api.stats import EngineStats
from nanoengine.build import assemble, find_model
from nanoengine.build_engine import BuiltEngine, build_engine
from nanoengine.observe.progress import Progress, note
from nanoengine.observe.steps import Observer, add_observer, remove_observer
from nanoengine.params.arguments import (
    ChatOptions,
    GivenPrompt,
    OnError,
    Prompt,
    check_on_error,
    check_one_prompt,
    check_params,
    check_priority,
    is_conversation,
    is_one,
    one_each,
    one_name,
    split_prompt,
    split_prompts,
    template_variables,
)
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.field_types import conform
from nanoengine.params.pooling import PoolingChoice, choose_pooling, pairs, split_to_pool
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.params.signatures import LLMSignature
from nanoengine.setup.config.engine_options import engine_options
from nanoengine.setup.keywords import check_options, missing_member, names_keywords
from nanoengine.setup.plugins.discover import discover_given
from nanoengine.setup.plugins.registry import Registry
from nanoengine.setup.plugins.sources import with_revision
from nanoengine.setup.start.clock import StartClock, StartReport
from nanoengine.setup.start.wake import wake_gpu
from nanoengine.stream import Stream
from nanoengine.text_engine import TextEngine

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nanoengine.api.attention import AttentionBackend
    from nanoengine.api.deltas import Pooling
    from nanoengine.core.engine import Engine
    from nanoengine.observe.taps import Tap
    from nanoengine.setup.config.config import RunConfig
    from nanoengine.setup.start.memory import MemoryReport

Message = Mapping[str, Any]
Output = TypeVar("Output", RequestOutput, EmbeddingOutput)
_log = logging.getLogger("nanoengine")
ADDED_BESIDE = 8  # prompts between two looks at whether a step has ended, where others wait: they take a millisecond


@names_keywords
class LLM(LLMSignature):
    """A model, ready to generate.

    Args:
        model: a registered name, a folder, a .gguf file, a hub id.
        revision: branch, tag or commit of a hub id ("owner/name@revision" says the same).
        attention: name of an attention backend, "auto", or a backend class.
        implementation: name of the model plugin to use where several have the model's architecture.
        plugins: further plugins: paths of .py files, or modules or objects with hooks.
        options: options of the engine, the fields of `EngineOptions`. docs/reference.md lists them.

    Raises:
        ConfigError, PluginError, ModelError, ModelSourceError, WeightsError, UnsupportedError: see each; all are
        `NanoEngineError`s, and nothing is left running.
    """

    __signature__ = inspect.signature(LLMSignature)

    if not TYPE_CHECKING:  # which reads the signature of `LLMSignature`

        def __init__(
            self,
            model: str | Path,
            *,
            revision: str | None = None,
            attention: str | type[AttentionBackend] = "auto",
            implementation: str | None = None,
            plugins: Sequence[Any] = (),
            **options: Any,
        ) -> None:
            self._choose(model, revision, attention, implementation, plugins, options)

        __init__.__doc__ = LLMSignature.__init__.__doc__

        def __getattr__(self, name: str) -> Any:
            """Python calls this for a name that it does not find."""
            raise AttributeError(missing_member(LLM, name), name=name, obj=self)

    def _choose(
        self,
        model: str | Path,
        revision: str | None,
        attention: str | type[AttentionBackend],
        implementation: str | None,
        plugins: Sequence[Any],
        options: Mapping[str, Any],
    ) -> None:
        clock, registry = StartClock(), discover_given(plugins)
        clock.lap("plugins")
        check_options(LLM, options, registry)
        model, checked = with_revision(str(model), revision), engine_options(options)
        self._start(model, implementation, attention, checked, registry, None, clock)

    @classmethod
    def from_config(cls, path: str | Path, overrides: Sequence[str] = (), *, plugins: Sequence[Any] = ()) -> Self:
        """An LLM as a YAML file describes it, with overrides as on the command line ("sampler.top_p=0.9")."""
        from nanoengine.setup.config.config import load_config

        clock, registry = StartClock(), discover_given(plugins)
        config = load_config(path, overrides, registry=registry)
        clock.lap("plugins")
        return cls.from_run_config(config, registry=registry, clock=clock)

    @classmethod
    def from_run_config(
        cls,
        config: RunConfig,
        *,
        registry: Registry,
        say: Callable[[str], None] | None = None,
        clock: StartClock | None = None,
    ) -> Self:
        """An LLM as a composed configuration describes it.

        `say` is called with a line of text where fetching a model takes time. `clock`: the phases of the start so far.
        """
        self = cls.__new__(cls)
        model, backend = config.model, config.attention.backend
        self._start(
            model.pinned,
            model.implementation,
            backend,
            config.engine,
            registry,
            config.sampler,
            clock or StartClock(),
            say,
        )
        return self

    def _start(
        self,
        model: str,
        implementation: str | None,
        attention: str | type[AttentionBackend],
        options: EngineOptions,
        registry: Registry,
        sampler: Mapping[str, Any] | None,
        clock: StartClock,
        say: Callable[[str], None] | None = None,
    ) -> None:
        path = find_model(model, registry, say or note)
        clock.lap("model source")
        wake_gpu(options)  # while the parts are chosen
        assembly = assemble(path, attention, options, registry, implementation)
        clock.lap("choice")
        self._built: BuiltEngine = build_engine(assembly, registry, clock)
        _log.info("%s: %s; %s", model, self.start_report.line(), assembly.summary())
        self.engine: Engine = self._built.engine
        self.text_engine = TextEngine(self._built)
        self._ids = itertools.count()
        self.source = model
        self._hinted = False  # at `chat`
        try:
            self.default_params = self._default_params(sampler, path)
        except BaseException:
            self.close()
            raise
        for key in assembly.unread:
            _log.warning("%s: config.json: the model does not read %s, and its meaning is not known", model, key)

    def _default_params(self, sampler: Mapping[str, Any] | None, path: Path) -> SamplingParams:
        """Those of the configuration, else of generation_config.json; what of that is not supported is logged."""
        defaults = self._built.defaults
        try:
            params = SamplingParams(**(defaults.sampling if sampler is None else sampler))
            self._built.resolver.resolve(params)
        except ParamsError as error:
            if sampler is not None:
                raise
            raise ModelError(f"{path / 'generation_config.json'}: {error}") from error
        if sampler is None:
            for line in defaults.unsupported:
                _log.warning("%s", line)
        return params

    # -- generation ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        use_tqdm: bool = True,
        on_error: OnError = "return",
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate for each prompt; outputs in input order.

        Args:
            prompts: one or several of: text, token ids, {"prompt": text}, {"prompt_token_ids": ids}. With
                "generated_token_ids" in a dict the request goes on behind these tokens of its output (of each sample,
                where n > 1), as `generated` of `Engine.add_request` says.
            params: for all, or one each; None: the model's generation_config, or the configuration's `sampler`.
            priority: for all, or one each; lower runs first. It takes effect with scheduling_policy "priority".
            on_error: "return": the output of a prompt that fails has an `error`, and the others finish. "raise": the
                `RequestError` of the first prompt that fails is raised, and the others are aborted.
            sampling_params: vLLM's name of `params`.

        Raises:
            ParamsError, TokenizerMissing: before anything runs.
            RequestError: with `on_error="raise"`.
            WorkerError: a rank failed. Its `outputs` are those of the prompts; the ones that had finished are complete.
        """
        given = split_prompts(prompts)
        self._hint_at_chat(given)
        return self._run(given, one_name(params, sampling_params), priority, use_tqdm, on_error)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_error: OnError = "return",
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Generate the next message of one conversation, or of each of several.

        `options`: see `ChatOptions`. `on_error`: as of `generate`. `sampling_params`: vLLM's name of `params`.

        The template decides which roles there are, as in vLLM. A message of an unusual role that the template skips is
        refused, and so are a mistyped role ("usr") and content that is neither text nor text parts. The output of a
        refused conversation has an `error`, in its place; the others finish.
        """
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise ParamsError(f"messages must be a list of messages, or a list of such lists, not {messages!r}")
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if one else messages
        variables = template_variables(options)
        tokenizer = self._built.need_tokenizer()
        prompts = [tokenizer.rendered(c, variables) for c in conversations]
        return self._run(prompts, one_name(params, sampling_params), None, use_tqdm, on_error)

    def chat_prompt(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> list[int]:
        """Token ids of a conversation under the model's chat template. `options`: see `ChatOptions`.

        Raises `TokenizerMissing`, or `RequestError("invalid_prompt")` for messages that the template refuses.
        """
        variables = template_variables(options)
        return self._built.need_tokenizer().apply_chat_template(messages, **variables)

    @property
    def sampling_names(self) -> frozenset[str]:
        """The fields of `SamplingParams` that this engine knows: its own, and those of its logits processors."""
        return self._built.resolver.names

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used: the model has a tokenizer with a chat template."""
        return self._built.tokenizer is not None and self._built.tokenizer.has_chat_template

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        delta: bool = False,
        priority: int | None = None,
        sampling_params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream:
        """Start a request and iterate over its outputs. Several streams may be open; closing one aborts its request.

        Args:
            prompt: one prompt, as of `generate`, or the messages of one conversation, as of `chat`.
            delta: each output has only what is new since the one before: of the samples that have something new, the
                new text, token ids and log-probs. Otherwise each output has all so far.
            priority: as of `generate`.
            sampling_params: vLLM's name of `params`.
            options: of messages: see `ChatOptions`.

        Raises:
            ParamsError, TokenizerMissing. Iterating raises the `RequestError` of a request that is refused or fails,
                after the outputs that it had.
        """
        given = one_name(params, sampling_params)
        checked = check_params(self.default_params if given is None else given)
        if is_conversation(prompt):
            parts = self._built.need_tokenizer().rendered(prompt, template_variables(options))
        else:
            check_one_prompt(prompt, "for several call generate, or open a stream for each of them")
            if options:
                raise ParamsError(f"{next(iter(options))} is for messages, and the prompt is none")
            parts = split_prompt(cast(Prompt, prompt))
        return Stream(self.text_engine, self._next_id(), parts, checked, priority, conform("delta", delta, bool))

    def _hint_at_chat(self, prompts: Sequence[GivenPrompt]) -> None:
        """Logs once that the model is for conversations, where the first text has no control token of one."""
        tokenizer = self._built.tokenizer
        if self._hinted or tokenizer is None or not tokenizer.has_chat_template:
            return
        text = next((each.prompt for each in prompts if isinstance(each.prompt, str)), None)
        if text is not None:
            self._hinted = True
            if not any(token in text for token in tokenizer.named_special_texts):
                _log.warning(
                    "generate continues the text as it is. This model has a chat template: for an answer call "
                    'llm.chat([{"role": "user", "content": text}])'
                )

    # -- embeddings ------------------------------------------------------------------------------------------------

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        *,
        dimensions: int | None = None,
        priority: int | Sequence[int] | None = None,
        use_tqdm: bool = True,
        on_error: OnError = "return",
    ) -> list[EmbeddingOutput]:
        """A vector for each prompt, of the hidden states of its tokens; outputs in input order.

        Args:
            prompts: as of `generate`, each of at most `max_model_len` tokens.
            pooling: "mean" of all tokens, or "last". None: as the model's sentence-transformers files say, else "last".
            normalize: scale vectors to length 1. None: as these files say, else True.
            dimensions: keep so many values of each vector; for models that were trained for it.
            priority, on_error: as of `generate`.

        Raises:
            ParamsError, TokenizerMissing: before anything runs.
            RequestError: with `on_error="raise"`.
        """
        choice = choose_pooling(self._built.assembly.pooling, pooling, normalize, dimensions)
        return self._embed(split_to_pool(prompts), choice, priority, use_tqdm, on_error)

    def _embed(
        self, prompts: Sequence[GivenPrompt], choice: PoolingChoice, priority: Any, use_tqdm: bool, on_error: OnError
    ) -> list[EmbeddingOutput]:
        raises = check_on_error(on_error)
        each_priority = one_each(priority, len(prompts), "priority")
        for level in each_priority:
            check_priority(level)

        def add(index: int, request_id: str, sink: Callable[[EmbeddingOutput], None]) -> None:
            prompt, text, _ = prompts[index]
            self.text_engine.add_embedding(
                request_id, prompt, choice, each_priority[index], prompt_text=text, sink=sink
            )

        return self._finish_all(prompts, add, use_tqdm, raises)

    def score(
        self,
        first: Prompt | Sequence[Prompt],
        second: Prompt | Sequence[Prompt],
        pooling: Pooling | None = None,
        *,
        use_tqdm: bool = True,
        on_error: OnError = "return",
    ) -> list[ScoreOutput]:
        """How similar prompts are: the cosine of the embeddings of one prompt and each of several, or of each and its
        own. `pooling`, `on_error` and errors: as of `embed`."""
        names, choice = ("first", "second"), choose_pooling(self._built.assembly.pooling, pooling, normalize=False)
        a, b = split_to_pool(first), split_to_pool(second)
        pairs(a, b, names)  # raises before anything runs
        found = self._embed(a + b, choice, None, use_tqdm, on_error)
        return [scored(*pair) for pair in pairs(found[: len(a)], found[len(a) :], names)]

    # -- inside ----------------------------------------------------------------------------------------------------

    def hidden_states(self, prompts: Prompt | Sequence[Prompt]) -> list[Tensor]:
        """What the model returns for each token of each prompt, after the last norm.

        Each [tokens, hidden_size], on the CPU. Raises as `tap` does.
        """
        return [taps[""].outputs[0] for taps in self.tap(prompts, [""])]

    def tap(self, prompts: Prompt | Sequence[Prompt], modules: Sequence[str]) -> list[dict[str, Tap]]:
        """Run prompts through the model and copy what passes through some of its modules.

        Args:
            prompts: as of `generate`. They run one by one, eagerly, without reading the prefix cache.
            modules: dotted names as in `llm.model.named_modules()`, of modules that are called with a row a token:
                layers, attention ("….attn": q, k and v as they are stored and compared), MLPs; "" is the model. Of what
                is divided over several ranks, rank 0's part.

        Returns:
            For each prompt, name -> `Tap`: the tensors that the module got, and those that it returned.

        Raises:
            ParamsError: for a module that is not there, or that does not run by itself.
            NanoEngineError: while requests are running. RequestError: for a prompt that cannot be run.
        """
        from nanoengine.observe.tapping import tap_prompt

        each: Any = [prompts] if is_one(prompts) else prompts

        def generating(prompt: Any) -> Callable[[SamplingParams], RequestOutput]:
            return lambda params: self.generate([prompt], params, use_tqdm=False)[0]

        built = self._built
        return [
            dict(tap_prompt(built.engine, built.executor, generating(prompt), modules, f"tap-{self._next_id()}"))
            for prompt in each
        ]

    def _run(
        self, prompts: Sequence[GivenPrompt], params: Any, priority: Any, use_tqdm: bool, on_error: OnError = "return"
    ) -> list[RequestOutput]:
        raises = check_on_error(on_error)
        each_params = one_each(self.default_params if params is None else params, len(prompts), "params")
        each_priority = one_each(priority, len(prompts), "priority")
        for given, level in zip(each_params, each_priority, strict=True):
            check_params(given)
            check_priority(level)
        first_use = {id(p): index for index, p in reversed(list(enumerate(each_params)))}
        for index in sorted(first_use.values()):  # all are checked before the first is added
            try:
                self._built.resolver.resolve(each_params[index])
            except ParamsError as error:
                if len(first_use) == 1:
                    raise
                raise ParamsError(f"params[{index}]: {error}") from error

        def add(index: int, request_id: str, sink: Callable[[RequestOutput], None]) -> None:
            prompt, text, generated = prompts[index]
            self.text_engine.add_request(
                request_id, prompt, each_params[index], each_priority[index], prompt_text=text, generated=generated,
                final_only=True, sink=sink,
            )  # fmt: skip

        return self._finish_all(prompts, add, use_tqdm, raises)

    def _finish_all(
        self,
        prompts: Sequence[GivenPrompt],
        add: Callable[[int, str, Callable[[Output], None]], None],
        use_tqdm: bool,
        raises: bool = False,
    ) -> list[Output]:
        """Adds all prompts, and makes steps until each has its output. `add`: adds the one of this index, under an id,
        with a sink for its one output. `raises`: the first error, and aborts the rest."""
        if any(type(each.prompt) is str for each in prompts):
            self._built.need_tokenizer()
        done: dict[str, Output] = {}
        failed: list[RequestError] = []
        ids = [self._next_id() for _ in prompts]
        tokens = 0  # added since the last launch
        with Progress(len(ids), "prompts", "prompt", shown=use_tqdm) as bar:

            def sink(output: Output) -> None:
                done[output.request_id] = output
                failed[:] = failed or ([output.error] if raises and output.error is not None else [])
                bar.update()

            try:
                for i, (prompt, *_) in enumerate(prompts):
                    add(i, ids[i], sink)
                    tokens += len(prompt) if type(prompt) in (list, tuple) else 0
                    if self._step_is_due(i + 1, tokens):
                        self.engine.keep_busy()  # adding some thousand requests takes a while
                        tokens = 0
                while len(done) < len(ids) and not failed:
                    self.engine.advance()
            except WorkerError as error:
                error.outputs = [each for i in ids if isinstance(each := done.get(i), RequestOutput)]
                raise
            finally:
                self._abort_all([i for i in ids if i not in done])
        if failed:
            raise failed[0]
        outputs = [done[i] for i in ids]
        self._log_failed(outputs)
        return outputs

    def _step_is_due(self, added: int, tokens: int) -> bool:
        """While prompts are being added: whether there is a full step, or one that the next prompts cannot belong to,
        since others wait already. tokens: of those added since the last step."""
        scheduler = self.engine.scheduler
        full = tokens >= scheduler.config.max_num_batched_tokens
        return scheduler.policy.by_arrival and (full or (added % ADDED_BESIDE == 0 and bool(scheduler.waiting)))

    def _log_failed(self, outputs: Sequence[RequestOutput | EmbeddingOutput]) -> None:
        """Logs the first error: a program that reads `outputs[0].text` of each prompt finds no text, and no cause."""
        failed = [(index, output.error) for index, output in enumerate(outputs) if output.error is not None]
        if failed:
            index, error = failed[0]
            _log.warning(
                "%d of %d prompts failed; prompt %d: %s: %s", len(failed), len(outputs), index, error.code, error
            )

    def _abort_all(self, ids: Sequence[str]) -> None:
        for request_id in ids:
            self.engine.abort_request(request_id)

    def _next_id(self) -> str:
        return f"llm-{next(self._ids)}"

    # -- around it -------------------------------------------------------------------------------------------------

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Within a `with`, call `observer` with each step's `StepRecord`. A list's `append` is one, and a `TraceFile`.

        It is called in the thread that makes the step. What it raises is raised there, after the step's outputs.
        """
        self.engine.check_open()
        self.engine.change_watch(partial(add_observer, observer))
        try:
            yield
        finally:
            self.engine.change_watch(partial(remove_observer, observer))

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer; raises `TokenizerMissing` where there is none."""
        return self._built.need_tokenizer().hf

    def stats(self) -> EngineStats:
        """Counts since the start: see `EngineStats`. Requests that were aborted before do not count as running."""
        self.engine.apply_inbox()
        stats = self.engine.scheduler.stats()
        stats.preparing, stats.grammars = len(self._built.preparations.tasks), self._built.grammars.stats()
        return stats

    @property
    def memory_report(self) -> MemoryReport:
        """What weights and KV cache take on the device, and the limits of a batch that memory holds."""
        return self._built.memory

    @property
    def start_report(self) -> StartReport:
        """How long the start took, phase by phase."""
        return self._built.start

    def reset_prefix_cache(self) -> None:
        """Forget what the prefix cache holds: needed after a change of weights. Raises while requests are running."""
        self.engine.reset_prefix_cache()

    @property
    def model(self) -> nn.Module:
        """The model itself, an ordinary `nn.Module`. Needs tensor_parallel_size=1: there it runs in this process."""
        return self._built.model()

    def close(self) -> None:
        """Stop and give the memory back. Idempotent. Afterwards `generate` and the like raise `EngineClosed`."""
        self._built.close()

    def __repr__(self) -> str:
        longest = self.engine.scheduler.config.max_model_len
        attention = self._built.assembly.summary().partition(" (")[0]  # without why others were not taken
        return f"<LLM {self.source}: {attention}, max_model_len={longest}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
