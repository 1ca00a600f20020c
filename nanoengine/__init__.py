"""nanoengine: a small LLM inference engine. Every part that you may want to replace is a plugin.

Names are imported when they are first used, so `import nanoengine` and `nanoengine --help` load no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanoengine.api.embeddings import EmbeddingOutput, ScoreOutput
    from nanoengine.api.errors import (
        ConfigError,
        EngineClosed,
        EngineUnavailable,
        ModelError,
        ModelSourceError,
        NanoEngineError,
        ParamsError,
        PluginError,
        RequestError,
        TokenizerMissing,
        UnsupportedError,
        WeightsError,
        WorkerError,
    )
    from nanoengine.api.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from nanoengine.api.stats import EngineStats
    from nanoengine.api.structured_outputs import StructuredOutputsParams
    from nanoengine.async_llm import AsyncLLM
    from nanoengine.llm import LLM
    from nanoengine.observe.steps import StepRecord
    from nanoengine.observe.trace import TraceFile
    from nanoengine.params.sampling_params import SamplingParams
    from nanoengine.setup.config.config import load_config
    from nanoengine.stream import Stream

__version__ = "0.1.0"

_ERRORS = (
    "ConfigError",
    "EngineClosed",
    "EngineUnavailable",
    "ModelError",
    "ModelSourceError",
    "NanoEngineError",
    "ParamsError",
    "PluginError",
    "RequestError",
    "TokenizerMissing",
    "UnsupportedError",
    "WeightsError",
    "WorkerError",
)
_HOME = {
    "LLM": "nanoengine.llm",
    "AsyncLLM": "nanoengine.async_llm",
    "EngineStats": "nanoengine.api.stats",
    "Stream": "nanoengine.stream",
    "StructuredOutputsParams": "nanoengine.api.structured_outputs",
    "StepRecord": "nanoengine.observe.steps",
    "TraceFile": "nanoengine.observe.trace",
    "SamplingParams": "nanoengine.params.sampling_params",
    "CompletionOutput": "nanoengine.api.outputs",
    "EmbeddingOutput": "nanoengine.api.embeddings",
    "ScoreOutput": "nanoengine.api.embeddings",
    "Logprob": "nanoengine.api.outputs",
    "RequestMetrics": "nanoengine.api.outputs",
    "RequestOutput": "nanoengine.api.outputs",
    **dict.fromkeys(_ERRORS, "nanoengine.api.errors"),
    "load_config": "nanoengine.setup.config.config",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingOutput",
    "EngineClosed",
    "EngineStats",
    "EngineUnavailable",
    "Logprob",
    "ModelError",
    "ModelSourceError",
    "NanoEngineError",
    "ParamsError",
    "PluginError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "StepRecord",
    "Stream",
    "StructuredOutputsParams",
    "TokenizerMissing",
    "TraceFile",
    "UnsupportedError",
    "WeightsError",
    "WorkerError",
    "load_config",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'nanoengine' has no attribute {name!r}")
