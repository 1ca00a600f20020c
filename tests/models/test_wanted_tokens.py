"""Behind the attention of its last layer a model may go on with the wanted tokens alone: they are the same."""

from __future__ import annotations

from pathlib import Path

import paged_harness
import pytest
import torch
from paged_harness import PagedModel
from parity import families, tiny
from torch import Tensor

from nanoengine.api import ForwardBatch

CHUNKS = {"a": list(range(30, 50)), "b": [3, 1, 4, 1, 5], "c": [9]}
WANTED = torch.tensor([0, 20, 25])  # the last tokens, in the order of the rows: c, a, b


def hidden(folder: Path, monkeypatch: pytest.MonkeyPatch, wanted: Tensor | None) -> Tensor:
    """What the model returns for a step of these chunks."""
    model, seen = PagedModel(folder), list[Tensor]()

    def keep(module: object, args: object, out: Tensor) -> Tensor:
        seen.append(out)
        return torch.zeros(sum(map(len, CHUNKS.values())), out.shape[1])

    model.model.register_forward_hook(keep)
    batch = lambda num_tokens: ForwardBatch(num_tokens=num_tokens, wanted=wanted)  # noqa: E731
    monkeypatch.setattr(paged_harness, "ForwardBatch", batch)
    model.step(CHUNKS)
    return seen[0]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2 tied, a window in the last layer", "gemma2", "gemma3"])
def test_hidden_states_of_wanted_tokens_are_those_of_all(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.write(kind, tmp_path)
    every, some = (hidden(folder, monkeypatch, wanted) for wanted in (None, WANTED))
    assert len(every) == 26
    assert len(some) == len(WANTED)
    torch.testing.assert_close(some, every[WANTED])


@pytest.mark.parametrize("kind", ["mixtral", "cohere"])
def test_other_layers_return_all(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts get which tokens are padding, and attention beside the MLP is not in front of it."""
    folder = families.write(tmp_path, kind)
    every, some = (hidden(folder, monkeypatch, wanted) for wanted in (None, WANTED))
    assert len(every) == len(some) == 26
    torch.testing.assert_close(some, every)
