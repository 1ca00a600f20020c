"""bf16 by forced decoding: as near to a float32 reference as transformers in bf16 is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from nanoengine import LLM, RequestOutput, SamplingParams
from nanoengine.api import ParamsError
from nanoengine.api.stats import EngineStats
from nanoengine.testing import forced

from . import tiny
from .compare import log_softmax, reference_logits
from .conftest import Pair

COUNT = 40  # output tokens


def answers(count: int, length: int) -> list[tuple[int, ...]]:
    return [tuple(p) for p in tiny.prompts(count, seed=1, shortest=length, longest=length)]


def distributions(output: RequestOutput, vocab: int) -> np.ndarray:
    """float64 [output tokens, V]: all log-probs of each step."""
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    return np.array([[entry[i].logprob for i in range(vocab)] for entry in logprobs])


def forced_run(
    folder: Path, asked: Sequence[Sequence[int]], dictated: Sequence[tuple[int, ...]], vocab: int, **options: Any
) -> tuple[list[np.ndarray], EngineStats]:
    params = [
        SamplingParams(forced=ids, max_tokens=len(ids), temperature=0, ignore_eos=True, logprobs=vocab)
        for ids in dictated
    ]
    given = {
        "attention": "torch",
        **tiny.SMALL,
        "dtype": "bfloat16",
        "max_num_batched_tokens": 32,
        "max_logprobs": -1,
        **options,
    }
    with LLM(folder, plugins=[forced], **given) as llm:
        outputs = llm.generate(asked, params, use_tqdm=False)
        stats = llm.stats()
    assert stats.chunks > 0
    assert stats.mixed_steps > 0
    assert [o.outputs[0].token_ids for o in outputs] == list(dictated)
    return [distributions(output, vocab) for output in outputs], stats


def rms(errors: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(np.mean(np.concatenate([e.ravel() for e in errors]) ** 2)))


@dataclass
class Measured:
    """ours, theirs: errors of the engine and of transformers in the same dtype, root mean squares over log-probs.
    decided: positions where the reference's best is beyond doubt; flipped: of them where the engine's arg-max differs.
    """

    ours: float
    theirs: float
    decided: int
    flipped: int
    stats: EngineStats


def measure(folder: Path, model: PreTrainedModel, count: int = COUNT, *, longest: int = 40, **options: Any) -> Measured:
    """`model`: the reference in float32. `count`: output tokens. `longest`: prompt. `options`: the engine's."""
    asked, dictated = tiny.prompts(10, shortest=4, longest=longest), answers(10, count)
    half = tiny.reference(folder, getattr(torch, options.get("dtype", "bfloat16"))).to(model.device)
    pieces = [(p + list(a), slice(len(p) - 1, -1)) for p, a in zip(asked, dictated, strict=True)]
    truth = [log_softmax(reference_logits(model, tokens)[part]) for tokens, part in pieces]
    theirs = [log_softmax(reference_logits(half, tokens)[part]) for tokens, part in pieces]
    ours, stats = forced_run(folder, asked, dictated, truth[0].shape[1], **options)
    their_error = rms([a - b for a, b in zip(theirs, truth, strict=True)])
    decided = flipped = 0
    for mine, true in zip(ours, truth, strict=True):
        best = np.sort(true, axis=-1)
        # the error of a difference of two is up to 1.4 times that of one: a clear gap is four standard deviations
        clear = best[:, -1] - best[:, -2] > 6 * their_error
        decided += int(clear.sum())
        flipped += int((mine.argmax(-1) != true.argmax(-1))[clear].sum())
    return Measured(rms([a - b for a, b in zip(ours, truth, strict=True)]), their_error, decided, flipped, stats)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_error_is_that_of_the_format(pair: Callable[[str], Pair], kind: str) -> None:
    found = measure(*pair(kind))
    print(f"\n{kind}: {found.ours:.5f} against {found.theirs:.5f}; {found.decided} decided, {found.flipped} flipped")
    assert found.theirs > 1e-3  # it is bf16 that is measured
    assert found.ours <= 1.25 * found.theirs
    assert found.decided > 100
    assert found.flipped == 0


def test_a_coarser_softmax_is_caught(pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: values keep 5 of their 8 bits on the way into the cache."""
    from nanoengine.plugins.attention_backends.torch_paged import TorchPaged

    original = TorchPaged.forward

    def forward(
        self: TorchPaged, layer: int, spec: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> object:
        mantissa, exponent = torch.frexp(v.float())
        coarse = torch.ldexp((mantissa * 32).round() / 32, exponent).to(v.dtype)
        return original(self, layer, spec, q, k, coarse)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchPaged, "forward", forward)
    found = measure(*pair("llama"))
    assert found.ours > 1.25 * found.theirs


def test_raw_logprobs_do_not_see_the_force(pair: Callable[[str], Pair]) -> None:
    folder, _ = pair("llama")
    free = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=4)
    prompt = tiny.prompts(1, shortest=7)[0]
    with tiny.llm(folder, plugins=[forced], dtype="float32") as llm:
        first = llm.generate(prompt, free, use_tqdm=False)[0].outputs[0]
        again = llm.generate(prompt, free.replace(forced=first.token_ids[:6]), use_tqdm=False)[0].outputs[0]
        with pytest.raises(ParamsError, match="forced: no such token id: 999"):
            llm.generate(prompt, free.replace(forced=(1, 999)), use_tqdm=False)
    assert again.token_ids[:6] == first.token_ids[:6]
    assert again.logprobs is not None
    assert first.logprobs is not None
    for token, mine, theirs in zip(first.token_ids[:6], again.logprobs, first.logprobs, strict=False):
        assert abs(mine[token].logprob - theirs[token].logprob) < 5e-4
