"""KV caches that do not fit, and the smallest engine there is."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from nanoengine import SamplingParams
from nanoengine.core.errors import ConfigError
from nanoengine.core.execution.runner import ModelRunner
from nanoengine.testing.mock_model import MockAttention, MockModel

from .support import greedy, mock_llm, tokens_of


@pytest.mark.parametrize("error", [None, MemoryError("none left"), RuntimeError("DefaultAllocator: out of memory")])
def test_a_kv_cache_that_cannot_be_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    released: list[Any] = []
    models: list[weakref.ref[MockModel]] = []
    build, release = MockModel.__init__, ModelRunner.release

    def init(self: MockModel, *args: Any) -> None:
        build(self, *args)
        models.append(weakref.ref(self))

    def allocate(self: MockAttention, num_layers: int, num_blocks: int) -> None:
        assert error is not None
        raise type(error)(*error.args)  # a fresh one: a traceback keeps frames alive

    monkeypatch.setattr(MockModel, "__init__", init)
    monkeypatch.setattr(MockAttention, "release", lambda self: released.append(self))
    monkeypatch.setattr(ModelRunner, "release", lambda self: (release(self), released.append("runner")))
    if error is not None:
        monkeypatch.setattr(MockAttention, "allocate", allocate)
    blocks = 10**12 if error is None else 100
    with pytest.raises(ConfigError, match=rf"KV cache of {blocks:,} blocks of 4 tokens.*lower engine\.num") as caught:
        mock_llm(tmp_path, num_gpu_blocks_override=blocks)
    assert f"{(blocks + 1) * 4 * 2 * 4:,} bytes" in str(caught.value)
    assert [type(each).__name__ for each in released] == ["MockAttention", "str"]
    del caught
    gc.collect()
    assert models
    assert all(model() is None for model in models), "the model outlives the failed start"


def test_a_model_of_one_position(tmp_path: Path) -> None:
    """No room for output: each request is told so; the largest steps, which size a GPU's cache, still run."""
    with mock_llm(tmp_path, max_model_len=1) as llm:
        (output,) = llm.generate([[5]], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
        assert output.error is not None
        runner: Any = llm.engine._executor.runner  # type: ignore[attr-defined]
        runner._run_largest_steps()
        assert int(runner.tables.num_tokens.abs().sum()) == 0
    with mock_llm(tmp_path, max_model_len=2) as llm:
        assert tokens_of(llm.generate([[5]], SamplingParams(temperature=0), use_tqdm=False)) == [greedy([5], 1)]
