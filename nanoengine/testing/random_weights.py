"""Random weights with which every tensor of a model changes its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T", bound=nn.Module | Mapping[str, Tensor])

_SPREAD = 1.4  # of a product's results, for inputs of about 1
_VECTOR = 0.3  # standard deviation of norm weights, biases and other vectors


@torch.no_grad()
def randomise(model_or_state: T, seed: int = 0, *, std: float | None = None) -> T:
    """Fills a model or its tensors with random values, in place, so that a test sees a mistake in the use of any of
    them. What a library initialises hides mistakes: biases are 0, norm weights 1, matrices small.

    Matrices, and stacks of them, get the standard deviation `std` and mean 0. Vectors get the deviation 0.3 around the
    whole number next to their mean: norm weights stay near 1 (or 0, where they are stored minus one), biases near 0.

    Args:
        model_or_state: a model (its parameters and buffers that are saved), or name -> tensor. Tensors without a float
            dtype are left as they are, and so are single numbers.
        seed: equal seeds give equal values for equal shapes.
        std: of matrices. None: 1.4 / sqrt(the smaller side), with which greedy tokens depend on the prompt.

    Returns its argument.
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    generator = torch.Generator().manual_seed(seed)
    done = set[tuple[int, tuple[int, ...]]]()  # tied tensors have one memory, and the first name counts
    for tensor in state.values():
        key = tensor.data_ptr(), tuple(tensor.shape)
        if not tensor.is_floating_point() or tensor.dim() == 0 or key in done:
            continue
        done.add(key)
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() == 1:
            tensor.copy_(tensor.float().mean().nan_to_num(0.0, 0.0, 0.0).round() + _VECTOR * values)
        else:
            tensor.copy_(values * (std or _SPREAD / min(tensor.shape[-2:]) ** 0.5))
    return model_or_state
