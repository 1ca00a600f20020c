"""The plugin interface, version 1. It has everything that a plugin needs; nothing else is stable.

Every name is documented field by field in docs/plugin-api.md. Names that need torch (`Model` and its parts) are
imported when they are first used, so a module with hooks can import this one without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nanoengine.api.attention import (
    AttentionBackend,
    AttentionCapabilities,
    AttentionFeature,
    AttentionLayerSpec,
    AttentionNeed,
    BatchLimits,
    GraphSupport,
    HeadNorms,
    KVCacheView,
    KVSpec,
    Rotation,
    StepInputs,
)
from nanoengine.api.drafters import (
    DeviceDrafter,
    DrafterContext,
    DraftSample,
    DraftState,
    DraftStep,
    HostDrafter,
)
from nanoengine.api.errors import (
    ConfigError,
    GrammarError,
    ModelError,
    ModelSourceError,
    NanoEngineError,
    ParamsError,
    PluginError,
    TokenizerMissing,
    UnsupportedError,
    WeightsError,
)
from nanoengine.api.grammars import Advanced, Constraint, Grammar, GrammarBackend, GrammarContext, Matcher
from nanoengine.api.hooks import hookimpl
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.api.policies import Policy, QueuedRequest
from nanoengine.api.processor_params import ColumnSpec, HostState, ParamsContext, Phase, ProcessorParams, StandardOp
from nanoengine.api.processors import LogitsProcessor, Need, ProcessorContext, ProcessorRows, RaggedColumn
from nanoengine.api.sharding import Shard, ShardSpec
from nanoengine.api.sources import ModelSource, SourceContext
from nanoengine.api.specs import (
    API_VERSION,
    AttentionSpec,
    CommandSpec,
    DrafterParams,
    DrafterSpec,
    GrammarSpec,
    ModelSourceSpec,
    ModelSpec,
    PolicyParams,
    PolicySpec,
    QuantizationSpec,
    SamplerSpec,
    ToolParserSpec,
)
from nanoengine.api.tool_parsers import (
    Content,
    ParserEvent,
    Reasoning,
    Tool,
    ToolCallArguments,
    ToolCallBegin,
    ToolParser,
)
from nanoengine.api.weights import WeightMap, WeightRule

if TYPE_CHECKING:
    from nanoengine.api.experts import Experts, ExpertsInfo, ExpertsMethod, RunningStep
    from nanoengine.api.layers import (
        Layer,
        LayerInfo,
        Linear,
        LinearMethod,
        Norm,
        WeightLayer,
    )
    from nanoengine.api.model import Attention, BuildContext, ForwardBatch, Model, ModelConfig
    from nanoengine.api.quantization import Quantization, QuantizationContext, is_ignored

_MODEL = ("Attention", "BuildContext", "ForwardBatch", "Model", "ModelConfig")
_LAYERS = ("Layer", "LayerInfo", "Linear", "LinearMethod", "Norm", "WeightLayer")
_EXPERTS = ("Experts", "ExpertsInfo", "ExpertsMethod", "RunningStep")
_QUANTIZATION = ("Quantization", "QuantizationContext", "is_ignored")
_NEEDS_TORCH = {
    **dict.fromkeys(_MODEL, "model"),
    **dict.fromkeys(_LAYERS, "layers"),
    **dict.fromkeys(_EXPERTS, "experts"),
    **dict.fromkeys(_QUANTIZATION, "quantization"),
}

__all__ = [
    "API_VERSION",
    "Advanced",
    "Attention",
    "AttentionBackend",
    "AttentionCapabilities",
    "AttentionFeature",
    "AttentionLayerSpec",
    "AttentionNeed",
    "AttentionSpec",
    "BatchLimits",
    "BuildContext",
    "ColumnSpec",
    "CommandSpec",
    "ConfigError",
    "Constraint",
    "Content",
    "DeviceDrafter",
    "DraftSample",
    "DraftState",
    "DraftStep",
    "DrafterContext",
    "DrafterParams",
    "DrafterSpec",
    "Experts",
    "ExpertsInfo",
    "ExpertsMethod",
    "ForwardBatch",
    "Grammar",
    "GrammarBackend",
    "GrammarContext",
    "GrammarError",
    "GrammarSpec",
    "GraphSupport",
    "HeadNorms",
    "HostDrafter",
    "HostState",
    "KVCacheView",
    "KVSpec",
    "Layer",
    "LayerInfo",
    "Linear",
    "LinearMethod",
    "LogitsProcessor",
    "Matcher",
    "Model",
    "ModelConfig",
    "ModelError",
    "ModelSource",
    "ModelSourceError",
    "ModelSourceSpec",
    "ModelSpec",
    "NanoEngineError",
    "Need",
    "Norm",
    "ParamsContext",
    "ParamsError",
    "ParserEvent",
    "Phase",
    "PluginError",
    "Policy",
    "PolicyParams",
    "PolicySpec",
    "ProcessorContext",
    "ProcessorParams",
    "ProcessorRows",
    "Quantization",
    "QuantizationContext",
    "QuantizationSpec",
    "QueuedRequest",
    "RaggedColumn",
    "Reasoning",
    "Rotation",
    "RunningStep",
    "SamplerSpec",
    "Shard",
    "ShardSpec",
    "SourceContext",
    "StandardOp",
    "StepInputs",
    "TensorParallelGroup",
    "TokenizerMissing",
    "Tool",
    "ToolCallArguments",
    "ToolCallBegin",
    "ToolParser",
    "ToolParserSpec",
    "UnsupportedError",
    "WeightLayer",
    "WeightMap",
    "WeightRule",
    "WeightsError",
    "hookimpl",
    "is_ignored",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        return getattr(import_module(f"nanoengine.api.{_NEEDS_TORCH[name]}"), name)
    raise AttributeError(f"module 'nanoengine.api' has no attribute {name!r}")
