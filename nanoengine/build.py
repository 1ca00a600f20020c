"""From a user's choice to an `EnginePlan` (find the model, choose the parts, fill in every option left open), and from
that to a running engine (executor, tokenizer, parameters, scheduler, outputs)."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanoengine.api.attention import AttentionBackend, AttentionNeed
from nanoengine.api.draft_checks import CheckedDrafter
from nanoengine.api.drafters import HostDrafter
from nanoengine.api.errors import (
    ConfigError,
    GrammarError,
    ModelError,
    ModelSourceError,
    NanoEngineError,
    ParamsError,
    RequestError,
    TokenizerMissing,
    UnsupportedError,
    forget_locals,
)
from nanoengine.api.grammars import Constraint, Grammar, GrammarBackend, GrammarContext
from nanoengine.api.model import Model
from nanoengine.api.parallel import ShapesOnly, SingleRank
from nanoengine.api.plugin_calls import name_of, plugin_call
from nanoengine.api.sources import ModelSource, SourceContext, cache_root
from nanoengine.api.specs import ModelSpec
from nanoengine.core.engine import Engine
from nanoengine.core.execution.executor import Executor, InProcessExecutor
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.messages import SchedulerConfig
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.scheduling.speculation import Speculation
from nanoengine.core.step import num_slots
from nanoengine.distributed.checks import check_devices, check_importable
from nanoengine.distributed.executor import WorkersExecutor
from nanoengine.layers.config_keys import Recorded, unread_keys
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.engine_plan import EnginePlan, ProcessorPlan, QuantizationPlan
from nanoengine.params.grammars import Grammars
from nanoengine.params.input_processor import InputProcessor
from nanoengine.params.pooling import PoolingDefaults
from nanoengine.params.preparation import Preparations
from nanoengine.params.sampling_fields import legal_fields
from nanoengine.params.sampling_params import ParamsResolver
from nanoengine.params.speculation import MAX_DRAFTS
from nanoengine.setup.config.model_options import option_hint
from nanoengine.setup.plugins.choose import (
    Skipped,
    choose_attention,
    choose_grammars,
    from_class,
    load_checked,
    refused,
    unsupported_reasons,
)
from nanoengine.setup.plugins.policies import choose_policy, make_policy
from nanoengine.setup.plugins.registry import Registered, Registry
from nanoengine.setup.plugins.sources import resolve_model
from nanoengine.setup.plugins.speculation import choose_speculation, make_drafter
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.setup.start.build_model import BuiltModel, build_model
from nanoengine.setup.start.choose_quantization import choose_methods, choose_quantization
from nanoengine.setup.start.clock import StartClock, StartReport
from nanoengine.setup.start.generation import GenerationDefaults, read_generation_defaults, read_json
from nanoengine.setup.start.memory import MemoryReport, check_host_holds
from nanoengine.setup.start.pooling import read_pooling_defaults, with_output_layer
from nanoengine.setup.start.starter import start_runner
from nanoengine.text import TemplateProcesses, Tokenizer, load_tokenizer

DEFAULT_BLOCK_SIZE = 16
DEFAULT_BATCHED_TOKENS: Mapping[str, int] = {"cpu": 2048, "cuda": 8192}
DEFAULT_STEP_TOKENS: Mapping[str, int] = {"cpu": 32, "cuda": 256}  # with drafts; measured in docs/speculation.md


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """The plan, what loads its targets in this process, and what the scheduler and the API must know.

    Attributes:
        skipped: attention backends that "auto" looked at before the one it took, each with its reasons.
        unread: keys of config.json that the model did not read and that are not known to be harmless, with their
            values.
        whole_prompts: as in `SchedulerConfig`.
        pooling: how the model makes embeddings. generates: it has an output layer.
    """

    plan: EnginePlan
    loader: TargetLoader
    model_path: Path
    vocab_size: int
    skipped: Skipped
    pooling: PoolingDefaults
    unread: tuple[str, ...] = ()
    whole_prompts: bool = False
    generates: bool = True

    def summary(self) -> str:
        """For the log: "attention torch (auto skipped triton: runs on cuda, not on cpu)"."""
        skipped = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in self.skipped)
        return f"attention {self.plan.attention_name}" + (f" (auto skipped {skipped})" if skipped else "")


@dataclass(frozen=True, slots=True)
class Inspected:
    """A model that was built without memory.

    Attributes:
        options: with device, dtype and lengths filled in. need: what it asks of an attention backend.
        unread, generates: as in `Assembly`. quantization: as in `EnginePlan`.
    """

    model: Registered[ModelSpec]
    hf_config: Mapping[str, Any]
    built: BuiltModel
    options: EngineOptions
    need: AttentionNeed
    unread: tuple[str, ...]
    generates: bool = True
    quantization: QuantizationPlan | None = None

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.built.model.parameters())


def find_model(source: str, registry: Registry, say: Any = None) -> Path:
    """Folder of the model that `source` names, from the first registered model source that has it.

    A source that cannot be loaded or made is skipped. Raises `ModelSourceError` where none has the model; the message
    names the skipped ones, too.
    """
    loader = TargetLoader(registry.plugin_files)
    ctx = SourceContext(cache_root(), say) if say is not None else SourceContext(cache_root())
    sources: list[tuple[str, ModelSource]] = []
    broken: list[str] = []
    for found in registry.sources():
        where = f"model source {found.spec.name!r} of {found.origin}"
        try:
            source_class = load_checked(loader, found.spec.target, ModelSource)
            with plugin_call("it failed in __init__", source_class):
                sources.append((where, source_class()))
        except NanoEngineError as error:
            broken.append(f"{where}: {error}")
    try:
        return resolve_model(source, sources, ctx, registry.source_names(), broken)
    except ModelSourceError as error:
        hints = option_hint(source, registry) + registry.failure_hint("model_sources")
        raise ModelSourceError(f"{error}{hints}") from error


def assemble(
    model_path: Path,
    attention: str | type[AttentionBackend],
    options: EngineOptions,
    registry: Registry,
    implementation: str | None = None,
) -> Assembly:
    """Choose the parts. `implementation`: name of the model plugin to use; default: the one for the architecture.

    Raises `ModelError`, `PluginError`, `UnsupportedError` or `ConfigError`.
    """
    seen = inspect_model(model_path, options, registry, implementation)
    if seen.options.device == "cpu":
        check_host_holds(seen.weight_bytes * options.tensor_parallel_size)
    name, target, local, skipped = _attention(attention, seen.need, registry, TargetLoader(registry.plugin_files))
    loader = TargetLoader(registry.plugin_files, local)
    options = _fill_block_size(seen.options, load_checked(loader, target, AttentionBackend))
    plan = EnginePlan(
        model_path=str(model_path),
        hf_config=seen.hf_config,
        model=seen.model.spec.target,
        attention_name=name,
        attention=target,
        processors=tuple(
            ProcessorPlan(
                name=s.spec.name, target=s.spec.target, columns=dict(s.spec.params.columns), origin=str(s.origin)
            )
            for s in registry.processors()
        ),
        options=options,
        policy=choose_policy(registry, options.scheduling_policy, options.policy_options),
        speculation=choose_speculation(registry, options.speculation),
        quantization=seen.quantization,
        plugin_files=registry.plugin_files,
    )
    check_importable(plan, local)
    return Assembly(
        plan=plan,
        loader=loader,
        model_path=model_path,
        vocab_size=seen.built.config.vocab_size,
        skipped=skipped,
        pooling=read_pooling_defaults(model_path, seen.hf_config, seen.built.config.hidden_size),
        unread=seen.unread,
        whole_prompts=needs_whole_prompts(seen.built),
        generates=seen.generates,
    )


def inspect_model(
    model_path: Path, options: EngineOptions, registry: Registry, implementation: str | None = None
) -> Inspected:
    """What the model is and what it needs. Raises `ModelError`, `PluginError` or `ConfigError`."""
    given = read_json(model_path / "config.json")
    with _naming(model_path):
        whole = with_output_layer(given, _architectures(given), lambda name: bool(registry.supporting(name)))
        hf_config = given if whole is None else whole
        found = registry.model_for(_architectures(hf_config), implementation)
    options = _fill_device(options, hf_config)
    recorded = Recorded(hf_config)
    with _naming(model_path):
        quantization = choose_quantization(registry, options.quantization, recorded)
        built = _inspect(TargetLoader(registry.plugin_files), found.spec.target, recorded, options, quantization)
        unread = tuple(unread_keys(recorded))
    options = _fill_lengths(options, built)
    return Inspected(
        found, hf_config, built, options, attention_need(built, options), unread, whole is None, quantization
    )


@contextmanager
def _naming(model_path: Path) -> Iterator[None]:
    """Within it, a `ModelError` gets the model's folder in front."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{model_path}: {error}") from error


def _architectures(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    found = hf_config.get("architectures") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ModelError(
            f'config.json: "architectures" must be a list of names, as in ["SomeForCausalLM"], not {found!r}'
        )
    return tuple(found)


def _inspect(
    loader: TargetLoader,
    target: str,
    hf_config: Mapping[str, Any],
    options: EngineOptions,
    quantization: QuantizationPlan | None,
) -> BuiltModel:
    """The model without memory, to learn what its attention layers need."""
    model_class: type[Model] = load_checked(loader, target, Model)
    dtype = getattr(torch, options.dtype)
    tp = SingleRank() if options.tensor_parallel_size == 1 else ShapesOnly(options.tensor_parallel_size)
    return build_model(
        model_class,
        hf_config,
        tp=tp,
        dtype=dtype,
        device=torch.device("meta"),
        max_model_len=options.max_model_len,
        choose=choose_methods(quantization, loader, options),
        expert_parallel=options.enable_expert_parallel,
        kv_dtype=options.kv_dtype,
    )


def _attention(
    chosen: str | type[AttentionBackend], need: AttentionNeed, registry: Registry, loader: TargetLoader
) -> tuple[str, str, Mapping[str, type[Any]], Skipped]:
    """Name and target of the backend, classes that only this process has, and the backends that were skipped."""
    if isinstance(chosen, str):
        found, skipped = choose_attention(registry, need, chosen, loader)
        return found.spec.name, found.spec.target, {}, skipped
    target, local = from_class(chosen, AttentionBackend)
    reasons = unsupported_reasons(chosen, need)
    if reasons:
        raise refused(f"attention backend {target}", reasons, registry, need, loader)
    return chosen.__name__, target, local, []


def attention_need(built: BuiltModel, options: EngineOptions) -> AttentionNeed:
    """What the model's attention layers need from a backend."""
    wanted = defaultdict[str, list[str]](list)
    for layer in built.attention_layers:
        for feature in sorted(layer.spec.features):
            wanted[feature].append(layer.name)
    return AttentionNeed(
        device=torch.device(options.device).type,
        dtype=options.dtype,
        head_sizes=frozenset(layer.kv_spec.head_size for layer in built.attention_layers),
        block_size=options.block_size,
        features=frozenset(wanted),
        wanted_by={feature: tuple(names) for feature, names in wanted.items()},
        kv_dtype=options.kv_dtype,
    )


def _fill_device(options: EngineOptions, hf_config: Mapping[str, Any]) -> EngineOptions:
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"engine.device is {device}, but this machine has no usable CUDA device; use device=cpu")
    check_devices(device, options.tensor_parallel_size)
    dtype = options.dtype
    if dtype == "auto":
        named = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        dtype = "float32" if device == "cpu" else _known_dtype(named)
    return replace(options, device=device, dtype=dtype)


def _known_dtype(name: str) -> Any:
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"config.json names dtype {name!r}; set engine.dtype to float32, bfloat16 or float16")
    return name


def _fill_lengths(options: EngineOptions, built: BuiltModel) -> EngineOptions:
    longest, whole = built.config.max_model_len, needs_whole_prompts(built)
    if options.max_model_len is not None and options.max_model_len > longest:
        raise ConfigError(f"engine.max_model_len is {options.max_model_len}, but the model was made for {longest}")
    device = torch.device(options.device).type
    longest = options.max_model_len or built.config.default_max_model_len or longest
    tokens = max(DEFAULT_BATCHED_TOKENS[device], longest if whole else 0)
    return replace(
        options,
        max_model_len=longest,
        max_num_batched_tokens=options.max_num_batched_tokens or tokens,
        enable_prefix_caching=options.enable_prefix_caching and not whole,
    )


def needs_whole_prompts(built: BuiltModel) -> bool:
    """Whether some layer's attention looks ahead, so that a prompt is right only if one step computes all of it."""
    return not all(layer.spec.causal for layer in built.attention_layers)


def _fill_block_size(options: EngineOptions, backend: type[AttentionBackend]) -> EngineOptions:
    multiple = backend.capabilities.block_multiple
    return replace(options, block_size=options.block_size or -(-DEFAULT_BLOCK_SIZE // multiple) * multiple)


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
    tokenizer = None
    if not options.skip_tokenizer_init:
        processes = TemplateProcesses(options.chat_template_timeout, options.chat_template_memory)
        tokenizer = load_tokenizer(assembly.model_path, max_tokens=options.max_model_len, processes=processes)
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
        if isinstance(executor, InProcessExecutor):
            memory = executor.start(partial(start_runner, plan, assembly.loader, SingleRank()))
        else:
            memory = executor.start(plan)
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
