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
_SPAN = 32  # positions that are judged together


def check_bfloat16(half: ModelOnRanks, single: ModelOnRanks, prompts: Prompts) -> None:
    """Checks the dtype and the distance from float32 over two long sequences. The weights of `single` are rounded.

    An error counts if both sequences have it at the same positions: where experts are chosen by token, rounding sends
    some to other experts, which is no mistake.
    """
    want, got = _log_probs(single, prompts), _log_probs(half, prompts)
    _round_weights(single.built[0].model)
    weights = _log_probs(single, prompts)
    _round_results(single.built[0].model)
    results = _log_probs(single, prompts)
    require(bool(got.isfinite().all()), "log-probs are not finite, which in float32 they are")
    for start in range(0, want.shape[1], _SPAN):
        span = slice(start, start + _SPAN)
        error, *usual = (_errors(each, want, span) for each in (got, weights, results))
        allowed = torch.maximum(*usual)
        which = int((error / allowed).argmin())
        times = float(error[which] / allowed[which])
        require(
            times <= _TIMES,
            f"log-probs at positions {start} to {min(span.stop, want.shape[1]) - 1} are off by {error[which]:.2g}, "
            f"{times:.1f} times the error of rounding to bfloat16 what each module returns ({allowed[which]:.2g}); "
            f"{_TIMES:g} times is allowed. Compute positions, angles, norms and softmax in float32",
        )


def _errors(found: Tensor, want: Tensor, span: slice) -> Tensor:
    """[sequences, n, V] -> [sequences]: the median over positions of the mean error of one, a little above 0."""
    return (found[:, span] - want[:, span]).square().mean(-1).sqrt().median(-1).values.clamp_min(1e-6)


def _log_probs(ranked: ModelOnRanks, prompts: Prompts) -> Tensor:
    """Of both long sequences, [2, n, V]."""
    found = []
    for name in ("far", "far 2"):
        ranked.reset()
        steps = [{name: count} for count in prompts.far(ranked.limits.max_tokens)]
        found.append(torch.cat([ranked.run(prompts.ids, step)[name] for step in steps]))
    return torch.stack(found)


@torch.no_grad()
def _round_weights(model: nn.Module) -> None:
    for tensor in model.parameters():
        tensor.copy_(tensor.bfloat16())


def _round_results(model: nn.Module) -> None:
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: _rounded(out))


def _rounded(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.bfloat16().float() if out.is_floating_point() else out
    return type(out)(map(_rounded, out)) if type(out) in (tuple, list) else out
