"""Whether the values of a checkpoint show a mistake: each tensor must change the log-probs, by values of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nanoengine.api import Model
from nanoengine.setup.start.checkpoint import find_checkpoint, some
from nanoengine.setup.start.weight_rules import Rules
from nanoengine.testing.conformance.failure import require
from nanoengine.testing.conformance.model_prompts import Expected
from nanoengine.testing.conformance.model_steps import ModelOnRanks

_FIX = (
    "Fill them with nanoengine.testing.randomise(model, seed) before the checkpoint is written, and load the reference "
    "from it"
)
_Score = Callable[[], Tensor]


def check_tensors(
    model: type[Model], path: Path, single: ModelOnRanks, expected: Expected, ids: Sequence[int], least: float
) -> None:
    """Checks that no tensor of the checkpoint is constant, and that each shows: its values in another order move some
    log-prob of the sequence `ids` by more than `least`.

    A tensor that changes nothing whatever its values are (a bias of keys without a rotation) is no mistake. The
    reference's tensors are tried where it is a module, else those of the model.
    """
    _check_constant(model, path, single)
    if isinstance(expected.reference, nn.Module):
        hidden = _hidden(_tensors(expected.reference), lambda: expected.fresh(ids), least)
    else:
        prompts = {"tried": list(ids)}

        def score() -> Tensor:
            single.reset()
            return single.run(prompts, {"tried": len(ids)})["tried"]

        hidden = _hidden(_tensors(single.built[0].model), score, least)
    require(
        not hidden,
        f"{len(hidden)} tensors of the checkpoint do not show, so mistakes in their use could not be detected: "
        f"{some(hidden)}; in another order their values move no log-prob by {least:.1g}. {_FIX}",
    )


def _check_constant(model: type[Model], path: Path, single: ModelOnRanks) -> None:
    rules, constant = Rules(model.weight_map(single.built[0].config)), list[str]()
    for name, values in find_checkpoint(path).slices():
        tensor = values[...] if values.get_shape() else torch.zeros(0)
        if tensor.numel() > 1 and not rules.skips(name) and bool((tensor == tensor.flatten()[0]).all()):
            constant.append(f"{name} (all {float(tensor.flatten()[0]):g})")
    require(
        not constant,
        f"{len(constant)} tensors of the checkpoint are constant, so mistakes in their use could not be detected: "
        f"{some(constant)}. {_FIX}",
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Those that are saved, each memory once."""
    found, seen = dict[str, Tensor](), set[int]()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            found[name] = tensor
    return found


@torch.no_grad()
def _hidden(tensors: Mapping[str, Tensor], score: _Score, least: float) -> list[str]:
    """Names of the tensors whose values do not show."""
    random, usual, found = torch.Generator().manual_seed(3), score(), list[str]()

    def moves(tensor: Tensor, values: Tensor) -> bool:
        kept = tensor.clone()
        tensor.copy_(values)
        try:
            return not float((score() - usual).abs().max()) <= least  # NaN shows
        finally:
            tensor.copy_(kept)

    for name, tensor in tensors.items():
        order = torch.randperm(tensor.numel(), generator=random)
        if bool((order[1:] > order[:-1]).all()):  # few values may have come back in their order
            order = order.roll(1)
        if moves(tensor, tensor.flatten()[order].view_as(tensor)):
            continue
        large = torch.randn(tensor.shape, generator=random) * max(1.0, 10 * float(tensor.abs().max()))
        if moves(tensor, tensor + large):
            found.append(name)
    return found
