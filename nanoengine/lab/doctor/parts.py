"""Checks plugins and their parts: whether each can be loaded, and which attention backend an engine would take."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from nanoengine.api.attention import AttentionBackend, AttentionNeed
from nanoengine.api.errors import NanoEngineError, described, is_failure
from nanoengine.api.grammars import GrammarBackend
from nanoengine.api.policies import Policy
from nanoengine.api.processors import LogitsProcessor
from nanoengine.api.sources import ModelSource
from nanoengine.api.tool_parsers import ToolParser
from nanoengine.lab.doctor.findings import Finding, Level, Verdict
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.plugins.choose import choose_grammars, load_checked, missing_modules, ranked_backends
from nanoengine.setup.plugins.registry import KIND_WORDS, Kind, Registered, Registry
from nanoengine.setup.plugins.speculation import drafter_base
from nanoengine.setup.plugins.targets import TargetLoader

_plugin = partial(Finding, section="plugins")
_model = partial(Finding, section="model")
_ALWAYS_USED = ("samplers", "model_sources")  # if two of these have the same name, no engine can start


def plugins(registry: Registry, *, load: bool, sampler: frozenset[str] = frozenset()) -> Iterator[Finding]:
    """Findings about failures, clashes and each part.

    Args:
        load: import the class of each part too, which imports torch.
        sampler: parameters that are set. A processor with one of these parameters must be loadable.
    """
    for failure in registry.failures:
        yield _plugin(
            name=str(failure.origin),
            level="warning",
            text=f"failed at {failure.at}: {failure.cause}",
            fix=failure.origin.fix,
            detail=failure.traceback,
        )
    for conflict in registry.conflicts:
        fatal = conflict.kind in _ALWAYS_USED
        yield _plugin(name=conflict.name, level="error" if fatal else "warning", text=str(conflict))
    try:
        registry.processors()
    except NanoEngineError as error:
        if not any(conflict.kind == "samplers" for conflict in registry.conflicts):
            yield _plugin(name="logits processors", level="error", text=str(error))
    for kind in get_args(Kind):
        for found in getattr(registry, kind).values():
            names = {f.name for f in fields(cast(Any, found.spec.params))} if kind == "samplers" else set()
            yield _part(kind, found, registry, load=load, wanted=bool(names & sampler))
    for root, origin in registry.config_roots:
        yield _plugin(name=root, text=f"config groups, {origin}")


def _part(kind: Kind, found: Registered[Any], registry: Registry, *, load: bool, wanted: bool) -> Finding:
    name, text = found.spec.name, f"{KIND_WORDS[kind]}, {found.origin}"
    missing = [m for m in getattr(found.spec, "requires", ()) if importlib.util.find_spec(m.partition(".")[0]) is None]
    if missing and kind == "commands":
        return _plugin(name=name, level="note", text=f"{text}: {missing_modules(found.spec)}")
    if not load or missing:  # `attention` reports the effect of a missing package
        return _plugin(name=name, text=text + (" (not loaded)" if missing or not load else ""))
    loader = TargetLoader(registry.plugin_files)
    try:
        if kind == "commands":
            from nanoengine.cli.commands import load_command

            load_command(registry, name)
        else:
            load_checked(loader, found.spec.target, _base(kind, found.spec))
    except NanoEngineError as error:
        level: Level = "error" if wanted else "warning"
        return _plugin(name=name, level=level, text=f"{text}: {error}", fix=_fix(found, error, loader))
    return _plugin(name=name, text=text)


def _fix(found: Registered[Any], error: NanoEngineError, loader: TargetLoader) -> str:
    """The fix for a part that cannot be loaded: correct a wrong target, or remove the plugin."""
    module, _, attribute = found.spec.target.partition(":")
    cause = error.__cause__
    no_module = isinstance(cause, ModuleNotFoundError) and f"{module}.".startswith(f"{cause.name}.")
    if no_module or (isinstance(cause, AttributeError) and cause.name in attribute.split(".")):
        correct = f"correct {type(found.spec).__name__}.target, now {loader.describe(found.spec.target)}"
        return f"{correct}; or {found.origin.fix}" if found.origin.fix else correct
    return found.origin.fix


def _base(kind: Kind, spec: Any) -> type[Any]:
    from nanoengine.api.model import Model
    from nanoengine.api.quantization import Quantization

    if kind == "drafters":
        return drafter_base(spec.device)
    bases: dict[Kind, type[Any]] = {
        "models": Model,
        "samplers": LogitsProcessor,
        "attention_backends": AttentionBackend,
        "model_sources": ModelSource,
        "grammars": GrammarBackend,
        "tool_parsers": ToolParser,
        "policies": Policy,
        "quantizations": Quantization,
    }
    return bases[kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What an engine would be made of. `source`: None if no model is given. `sampler`: parameters that are set."""

    source: str | None = None
    implementation: str | None = None
    attention: str = "auto"
    options: EngineOptions = field(default_factory=EngineOptions)
    sampler: frozenset[str] = frozenset()


def plain_need(options: EngineOptions) -> AttentionNeed:
    """What a typical model would need here, if no model is given: heads of 128, bfloat16 on a GPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(options.device).type if options.device != "auto" else device
    dtype = options.dtype if options.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    return AttentionNeed(device=device, dtype=dtype, head_sizes=frozenset({128}), block_size=options.block_size)


def grammars(registry: Registry, options: EngineOptions, sampler: frozenset[str]) -> Finding:
    """Whether outputs can be constrained: an error only if the configuration does so, or names a backend."""
    chosen = options.structured_outputs.backend
    wanted = "structured_outputs" in sampler or chosen != "auto"
    try:
        backend = choose_grammars(registry, chosen, TargetLoader(registry.plugin_files))
    except NanoEngineError as error:
        level: Level = "error" if wanted else "note"
        return Finding(section="structured outputs", name="grammar backend", level=level, text=str(error))
    return Finding(section="structured outputs", name="grammar backend", text=f"{chosen} takes {backend.__name__}")


def attention(need: AttentionNeed, registry: Registry, chosen: str) -> tuple[list[Verdict], list[Finding]]:
    """The verdict on every backend, and findings about them and the `chosen` one. Raises nothing."""
    loader = TargetLoader(registry.plugin_files)
    verdicts = [
        Verdict(name=f.spec.name, origin=str(f.origin), preference=f.spec.preference, reasons=tuple(reasons))
        for f, reasons in ranked_backends(registry, need, loader)
    ]
    sizes = ", ".join(map(str, sorted(need.head_sizes)))
    section = f"attention, for heads of {sizes} in {need.dtype} on {need.device}"
    findings = [_verdict(section, verdict, chosen) for verdict in verdicts]
    if chosen == "auto" and all(verdict.reasons for verdict in verdicts):
        findings.append(Finding(section=section, name="auto", level="error", text="no backend is supported"))
    if chosen != "auto" and chosen not in {verdict.name for verdict in verdicts}:
        findings.append(Finding(section=section, name=chosen, level="error", text=_unknown(registry, chosen)))
    return verdicts, findings


def _verdict(section: str, verdict: Verdict, chosen: str) -> Finding:
    where = f"preference {verdict.preference}, {verdict.origin}"
    if not verdict.reasons:
        return Finding(section=section, name=verdict.name, text=f"supported ({where})")
    return Finding(
        section=section,
        name=verdict.name,
        level="error" if chosen == verdict.name else "note",
        text=f"not supported: {'; '.join(verdict.reasons)} ({where})",
        fix="choose another one, or attention=auto" if chosen == verdict.name else "",
    )


def _unknown(registry: Registry, name: str) -> str:
    try:
        registry.attention(name)
    except NanoEngineError as error:
        return str(error)
    return "is registered, but was not checked"


def model_findings(asked: Asked, path: Path, registry: Registry) -> tuple[list[Finding], AttentionNeed]:
    """Findings about a model before its weights are read. Raises the errors of `inspect_model`."""
    from nanoengine.build import inspect_model

    seen = inspect_model(path, asked.options, registry, asked.implementation)
    options = seen.options
    findings = [
        _model(name="folder", text=str(path)),
        _model(name="implementation", text=f"{seen.model.spec.name}, {seen.model.origin}"),
        _model(
            name="engine",
            text=f"{options.dtype} on {options.device}, max_model_len {options.max_model_len}, "
            f"max_num_batched_tokens {options.max_num_batched_tokens}, max_num_seqs {options.max_num_seqs}",
        ),
        *(
            _model(name="config.json", level="note", text=f"{key}: {seen.model.spec.name} does not read this key")
            for key in seen.unread
        ),
        _fits(seen.weight_bytes, options),
        _tokenizer(path, options),
    ]
    return findings, seen.need


def _fits(weight_bytes: int, options: EngineOptions) -> Finding:
    import torch

    text = f"{weight_bytes / 2**30:.2f} GiB in {options.dtype}"
    device = torch.device(options.device)
    if device.type != "cuda":
        return _model(name="weights", text=text)
    free, total = torch.cuda.mem_get_info(device)
    room = free - total * (1 - options.gpu_memory_utilization)
    text += f"; {max(0.0, room) / 2**30:.1f} GiB of {options.device} may be used"
    if weight_bytes < room:
        return _model(name="weights", text=text)
    fix = "free GPU memory, raise engine.gpu_memory_utilization, or take a smaller model or dtype"
    return _model(name="weights", level="error", text=text, fix=fix)


def _tokenizer(path: Path, options: EngineOptions) -> Finding:
    if options.skip_tokenizer_init:
        return _model(name="tokenizer", text="not loaded: engine.skip_tokenizer_init is set")
    from nanoengine.text import load_tokenizer

    try:
        found = load_tokenizer(path)
    except BaseException as error:  # a broken transformers may raise anything
        if not is_failure(error):
            raise
        return _model(name="tokenizer", level="error", text=described(error))
    if found is None:
        fix = "copy tokenizer.json into the folder, or give prompts as token ids"
        return _model(name="tokenizer", level="warning", text="the folder has none: only token ids work", fix=fix)
    chat = "with" if found.has_chat_template else "without"
    return _model(name="tokenizer", text=f"{found.vocab_size} tokens, {chat} a chat template")
