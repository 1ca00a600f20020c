"""The built-in logits processors, one per file. This module imports no torch: processors are named by target."""

from __future__ import annotations

from nanoengine.api import ProcessorParams, SamplerSpec, hookimpl
from nanoengine.plugins.samplers import function_state, grammar_state, params


@hookimpl
def register_samplers() -> list[SamplerSpec]:
    return [
        _spec("allowed_token_ids", params.AllowedTokenIdsParams, "AllowedTokenIds"),
        _spec("bad_words", params.BadWordsParams, "BadWords"),
        _spec("structured_outputs", grammar_state.GrammarParams, "StructuredOutputs"),
        _spec("functions", function_state.FunctionParams, "Functions"),
        _spec("logit_bias", params.LogitBiasParams, "LogitBias"),
        _spec("penalties", params.PenaltyParams, "Penalties"),
        _spec("temperature", params.TemperatureParams, "Temperature"),
        _spec("top_k", params.TopKParams, "TopK"),
        _spec("top_p", params.TopPParams, "TopP"),
        _spec("min_p", params.MinPParams, "MinP"),
    ]


def _spec(name: str, parameters: type[ProcessorParams], processor: str) -> SamplerSpec:
    return SamplerSpec(name=name, params=parameters, target=f"{__name__}.{name}:{processor}", api=1)
