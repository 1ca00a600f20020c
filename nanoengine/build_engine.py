"""From an `Assembly` to a running engine: executor, tokenizer, parameters, scheduler."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from nanoengine.api.draft_checks import CheckedDrafter
from nanoengine.api.drafters import HostDrafter
from nanoengine.api.errors import (
    GrammarError,
    NanoEngineError,
    ParamsError,
    RequestError,
    TokenizerMissing,
    UnsupportedError,
    forget_locals,
)
from nanoengine.api.grammars import Constraint, Grammar, GrammarBackend, GrammarContext
from nanoengine.api.parallel import SingleRank
from nanoengine.api.plugin_calls import name_of, plugin_call
from nanoengine.build import Assembly
from nanoengine.core.engine import Engine
from nanoengine.core.execution.executor import Executor, InProcessExecutor
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.messages import SchedulerConfig
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.scheduling.speculation import Speculation
from nanoengine.core.step import num_slots
from nanoengine.distributed.executor import WorkersExecutor
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.engine_plan import EnginePlan
from nanoengine.params.grammars import Grammars
from nanoengine.params.input_processor import InputProcessor
from nanoengine.params.preparation import Preparations
from nanoengine.params.resolver import ParamsResolver
from nanoengine.params.sampling_fields import legal_fields
from nanoengine.params.speculation import MAX_DRAFTS
from nanoengine.setup.plugins.choose import choose_grammars
from nanoengine.setup.plugins.policies import make_policy
from nanoengine.setup.plugins.registry import Registry
from nanoengine.setup.plugins.speculation import make_drafter
from nanoengine.setup.start.clock import StartClock, StartReport
from nanoengine.setup.start.generation import GenerationDefaults, read_generation_defaults
from nanoengine.setup.start.memory import MemoryReport
from nanoengine.setup.start.starter import start_runner
from nanoengine.setup.start.wake import compile_processes
from nanoengine.text import TemplateProcesses, Tokenizer, load_tokenizer

DEFAULT_STEP_TOKENS: Mapping[str, int] = {"cpu": 32, "cuda": 256}  # with drafts; measured in docs/speculation.md


@dataclass(frozen=True, slots=True)
class _ParamsContext:
    vocab_size: int
    max_model_len: int
    in_process: bool
    tokenizer: Tokenizer | None
    end_ids: frozenset[int]
    reasoning: str | int | None
    grammars: Grammars

    @property
    def num_tokens(self) -> int:
        return self.vocab_size if self.tokenizer is None else self.tokenizer.num_ids

    def grammar(self, constraint: Constraint) -> Grammar:
        return self.grammars.get(constraint)

    def encode(self, text: str) -> list[int]:
        try:
            return _need(self.tokenizer).encode(text, add_special_tokens=False)
        except RequestError as error:
            shown = text if len(text) < 50 else f"{text[:40]}..."
            raise ParamsError(f"{shown!r} in the parameters has no tokens: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine, with the parts that the API uses directly.

    Attributes:
        inputs: checks requests for the engine.
        defaults: sampling parameters and end tokens that the model's folder sets.
        memory: what the KV cache and the weights take. start: how long the phases of the start took.
    """

    engine: Engine
    inputs: InputProcessor
    executor: Executor
    assembly: Assembly
    tokenizer: Tokenizer | None
    grammars: Grammars
    preparations: Preparations
    resolver: ParamsResolver
    defaults: GenerationDefaults
    memory: MemoryReport
    start: StartReport

    def need_tokenizer(self) -> Tokenizer:
        return _need(self.tokenizer)

    def model(self) -> nn.Module:
        if not isinstance(self.executor, InProcessExecutor):
            raise NanoEngineError(
                "LLM.model needs tensor_parallel_size=1: only there does the model run in this process"
            )
        return self.executor.running().model

    def close(self) -> None:
        self.engine.close()
        self.grammars.close()
        if self.tokenizer is not None:
            self.tokenizer.close()


def build_engine(assembly: Assembly, registry: Registry, clock: StartClock) -> BuiltEngine:
    """Make and start the engine. `clock` gets the phases from here on.

    Raises what loading the tokenizer and the model raises; then nothing is left running.
    """
    plan, options = assembly.plan, assembly.plan.options
    if options.tensor_parallel_size == 1 and options.device.startswith("cuda"):
        threading.Thread(target=_wake, args=(options.device,), name="nanoengine-wake", daemon=True).start()
    tokenizer = _tokenizer(assembly)
    clock.lap("tokenizer")
    processors = [(found.spec.name, found.spec.params) for found in registry.processors()]
    assert options.max_model_len is not None
    legal = {name for _, params in processors for name in params.__dataclass_fields__}  # type: ignore[attr-defined]
    eos = tokenizer.eos_token_id if tokenizer is not None else None
    defaults = read_generation_defaults(
        assembly.model_path,
        plan.hf_config,
        legal,
        eos,
        has_tokenizer=tokenizer is not None,
        vocab_size=assembly.vocab_size,
        max_model_len=options.max_model_len,
    )
    grammars = _grammars(assembly, registry, tokenizer, defaults.eos_ids)
    ctx = _ParamsContext(
        assembly.vocab_size,
        options.max_model_len,
        options.tensor_parallel_size == 1,
        tokenizer,
        defaults.eos_ids,
        options.structured_outputs.reasoning,
        grammars,
    )
    constraints = options.structured_outputs
    preparations = Preparations(constraints.workers, constraints.timeout, grammars.counted_from)
    legal_fields(processors)  # raises on a clash, before the weights are loaded
    executor = InProcessExecutor() if options.tensor_parallel_size == 1 else WorkersExecutor()
    try:
        memory = _started(executor, assembly)
        clock.lap_around("workers", memory.phases)
        resolver = ParamsResolver(
            processors,
            ctx,
            defaults.eos_ids,
            memory.failed_processors,
            registry.failure_hint("samplers"),
            max_n=options.max_n,
            max_logprobs=options.max_logprobs,
            engine_options=EngineOptions.__dataclass_fields__,
        )
        inputs = InputProcessor(resolver, assembly.vocab_size, options.max_model_len, assembly.generates)
        engine = Engine(
            partial(_scheduler, assembly, memory),
            executor,
            inputs,
            preparations,
            seed=options.seed,
            overlap=options.overlap,
        )
    except BaseException as error:
        executor.shutdown()
        forget_locals(error)  # keeping the error must not keep the model's memory
        raise
    clock.lap("engine")
    return BuiltEngine(
        engine=engine,
        inputs=inputs,
        executor=executor,
        assembly=assembly,
        tokenizer=tokenizer,
        grammars=grammars,
        preparations=preparations,
        resolver=resolver,
        defaults=defaults,
        memory=memory,
        start=clock.report(memory.dequantised, memory.quantised),
    )


def _tokenizer(assembly: Assembly) -> Tokenizer | None:
    options = assembly.plan.options
    if options.skip_tokenizer_init:
        return None
    processes = TemplateProcesses(options.chat_template_timeout, options.chat_template_memory)
    return load_tokenizer(assembly.model_path, max_tokens=options.max_model_len, processes=processes)


def _started(executor: InProcessExecutor | WorkersExecutor, assembly: Assembly) -> MemoryReport:
    if isinstance(executor, InProcessExecutor):
        processes = compile_processes()
        try:
            make = partial(start_runner, assembly.plan, assembly.loader, SingleRank(), processes=processes)
            return executor.start(make)
        finally:
            if processes is not None:
                processes.close()
    return executor.start(assembly.plan)


def _grammars(assembly: Assembly, registry: Registry, tokenizer: Tokenizer | None, eos_ids: frozenset[int]) -> Grammars:
    """The engine's grammars. A backend that is chosen by name is looked up now, and "auto" when it is first needed."""
    options = assembly.plan.options.structured_outputs
    if options.backend != "auto":
        choose_grammars(registry, options.backend, assembly.loader)

    def make() -> GrammarBackend:
        try:
            backend = choose_grammars(registry, options.backend, assembly.loader)
        except UnsupportedError as error:
            raise RequestError("not_supported", str(error)) from error
        ctx = GrammarContext(
            tokenizer_json=_need(tokenizer).to_json(),
            vocab_size=assembly.vocab_size,
            end_ids=frozenset(i for i in eos_ids if 0 <= i < assembly.vocab_size),
            timeout=options.timeout,
        )
        with plugin_call(f"grammar backend {name_of(backend)} failed in __init__", backend, GrammarError):
            return backend(ctx)

    return Grammars(make, options)


def _wake(device: str) -> None:
    """Make the GPU's context while the tokenizer loads: it takes a while, without the interpreter."""
    with suppress(Exception):  # the runner gets the same error, and reports it
        torch.cuda.synchronize(device)


def _scheduler(assembly: Assembly, memory: MemoryReport) -> Scheduler:
    options = assembly.plan.options
    assert options.max_model_len is not None
    config = SchedulerConfig(
        max_num_seqs=memory.max_num_seqs,
        max_num_batched_tokens=memory.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        enable_prefix_caching=options.enable_prefix_caching,
        spare_slots=options.spare_slots,
        admission_reserve=options.admission_reserve,
        whole_prompts=assembly.whole_prompts,
        most_forced=_most_forced(assembly.plan),
        prompts_together=options.prompts_together or 0,
    )
    blocks = BlockManager(
        groups=memory.num_groups,
        num_blocks=memory.num_blocks + 1,
        block_size=memory.block_size,
        enable_prefix_caching=options.enable_prefix_caching,
    )
    policy = make_policy(assembly.plan.policy, assembly.loader)
    return Scheduler(config, blocks, policy, _speculation(assembly, config))


def _most_forced(plan: EnginePlan) -> int:
    """Where steps are graphs, as many as rows of the captured ones have: an eager step takes longer than the steps that
    it would save."""
    graphs = torch.device(plan.options.device).type == "cuda" and not plan.options.enforce_eager
    return (0 if plan.speculation is None else plan.speculation.tokens) if graphs else MAX_DRAFTS


def _speculation(assembly: Assembly, config: SchedulerConfig) -> Speculation | None:
    plan = assembly.plan.speculation
    if plan is None:
        return None
    device, checked = assembly.plan.options.device, None
    if not plan.device:  # the device's are the ranks'
        drafter = make_drafter(
            plan,
            assembly.loader,
            vocab_size=assembly.vocab_size,
            max_model_len=config.max_model_len,
            max_slots=num_slots(config.max_num_seqs, config.spare_slots),
            device=device,
        )
        assert isinstance(drafter, HostDrafter)
        checked = CheckedDrafter(drafter, plan.where)
    return Speculation(
        checked,
        tokens=plan.tokens,
        min_acceptance=plan.min_acceptance,
        step_tokens=plan.step_tokens or DEFAULT_STEP_TOKENS[torch.device(device).type],
    )


def _need(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise TokenizerMissing("this engine has no tokenizer; give token ids, or a model folder with tokenizer.json")
    return tokenizer
