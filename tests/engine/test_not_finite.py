"""A request whose numbers break fails alone: those that get its blocks later are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from nanoengine import LLM, RequestOutput, SamplingParams
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.plugins.attention_backends.torch_paged import TorchPaged
from nanoengine.testing import checkpoints

BAD = 7  # the token whose embedding is NaN
LATER = [[10 + i, 30 + i, *range(50, 50 + 3 * i)] for i in range(12)]


def llm(folder: Path, **options: Any) -> LLM:
    """Few blocks, so that they change hands."""
    return LLM(folder, block_size=4, num_gpu_blocks_override=40, max_num_seqs=3, max_model_len=64, **options)


def tokens(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    for output in outputs:
        assert output.error is None, output.error
    return [output.outputs[0].token_ids for output in outputs]


def break_embedding(engine: LLM) -> None:
    def break_(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        return out.masked_fill((args[0] == BAD).unsqueeze(-1), float("nan"))

    model = engine._built.model()
    model.get_submodule("model.embed_tokens").register_forward_hook(break_)


def generate(folder: Path, attention: Any, caching: bool, *, break_first: bool) -> list[tuple[int, ...]]:
    """Each later prompt by itself and then all together, behind one that breaks."""
    params = SamplingParams(max_tokens=6, temperature=0.0, logit_bias={BAD: -100.0})
    with llm(folder, attention=attention, enable_prefix_caching=caching) as engine:
        if break_first:
            break_embedding(engine)
            for prompt in ([1, *[BAD] * 13], [1, 2, 3, BAD], [BAD] * 30):
                broken = engine.generate([prompt], params)[0]
                assert broken.error is not None
                assert broken.error.code == "bad_logits"
        alone = [engine.generate([p], params)[0] for p in LATER]
        beside = [[1, BAD, 2], *LATER, [BAD] * 9] if break_first else LATER
        together = engine.generate(beside, params)
        if break_first:
            assert [output.error is not None for output in together] == [True, *[False] * 12, True]
            together = together[1:-1]
        return tokens([*alone, *together])


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-cache", "no-prefix-cache"])
@pytest.mark.parametrize("write", [checkpoints.tiny_llama, checkpoints.tiny_gemma2], ids=["llama", "gemma2"])
def test_one_broken_request_fails_alone(write: Callable[..., Path], caching: bool, tmp_path: Path) -> None:
    folder = write(tmp_path, std=0.15)
    want = generate(folder, "torch", caching, break_first=False)
    assert len(set(want)) > 6
    assert generate(folder, "torch", caching, break_first=True) == want


HEAD = list(range(60, 68))
SHARING = [[*HEAD, BAD, BAD], [*HEAD, 9, 10], [*HEAD, 11, 12, 13]]


def share(folder: Path, caching: bool) -> tuple[list[RequestOutput], list[tuple[int, ...]]]:
    """Requests that begin alike, at once, where one of them breaks; and what the others are to get."""
    params = SamplingParams(max_tokens=6, temperature=0.0, logit_bias={BAD: -100.0})
    with llm(folder, enable_prefix_caching=caching) as engine:
        want = tokens(engine.generate(SHARING[1:], params))
    with llm(folder, enable_prefix_caching=caching) as engine:
        break_embedding(engine)
        found = engine.generate(SHARING, params)
        assert tokens(engine.generate(SHARING[1:], params)) == want
        assert engine.stats().free_blocks == engine.stats().num_blocks
    return found, want


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-cache", "no-prefix-cache"])
def test_who_begins_as_the_broken_one_does_is_right(caching: bool, tmp_path: Path) -> None:
    """Attention lets NaN of later tokens into earlier ones (0 * NaN), so blocks that both share are broken, too."""
    (broken, *others), want = share(checkpoints.tiny_llama(tmp_path, std=0.15), caching)
    assert broken.error is not None
    assert broken.error.code == "bad_logits"
    assert tokens(others) == want


def test_blocks_of_others_are_what_breaks_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: who borrowed broken blocks is not computed again by itself."""
    admit = Scheduler._admit

    def borrows_nothing(self: Scheduler, request: Any, *args: Any) -> bool:
        done = admit(self, request, *args)
        request.borrowed = 0
        return done

    monkeypatch.setattr(Scheduler, "_admit", borrows_nothing)
    found, _ = share(checkpoints.tiny_llama(tmp_path, std=0.15), True)
    assert [output.error is None for output in found] == [False, False, False]


class LeavesOldValues(TorchPaged):
    def _clear_tails(self, inputs: Any) -> None: ...


def test_a_backend_that_leaves_old_values_is_seen_to_fail(tmp_path: Path) -> None:
    folder = checkpoints.tiny_llama(tmp_path, std=0.15)
    with pytest.raises(AssertionError, match="not finite"):
        generate(folder, LeavesOldValues, caching=False, break_first=True)
