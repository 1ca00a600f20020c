"""`check_model`: compares a model with a reference, in ragged, chunked and shared steps, on one and several ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nanoengine.api import Model
from nanoengine.setup.plugins.choose import check_class
from nanoengine.testing.conformance.failure import during, require
from nanoengine.testing.conformance.model_bfloat16 import check_bfloat16
from nanoengine.testing.conformance.model_config import check_config, check_unread
from nanoengine.testing.conformance.model_device import check_no_waiting
from nanoengine.testing.conformance.model_prompts import Expected, Prompts, Reference
from nanoengine.testing.conformance.model_steps import ModelOnRanks
from nanoengine.testing.conformance.model_tensors import check_tensors

_BLAND = 0.02  # with a smaller standard deviation of log-probs, errors could not be detected
_MOST_RANKS = 8  # that are tested without being asked for


def check_model(
    model: type[Model],
    checkpoint: str | Path,
    reference: Reference,
    *,
    ranks: Sequence[int] | None = None,
    tolerance: float = 5e-4,
    longest: int = 600,
    bfloat16: bool = True,
    harmless: Sequence[str] = (),
) -> None:
    """Loads a checkpoint in float32 and compares log-probs at every position; then in bfloat16.

    Args:
        checkpoint: a folder with config.json and safetensors of a small model with at least 24 positions.
        reference: token ids int64 [1, n] -> logits [n, V] or [1, n, V], or an object with such `logits`, as
            transformers' models return.
        ranks: tensor-parallel sizes to test; ranks are threads. None: 1, 2 for an even number of heads, and the first
            size where ranks share a KV head (4 for 2 KV heads), if the layers can be divided over so many.
        tolerance: largest error of log-probs in float32.
        longest: tokens of the longest sequence; a model with fewer positions gets as many as it has. It must be longer
            than every attention window that is reached.
        bfloat16: whether the model runs in bfloat16.
        harmless: fields of config.json, by their dotted names, that the model may ignore whatever their values are.

    Raises `ConformanceError` that says what was wrong.
    """
    check_class(model, Model, model.__qualname__)
    path, name = Path(checkpoint), model.__name__
    hf: dict[str, Any] = json.loads((path / "config.json").read_text("utf-8"))
    check_config(model, hf, harmless)
    with during(f"{name} on 1 rank"):
        single = ModelOnRanks(model, hf, path, 1, longest=longest)
    check_unread(model, hf, harmless)
    _check_windows(single)
    sizes = ranks if ranks is not None else _default_ranks(single, model, hf)
    prompts = Prompts.of(single.vocab_size, single.longest)
    expected = Expected(reference)
    _check_spread(expected, prompts)
    for size in sizes:
        with during(f"{name} on {size} rank{'s' * (size > 1)}"):
            ranked = single if size == 1 else ModelOnRanks(model, hf, path, size, longest=longest)
            _compare(ranked, prompts, expected, tolerance)
        check_no_waiting(model, hf, size)
    check_tensors(model, path, single, expected, prompts.ids["long"], 2 * tolerance)
    if bfloat16:
        with during(f"{name} in bfloat16"):
            half = ModelOnRanks(model, hf, path, 1, longest=longest, dtype=torch.bfloat16)
            check_bfloat16(half, single, prompts)


def _check_windows(single: ModelOnRanks) -> None:
    """Checks that a sequence is longer than each window, if the model's positions reach so far."""
    windows = {window for layer in single.attention_layers if (window := layer.spec.window) is not None}
    unseen = sorted(window for window in windows if single.longest <= window < single.max_model_len)
    require(
        not unseen,
        f"the attention window {unseen[:1]} is not shorter than the longest sequence of {single.longest} tokens, so a "
        "mistake in it could not be detected: write the checkpoint with a smaller sliding_window, or give longest=",
    )


def _default_ranks(single: ModelOnRanks, model: type[Model], hf: Mapping[str, Any]) -> list[int]:
    """1, 2, and a size where ranks share a KV head. At least one size above 1."""
    spec = single.attention_layers[0].spec
    more = range(spec.num_kv_heads + 1, min(spec.num_heads, _MOST_RANKS) + 1)
    shared = [size for size in more if size > 2 and size % spec.num_kv_heads == 0 and spec.num_heads % size == 0]
    shared = [size for size in shared if ModelOnRanks.divides(model, hf, size)][:1]
    two = [2] if spec.num_heads % 2 == 0 else []
    require(
        bool(two or shared),
        f"{spec.num_heads} heads cannot be divided over 2 to {_MOST_RANKS} ranks: write the checkpoint with an even "
        "number, or give ranks=",
    )
    return [1, *two, *shared]


def _check_spread(expected: Expected, prompts: Prompts) -> None:
    spread = float(expected(prompts.ids["long"]).std(dim=0).mean())
    require(
        spread > _BLAND,
        f"the reference's log-probs almost do not depend on the input (standard deviation {spread:.1g} over "
        "positions): use larger weights in the checkpoint, so that errors can be detected; "
        "nanoengine.testing.randomise makes such",
    )


def _compare(ranked: ModelOnRanks, prompts: Prompts, expected: Expected, tolerance: float) -> None:
    """Compares prompts with different chunks, then one that begins in blocks of another prompt, then a full step and
    what follows it, then a long sequence."""

    def step(chunks: Mapping[str, int], padded: int = 0) -> None:
        ranked.compare(prompts.ids, chunks, expected, tolerance, padded=padded)

    for chunks in prompts.ragged():
        step(chunks)
    ranked.paging.cut("long", 4)
    ranked.paging.share("shared", "long")
    step({"shared": 7})
    step(prompts.full)  # as many tokens as a step may have
    step({"same": len(prompts.ids["same"])})
    step(dict.fromkeys(list(prompts.full)[:3], 1), padded=5)
    for count in prompts.far(ranked.limits.max_tokens):
        step({"far": count})


__all__ = ["Reference", "check_model"]
