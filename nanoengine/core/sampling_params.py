"""`SamplingParams`: vLLM's names and defaults. Core fields are checked here; a stage's own fields when resolved.

Which fields are legal depends on the stages that plugins registered, so `SamplingParams` takes any keyword, and
`ParamsResolver` (one an engine) says at submission whether it is one of them. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoengine.core.setup.specs import ParamsContext, StageParams


@dataclass(frozen=True, slots=True)
class PackedStage:
    """One stage that a request wants: its name, its parameters, its packed columns (numpy arrays, 0-d or 1-d)."""

    name: str
    params: StageParams
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedParams:
    """Validated parameters of one request, as scheduler and output processing use them.

    Attributes:
        n, max_tokens (None: up to the model's length), min_tokens, seed (None: the engine's), priority, cache_salt,
        logprobs, prompt_logprobs (None: none wanted; -1 was replaced by the vocabulary's size), detokenize,
        skip_special_tokens, include_stop_str_in_output: as in `SamplingParams`.
        stop: stop strings. eos_ids: empty with ignore_eos. stop_token_ids: the user's own.
        stages: those this request wants. greedy: the draw is the arg-max.
        host_tokens: a stage needs every token on the host before the next draw.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    seed: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    stop: tuple[str, ...] = ()
    eos_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    stages: tuple[PackedStage, ...] = ()
    greedy: bool = False
    host_tokens: bool = False

    @property
    def stop_set(self) -> frozenset[int]:
        """Ids that end the output; masked while fewer than `min_tokens` were generated."""
        return self.eos_ids | self.stop_token_ids


class SamplingParams:
    """How to sample. Implemented by the sampling part; see `ParamsResolver`."""

    def __init__(self, **fields: Any) -> None:
        raise NotImplementedError


class ParamsResolver:
    """Turns `SamplingParams` into `ResolvedParams` for one engine's stages and model."""

    def __init__(
        self, stages: Sequence[tuple[str, type[StageParams]]], ctx: ParamsContext, eos_ids: frozenset[int]
    ) -> None:
        raise NotImplementedError

    def resolve(self, params: SamplingParams) -> ResolvedParams:
        """Raises `ParamsError` naming the field, its value, the valid ones and the nearest legal name."""
        raise NotImplementedError
