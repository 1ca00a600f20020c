"""A model in bfloat16: its errors are those of the format.

They are compared with the float32 model's whose weights, and what each module returns, are rounded to bfloat16. That
is what any implementation rounds at least, on the same weights, so it needs no tolerance of its own for each model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanoengine.testing.conformance.failure import require
from nanoengine.testing.conformance.model_prompts import Prompts
from nanoengine.testing.conformance.model_steps import ModelOnRanks

_TIMES = 3.0  # as large as the rounded model's error; DecoderLM families have 0.9 to 1.5 times that
_SPAN = 32  # positions whose errors are averaged


def check_bfloat16(half: ModelOnRanks, single: ModelOnRanks, prompts: Prompts) -> None:
    """Checks the dtype and the distance from float32 over the longest sequence. The weights of `single` are rounded."""
    want = _log_probs(single, prompts)
    got = _log_probs(half, prompts)
    _round(single.built[0].model)
    rounded = _log_probs(single, prompts)
    require(bool(got.isfinite().all()), "log-probs are not finite, which in float32 they are")
    for start in range(0, len(want), _SPAN):
        span = slice(start, start + _SPAN)
        error, usual = (float((each[span] - want[span]).square().mean().sqrt()) for each in (got, rounded))
        require(
            error <= _TIMES * usual,
            f"log-probs at positions {start} to {min(span.stop, len(want)) - 1} are off by {error:.2g} in the mean, "
            f"{error / usual:.1f} times the error of rounding to bfloat16 what each module returns ({usual:.2g}); "
            f"{_TIMES:g} times is allowed. Compute positions, angles, norms and softmax in float32",
        )


def _log_probs(ranked: ModelOnRanks, prompts: Prompts) -> Tensor:
    ranked.reset()
    return torch.cat([ranked.run(prompts.ids, step)["far"] for step in prompts.far(ranked.limits.max_tokens)])


@torch.no_grad()
def _round(model: nn.Module) -> None:
    for tensor in model.parameters():
        tensor.copy_(tensor.bfloat16())
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: _rounded(out))


def _rounded(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.bfloat16().float() if out.is_floating_point() else out
    return type(out)(map(_rounded, out)) if type(out) in (tuple, list) else out
