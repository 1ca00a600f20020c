"""How a model makes embeddings, checks of what a caller asks of them, and what is done with a pooled vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

import numpy as np

from nanoengine.api.deltas import Float32, Pooling
from nanoengine.api.errors import ParamsError
from nanoengine.params.arguments import GivenPrompt, split_prompts
from nanoengine.params.field_types import conform
from nanoengine.params.resolver import ResolvedParams
from nanoengine.params.sampling_params import SamplingParams

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingDefaults:
    """How a model makes embeddings, as its files say.

    Attributes:
        size: of a vector.
        pooling: of a request that names none. normalize: whether its vector is scaled to length 1.
        dimensions: the sizes that a vector may be shortened to, as the model was trained for it; (): any; None: none.
        unsupported: what the files ask for and is not supported; then a request must name its pooling. None: nothing.
    """

    size: int
    pooling: Pooling = "last"
    normalize: bool = True
    dimensions: tuple[int, ...] | None = None
    unsupported: str | None = None


@dataclass(frozen=True, slots=True)
class PoolingChoice:
    """What one request asks for, checked. dimensions: the size of its vector; None: the hidden size."""

    pooling: Pooling
    normalize: bool = True
    dimensions: int | None = None

    def finish(self, vector: Float32) -> Float32:
        """The embedding: the pooled vector, float32 [hidden size], shortened and then normalised as the request asks.
        The result cannot be written. A vector of zeros stays what it is."""
        out = vector[: self.dimensions].copy()
        if self.normalize:
            out /= np.float32(max(float(np.linalg.norm(out)), 1e-12))
        out.flags.writeable = False
        return out


def choose_pooling(
    defaults: PoolingDefaults, pooling: Any = None, normalize: Any = None, dimensions: Any = None
) -> PoolingChoice:
    """What is asked for, with the model's defaults in place of None. Raises `ParamsError`."""
    if pooling is None and defaults.unsupported is not None:
        raise ParamsError(f"{defaults.unsupported}; give pooling: {' or '.join(map(repr, get_args(Pooling)))}")
    return PoolingChoice(
        defaults.pooling if pooling is None else conform("pooling", pooling, Pooling),
        defaults.normalize if normalize is None else conform("normalize", normalize, bool),
        None if dimensions is None else _checked_dimensions(defaults, dimensions),
    )


def split_to_pool(prompts: Any) -> list[GivenPrompt]:
    """As `split_prompts`. Also raises `ParamsError` for a prompt with generated tokens."""
    given = split_prompts(prompts)
    if any(len(each.generated) for each in given):
        raise ParamsError("generated_token_ids have no meaning for an embedding: leave them out")
    return given


def pooled_params(resolved: ResolvedParams, params: SamplingParams, pooling: Any, generated: Any) -> ResolvedParams:
    """Those of a request that pools: the vector is the one thing that it draws. `resolved`: of `params`.

    Raises `ParamsError` for an unknown pooling, and where something is given that only a request for tokens has.
    """
    plain = SamplingParams(cache_salt=params.cache_salt, priority=params.priority)
    if params != plain or len(generated):
        given = "generated tokens" if params == plain else str(params)
        raise ParamsError(f"a request that pools draws no tokens: it takes cache_salt and priority only, not {given}")
    return replace(
        resolved,
        pooling=conform("pooling", pooling, Pooling),
        max_tokens=1,
        speculate=False,
        detokenize=False,
        processors=(),
    )


def _checked_dimensions(defaults: PoolingDefaults, given: Any) -> int:
    dimensions: int = conform("dimensions", given, int)
    if dimensions == defaults.size:
        return dimensions
    if defaults.dimensions is None:
        raise ParamsError(
            f"dimensions is {dimensions}, and this model's embeddings have {defaults.size}: it was not trained for "
            "shorter ones (its config.json has no matryoshka_dimensions); leave dimensions out"
        )
    if not 1 <= dimensions <= defaults.size:
        raise ParamsError(f"dimensions must be from 1 to {defaults.size}, not {dimensions}")
    if defaults.dimensions and dimensions not in defaults.dimensions:
        valid = ", ".join(map(str, defaults.dimensions))
        raise ParamsError(f"dimensions is {dimensions}, and this model was trained for {valid}")
    return dimensions


def pairs(first: Sequence[T], second: Sequence[T], names: tuple[str, str]) -> list[tuple[T, T]]:
    """The pairs to score: one with each of the others, or each with its own. Raises `ParamsError` for other numbers.

    `names`: what messages call the two.
    """
    if not first or not second:
        raise ParamsError(f"{names[0] if not first else names[1]} is empty: there is nothing to score")
    if len(first) not in (1, len(second)):
        raise ParamsError(
            f"{names[0]} has {len(first)} entries and {names[1]} has {len(second)}: give one and any number, or as many"
        )
    return list(zip(list(first) * (len(second) if len(first) == 1 else 1), second, strict=True))
