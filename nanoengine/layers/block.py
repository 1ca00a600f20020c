"""How attention and MLP join the residual stream, with or without norms before and after them.

Between layers the stream is a pair (x, residual): x still has to be added to residual, which the next norm does in the
same pass. If residual is None, x is the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nanoengine.api import Norm
from nanoengine.layers.linear import added

__all__ = ["After", "Sublayer", "finished", "joined", "read_stream"]

After = Callable[[Tensor], Tensor]
"""What is done to a result before it joins the stream: a norm, a factor. [T, hidden] -> [T, hidden]."""


class Sublayer(nn.Module):
    """Attention or an MLP: `forward(hidden, ...)`, [T, hidden] -> [T, hidden], is all that it needs.

    `joined` may also be overridden, to use kernels that fuse the norm before it or the addition after it.
    """

    def joined(
        self, norm: Norm | None, x: Tensor, residual: Tensor | None, *rest: Any, after: After | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after the norm, this module, and `after`: (x, residual) -> (x, residual)."""
        return _plainly(self, norm, x, residual, *rest, after=after)

    def name_next_norm(self, norm: Norm) -> None:
        """Says which norm reads the stream after this module: see `ParallelLinear.next_norm`."""


def joined(
    module: nn.Module, norm: Norm | None, x: Tensor, residual: Tensor | None, *rest: Any, after: After | None = None
) -> tuple[Tensor, Tensor | None]:
    """`Sublayer.joined` of any module. A module that has hooks (a tap) is called by itself, so that they run."""
    if isinstance(module, Sublayer) and not (module._forward_hooks or module._forward_pre_hooks):
        return module.joined(norm, x, residual, *rest, after=after)
    return _plainly(module, norm, x, residual, *rest, after=after)


def _plainly(
    module: nn.Module, norm: Norm | None, x: Tensor, residual: Tensor | None, *rest: Any, after: After | None
) -> tuple[Tensor, Tensor | None]:
    hidden, residual = read_stream(norm, x, residual)
    out: Tensor = module(hidden, *rest)
    return (out if after is None else after(out)), residual


def read_stream(norm: Norm | None, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(what a module after the norm gets, the stream)."""
    if norm is not None:
        return norm.add(x, residual)
    total = x if residual is None else x + residual
    return total, total


def finished(layer: nn.Module, x: Tensor, residual: Tensor, after: After | None) -> tuple[Tensor, Tensor | None]:
    """The last linear layer of a `Sublayer`, and its result in the stream: in one kernel if nothing is in between."""
    return added(layer, x, residual) if after is None else (after(layer(x)), residual)
