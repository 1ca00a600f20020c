"""How a kit says that a part does not keep its contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from nanoengine.api.errors import described, is_failure


class ConformanceError(AssertionError):
    """A plugin's part does not do what the engine relies on."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ConformanceError(message)


def require_close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Absolute error, in the wider of the two dtypes; infinities must stand in the same places."""
    require(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    got, want = got.double(), want.double().to(got.device)
    require(bool(got.isnan().logical_not().all()), f"{what}: holds NaN")
    finite = want.isfinite()
    require(bool((got.isfinite() == finite).all()), f"{what}: infinities in other places than expected")
    if finite.any():
        worst = float((got - want)[finite].abs().max())
        require(worst <= tolerance, f"{what}: off by {worst:.2g}, more than {tolerance:.2g}")


@contextmanager
def during(what: str) -> Iterator[None]:
    """Says during what an exception was raised by the part under test."""
    try:
        yield
    except ConformanceError as error:
        raise ConformanceError(f"{what}: {error}") from error
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ConformanceError(f"{what} raised {described(error)}") from error
