"""A service from an `LLM`: what clients must know of it, and its counters."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nanoengine.service.client import EngineInfo
from nanoengine.service.contracts import Limits, Meter
from nanoengine.service.limits import QueueLimits
from nanoengine.service.loop import EngineService
from nanoengine.service.options import ServiceOptions

if TYPE_CHECKING:
    from nanoengine.api.stats import EngineStats
    from nanoengine.llm import LLM

_CAPTURE_NEXT = "nanoengine.setup.start.capture:capture_next"


def service_of(llm: LLM, *, limits: Limits | None = None, meter: Meter | None = None) -> EngineService:
    """A service of this engine, not started yet. From its start on only the service makes the engine's steps."""
    parts: dict[str, Any] = {"limits": limits, "meter": meter}
    if llm._built.assembly.plan.options.idle_captures:
        parts["idle"] = lambda: all(llm._built.executor.call(_CAPTURE_NEXT))
    return EngineService(llm.engine, llm._built.inputs, info_of(llm), lambda: _stats(llm), **parts)


def parts_of(options: ServiceOptions) -> dict[str, Any]:
    """What `service_of` takes: what the service refuses and counts. Raises `ImportError` if prometheus-client is needed
    and not installed."""
    parts: dict[str, Any] = {}
    if options.limits is not None:
        parts["limits"] = QueueLimits(options.limits)
    if options.metrics is not None:
        from nanoengine.service.metrics import Metrics

        parts["meter"] = Metrics(options.metrics, options.model_name)
    return parts


def _stats(llm: LLM) -> EngineStats:
    """Read while the engine may make a step: every count is one that was right at some moment."""
    built = llm._built
    return replace(built.engine.scheduler.stats(), preparing=len(built.preparations.tasks))


def info_of(llm: LLM) -> EngineInfo:
    """What clients must know of this engine."""
    built = llm._built
    assembly, memory = built.assembly, built.memory
    options = assembly.plan.options
    assert options.max_model_len is not None
    return EngineInfo(
        model=str(assembly.model_path),
        tokenizer=None if built.tokenizer is None else str(assembly.model_path),
        vocab_size=assembly.vocab_size,
        max_model_len=options.max_model_len,
        max_n=options.max_n,
        max_logprobs=options.max_logprobs,
        sampling_names=llm.sampling_names,
        default_sampling=llm.default_params.given_fields(),
        default_unsupported=built.defaults.unsupported,
        end_ids=built.defaults.eos_ids,
        reasoning=options.structured_outputs.reasoning,
        pooling=assembly.pooling,
        scheduling_policy=options.scheduling_policy,
        chat_template_timeout=options.chat_template_timeout,
        chat_template_memory=options.chat_template_memory,
        block_size=memory.block_size,
        num_blocks=memory.num_blocks,
        max_num_seqs=memory.max_num_seqs,
        max_num_batched_tokens=memory.max_num_batched_tokens,
        pid=os.getpid(),
    )
