"""`SamplingParams`: made, resolved against the registered processors, and run for a few tokens on the mock model.

A request runs next to the mutant's in the same batch, and must get the tokens it gets alone, now and in a run after it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanoengine import LLM, SamplingParams
from nanoengine.api.errors import ParamsError, PluginError
from nanoengine.testing import mock_model
from nanoengine.testing.checkpoints import write_byte_tokenizer
from nanoengine.testing.mock_model import reference_logits, write_mock_checkpoint

Case = tuple[tuple[str, Any], ...]
"""Fields and values, in order."""

_VOCABULARY, _PROMPT, _NEIGHBOUR = 256, [65, 66, 67, 68, 65], [97, 98, 99]
_COUNT = 6  # tokens of the neighbour: the mutant ends, or fails, in the middle of them
_BASE: dict[str, Any] = {"max_tokens": 3, "temperature": 0.7, "seed": 1}
_NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 5, 255, 256, 2**15, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**30, 10**5000,
    0.0, -0.0, 1e-40, 1e-8, 0.5, 1.0, 1.5, 1e38, 1e39, 1e308, float("inf"), float("-inf"), float("nan"), None, True,
    np.float32(0.5), np.int64(3), np.bool_(True), np.array(2), np.array([1, 2]), torch.tensor(1), 1 + 2j,
)  # fmt: skip
_TEXTS: tuple[Any, ...] = ("", "a", "AB", " ", "\0", "\ud800", "é", "日本", "x" * 10_000, b"a", "\u202e", "<eos>")
_OTHERS: tuple[Any, ...] = (
    [], {}, (), [None], [[]], [1, 2], [300], [-1], [2**40], ["a", "b"], ["", "a"], ["a", 1], {1: 2.0}, {"1": 2.0},
    {300: 1.0}, {65: float("nan")}, {65: float("inf")}, {65: -float("inf")}, {65: 1e39}, {65: "a"}, {None: 1}, {1.5: 2},
    set(), {1, 2}, range(3), object, print, [["a"]] * 2, ["a"] * 2000, list(range(256)), list(range(255)), {-1: 1.0},
    {n: -float("inf") for n in range(256)}, dict.fromkeys(range(256), -1e+38), "abc",
    (x for x in ()), torch.ones(2), torch.ones(2, 2), np.array([["a"]]), np.array([], dtype=object),
)  # fmt: skip
_UNKNOWN = (
    "top_pp",
    "best_of",
    "",
    "é",
    "columns",
    "pack",
    "_core",
    "processor_fields",
    "self",
    "use_beam_search",
    "x" * 500,
)


@cache
def _llm() -> LLM:
    folder = write_mock_checkpoint(Path.cwd() / "mock", vocab_size=_VOCABULARY, max_position_embeddings=64)
    write_byte_tokenizer(folder)
    return LLM(
        str(folder), plugins=[mock_model], load_format="dummy", attention="mock", max_num_seqs=8, block_size=4,
        num_gpu_blocks_override=200, device="cpu",
    )  # fmt: skip


@cache
def _alone() -> tuple[int, ...]:
    tokens = list(_NEIGHBOUR)
    for _ in range(_COUNT):
        tokens.append(int(reference_logits(tokens, _VOCABULARY).argmax()))
    return tuple(tokens[len(_NEIGHBOUR) :])


@cache
def _names() -> tuple[str, ...]:
    return tuple(sorted(_llm().sampling_names))


def warm() -> None:
    run(())


def mutants(rng: random.Random) -> Iterator[Case]:
    values = (*_NUMBERS, *_TEXTS, *_OTHERS)
    while True:
        fields = dict(_BASE)
        for _ in range(rng.choice((1, 1, 2, 3, 5))):
            name = rng.choice(_names()) if rng.random() < 0.95 else rng.choice(_UNKNOWN)
            fields[name] = rng.choice(rng.choice((values, _NUMBERS, _NUMBERS, _OTHERS)))
            if rng.random() < 0.1:
                fields[name] = [fields[name]] * rng.randrange(4)
        yield tuple(fields.items())


def run(case: Case) -> None:
    llm = _llm()
    neighbour = SamplingParams(temperature=0, max_tokens=_COUNT, ignore_eos=True)
    with suppress(ParamsError):
        _run_beside(neighbour, dict(case))
    [after] = llm.generate([_NEIGHBOUR], neighbour, use_tqdm=False)
    assert after.outputs[0].token_ids == _alone(), "the request behind it got other tokens"
    assert llm.stats().running == llm.stats().waiting == 0


def _run_beside(neighbour: SamplingParams, fields: dict[str, Any]) -> None:
    """Raises `ParamsError`. A `PluginError`, which would put the blame on a processor, is a crash."""
    params = SamplingParams(**fields)
    try:
        first, second = _llm().generate([_PROMPT, _NEIGHBOUR], [params, neighbour], use_tqdm=False)
    except PluginError as error:
        raise AssertionError("a user's mistake is reported as a plugin's") from error
    assert second.error is None, second.error
    assert second.outputs[0].token_ids == _alone(), "the request beside it got other tokens"
    assert first.error is not None or all(len(sample.token_ids) <= 64 for sample in first.outputs)
    assert len(repr(params)) + len(str(first)) > 0
