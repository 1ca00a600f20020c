"""The error of the conformance kits, and helpers that raise it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from nanoengine.api.errors import described, is_failure


class ConformanceError(AssertionError):
    """A plugin's part does not do what the engine requires."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ConformanceError(message)


def require_close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Raises `ConformanceError` if the absolute error is too large, or infinities are at different places."""
    require(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    got, want = got.double(), want.double().to(got.device)
    require(bool(got.isnan().logical_not().all()), f"{what}: has NaN")
    finite = want.isfinite()
    require(bool((got.isfinite() == finite).all()), f"{what}: infinities at other places than expected")
    if finite.any():
        worst = float((got - want)[finite].abs().max())
        require(worst <= tolerance, f"{what}: off by {worst:.2g}, more than {tolerance:.2g}")


@contextmanager
def during(what: str) -> Iterator[None]:
    """A context that turns exceptions of the tested part into `ConformanceError`; `what` says what was done."""
    try:
        yield
    except ConformanceError as error:
        raise ConformanceError(f"{what}: {error}") from error
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ConformanceError(f"{what} raised {described(error)}") from error
