"""From an `EnginePlan` to a running engine: executor, tokenizer, parameters, scheduler, outputs."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

from nanoengine.api.errors import NanoEngineError, ParamsError, RequestError, TokenizerMissing
from nanoengine.build import Assembly
from nanoengine.core.engine import Engine, EngineLimits
from nanoengine.core.execution.executor import Executor, InProcessExecutor
from nanoengine.core.options import EngineOptions
from nanoengine.core.outputs import OutputProcessor
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.scheduler import Scheduler, SchedulerConfig
from nanoengine.distributed.executor import WorkersExecutor
from nanoengine.params.sampling_fields import legal_fields
from nanoengine.params.sampling_params import ParamsResolver
from nanoengine.setup.plugins.registry import Registry
from nanoengine.setup.start.clock import StartClock, StartReport
from nanoengine.setup.start.generation import GenerationDefaults, read_generation_defaults
from nanoengine.setup.start.memory import MemoryReport
from nanoengine.setup.start.shortage import forget_locals
from nanoengine.text import TemplateProcesses, Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class _ParamsContext:
    vocab_size: int
    max_model_len: int
    tokenizer: Tokenizer | None

    def encode(self, text: str) -> list[int]:
        try:
            return _need(self.tokenizer).encode(text, add_special_tokens=False)
        except RequestError as error:
            shown = text if len(text) < 50 else f"{text[:40]}..."
            raise ParamsError(f"{shown!r} in the parameters has no tokens: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine and what the API needs beside it.

    Attributes:
        tokenizer: tokenizer, or None. defaults: what the model's folder says of generation.
        memory: what the KV cache and the weights take. start: how long the phases of the start took.
    """

    engine: Engine
    executor: Executor
    assembly: Assembly
    tokenizer: Tokenizer | None
    resolver: ParamsResolver
    defaults: GenerationDefaults
    memory: MemoryReport
    start: StartReport

    def need_tokenizer(self) -> Tokenizer:
        return _need(self.tokenizer)

    def counters(self) -> dict[str, int]:
        """The scheduler's counters, and how many samples it holds now."""
        scheduler = self.engine.scheduler
        return {**asdict(scheduler.stats()), "running": len(scheduler.running), "waiting": len(scheduler.waiting)}

    def model(self) -> nn.Module:
        if not isinstance(self.executor, InProcessExecutor):
            raise NanoEngineError("the model is only at hand where it runs in this process: with one rank")
        return self.executor.running().model

    def close(self) -> None:
        self.engine.close()
        if self.tokenizer is not None:
            self.tokenizer.close()


def build_engine(assembly: Assembly, registry: Registry, clock: StartClock) -> BuiltEngine:
    """Raises what loading raises; nothing is left running then. `clock` gets the phases from here on."""
    plan, options = assembly.plan, assembly.plan.options
    if options.tensor_parallel_size == 1 and options.device.startswith("cuda"):
        threading.Thread(target=_wake, args=(options.device,), name="nanoengine-wake", daemon=True).start()
    tokenizer = None
    if not options.skip_tokenizer_init:
        processes = TemplateProcesses(options.chat_template_timeout, options.chat_template_memory)
        tokenizer = load_tokenizer(assembly.model_path, max_tokens=options.max_model_len, processes=processes)
    clock.lap("tokenizer")
    stages = [(found.spec.name, found.spec.params) for found in registry.stages()]
    assert options.max_model_len is not None
    ctx = _ParamsContext(assembly.vocab_size, options.max_model_len, tokenizer)
    legal = {name for _, params in stages for name in params.__dataclass_fields__}  # type: ignore[attr-defined]
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
    legal_fields(stages)  # a clash is found before the weights are loaded
    executor: Executor = InProcessExecutor() if options.tensor_parallel_size == 1 else WorkersExecutor()
    try:
        memory = executor.start(plan, assembly.loader)
        clock.lap_around("workers", memory.phases)
        resolver = ParamsResolver(
            stages,
            ctx,
            defaults.eos_ids,
            memory.failed_stages,
            registry.suspects("samplers"),
            max_n=options.max_n,
            max_logprobs=options.max_logprobs,
        )
        engine = Engine(
            EngineLimits(
                vocab_size=assembly.vocab_size,
                seed=options.seed,
                overlap=options.overlap,
            ),
            partial(_scheduler, options, memory),
            executor,
            OutputProcessor(tokenizer),
            resolver,
            lambda text: _need(tokenizer).encode(text),
        )
    except BaseException as error:
        executor.shutdown()
        forget_locals(error)  # whoever keeps the error keeps no memory with it
        raise
    clock.lap("engine")
    return BuiltEngine(
        engine=engine,
        executor=executor,
        assembly=assembly,
        tokenizer=tokenizer,
        resolver=resolver,
        defaults=defaults,
        memory=memory,
        start=clock.report(),
    )


def _wake(device: str) -> None:
    """Make the GPU's context, which takes a while and leaves the interpreter free, while the tokenizer loads."""
    with suppress(Exception):  # the runner meets it again, and says so
        torch.cuda.synchronize(device)


def _scheduler(options: EngineOptions, memory: MemoryReport) -> Scheduler:
    assert options.max_model_len is not None
    config = SchedulerConfig(
        max_num_seqs=memory.max_num_seqs,
        max_num_batched_tokens=memory.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        enable_prefix_caching=options.enable_prefix_caching,
        policy=options.scheduling_policy,
        steady_rows=options.steady_rows,
        spare_slots=options.spare_slots,
        admission_reserve=options.admission_reserve,
    )
    blocks = BlockManager(
        groups=memory.num_groups,
        num_blocks=memory.num_blocks + 1,
        block_size=memory.block_size,
        enable_prefix_caching=options.enable_prefix_caching,
    )
    return Scheduler(config, blocks)


def _need(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise TokenizerMissing("this engine has no tokenizer; give token ids, or a model folder with tokenizer.json")
    return tokenizer
