"""From a user's choice to an `EnginePlan`: finds the model, chooses the parts, fills in every option left open."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanoengine.api.attention import AttentionBackend, AttentionNeed
from nanoengine.api.errors import (
    ConfigError,
    ModelError,
    ModelSourceError,
    NanoEngineError,
)
from nanoengine.api.model import Model
from nanoengine.api.parallel import ShapesOnly, SingleRank
from nanoengine.api.plugin_calls import plugin_call
from nanoengine.api.sources import ModelSource, SourceContext, cache_root
from nanoengine.api.specs import ModelSpec
from nanoengine.distributed.checks import check_devices, check_importable
from nanoengine.layers.config_keys import Recorded, unread_keys
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.engine_plan import EnginePlan, ProcessorPlan, QuantizationPlan
from nanoengine.params.pooling import PoolingDefaults
from nanoengine.setup.config.model_options import option_hint
from nanoengine.setup.plugins.choose import (
    Skipped,
    choose_attention,
    from_class,
    load_checked,
    refused,
    unsupported_reasons,
)
from nanoengine.setup.plugins.policies import choose_policy
from nanoengine.setup.plugins.registry import Registered, Registry
from nanoengine.setup.plugins.sources import resolve_model
from nanoengine.setup.plugins.speculation import choose_speculation
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.setup.start.build_model import BuiltModel, build_model
from nanoengine.setup.start.choose_quantization import choose_methods, choose_quantization
from nanoengine.setup.start.generation import read_json
from nanoengine.setup.start.memory import check_host_holds
from nanoengine.setup.start.pooling import read_pooling_defaults, with_output_layer

DEFAULT_BLOCK_SIZE = 16
DEFAULT_BATCHED_TOKENS: Mapping[str, int] = {"cpu": 2048, "cuda": 8192}
_TOGETHER_TOKENS, _TOGETHER_HIDDEN = 1024, 1024  # default of `prompts_together`, and of which models


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
        prompts_together=_together(options, built),
        enable_prefix_caching=options.enable_prefix_caching and not whole,
    )


def _together(options: EngineOptions, built: BuiltModel) -> int:
    """By default where it was measured: graphs of a model whose products of some hundred tokens are short."""
    if options.prompts_together is not None:
        return options.prompts_together
    graphs = torch.device(options.device).type == "cuda" and options.graph_mixed_steps and not options.enforce_eager
    return _TOGETHER_TOKENS if graphs and built.config.hidden_size <= _TOGETHER_HIDDEN else 0


def needs_whole_prompts(built: BuiltModel) -> bool:
    """Whether some layer's attention looks ahead, so that a prompt is right only if one step computes all of it."""
    return not all(layer.spec.causal for layer in built.attention_layers)


def _fill_block_size(options: EngineOptions, backend: type[AttentionBackend]) -> EngineOptions:
    multiple = backend.capabilities.block_multiple
    return replace(options, block_size=options.block_size or -(-DEFAULT_BLOCK_SIZE // multiple) * multiple)
