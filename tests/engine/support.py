"""A mock engine, and what it must answer: computed from the tokens alone, by code the engine does not use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanoengine import LLM, RequestOutput
from nanoengine.testing import mock_model
from nanoengine.testing.mock_model import reference_logits, write_mock_checkpoint

VOCAB = 97


def mock_llm(tmp_path: Path, *, eos: int | list[int] | None = None, plugins: Sequence[Any] = (), **options: Any) -> LLM:
    """An LLM over the mock model, with small blocks so that tables, chunks and hits happen."""
    folder = write_mock_checkpoint(tmp_path / "mock", vocab_size=VOCAB, eos_token_id=eos)
    given: dict[str, Any] = {"max_num_seqs": 32, "block_size": 4, "num_gpu_blocks_override": 1024, **options}
    return LLM(folder, attention="mock", load_format="dummy", plugins=[mock_model, *plugins], **given)


def greedy(prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> tuple[int, ...]:
    """The mock model's greedy continuation, up to `count` tokens or a stop token (which is kept)."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference_logits(tokens, VOCAB).argmax()))
        if tokens[-1] in stop:
            break
    return tuple(tokens[len(prompt) :])


def prompts(count: int, *, seed: int = 0, shortest: int = 1, longest: int = 40, shared: int = 0) -> list[list[int]]:
    """Random prompts; the first `shared` tokens are the same in all."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(0, VOCAB, (n,), generator=generator).tolist()

    head = ids(shared)
    lens = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [head + ids(n) for n in lens]


def tokens_of(outputs: Sequence[RequestOutput]) -> list[tuple[int, ...]]:
    for output in outputs:
        assert output.error is None, output.error
    return [output.outputs[0].token_ids for output in outputs]
