"""Values of processors' columns, from what plugins return to checked arrays. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nanoengine.api.errors import ParamsError, PluginError, shown
from nanoengine.api.processor_params import ColumnSpec, StandardOp

MAX_RAGGED = 16_384
"""Most values of one request in a ragged column. The table of the column is as wide as its widest row, in all slots."""


class TooWide(ParamsError):
    """A request has more than `MAX_RAGGED` values for a ragged column."""


def pack_columns(processor: str, specs: Mapping[str, ColumnSpec], values: Mapping[str, Any]) -> dict[str, Any]:
    """A processor's column values as read-only arrays of the declared dtypes: 0-d, or 1-d for ragged columns.

    `values`: what `ProcessorParams.pack` returned. Raises `PluginError` that names the processor and the column, and
    `ParamsError` for more than `MAX_RAGGED` values.
    """
    if not isinstance(values, Mapping):
        raise PluginError(
            f"logits processor {processor!r}: packed {values!r:.80}, not a mapping of its columns {sorted(specs)}"
        )
    packed = {name: spec for name, spec in specs.items() if spec.op is not StandardOp.BITMASK}
    if set(values) != set(packed):
        raise PluginError(
            f"logits processor {processor!r}: packed {sorted(values, key=str)} for its columns {sorted(packed)}"
        )
    return {name: pack_column(processor, name, spec, values[name]) for name, spec in packed.items()}


def pack_column(
    processor: str, name: str, spec: ColumnSpec, value: Any, shape: tuple[int, ...] | None = None
) -> npt.NDArray[Any]:
    """The value of one column as a read-only array of the declared dtype. Raises the errors of `pack_columns`.

    shape: what it must have; default: that of one slot, where a ragged column has any number of values.
    """
    where = f"logits processor {processor!r}, column {name!r}"
    try:
        array = as_column(value, spec)
    except (TypeError, ValueError, OverflowError) as error:
        raise PluginError(f"{where}: no {spec.dtype}: {error}") from error
    if spec.ragged and array.size > MAX_RAGGED:
        raise TooWide(f"{where}: {array.size} values, more than {MAX_RAGGED}: give fewer")
    if shape is None:
        shape = array.shape[:1] if spec.ragged else () if spec.width is None else (spec.width,)
    if array.shape != shape or (spec.ragged and array.ndim != 1):
        wanted = "a flat sequence" if spec.ragged else f"of shape {shape}" if shape else "one number"
        raise PluginError(f"{where}: {value!r:.80} is not {wanted}")
    if spec.op is StandardOp.TEMPERATURE and not ((array >= 0) & (array < np.inf)).all():
        raise PluginError(f"{where}: a temperature must be a number from 0 (greedy) up, not {value!r:.80}")
    array.flags.writeable = False
    return array


Draws = npt.NDArray[Any] | list[npt.NDArray[Any]]


def pack_draws(processor: str, name: str, spec: ColumnSpec, values: Any, draws: int, vocab_size: int) -> Draws:
    """The values of one column for so many draws, as `HostState.columns` returned them: an array [draws, values], or of
    a ragged column a list of flat arrays. An array may be the state's own.

    Raises the errors of `pack_columns`.
    """
    if spec.ragged:
        if len(values) != draws:
            where = f"logits processor {processor!r}, column {name!r}"
            raise PluginError(f"{where}: {len(values)} sequences for {draws} draws")
        return [pack_column(processor, name, spec, each) for each in values]
    shape = (draws, *values_of_draw(spec, vocab_size))
    given = isinstance(values, np.ndarray) and values.shape == shape and values.dtype == spec.dtype
    if not given or spec.op is StandardOp.TEMPERATURE:  # else there is nothing to check or to convert
        values = pack_column(processor, name, spec, values, shape)
    packed: npt.NDArray[Any] = values.reshape(draws, -1)
    return packed


def values_of_draw(spec: ColumnSpec, vocab_size: int) -> tuple[int, ...]:
    """The shape of the values that a column which is not ragged has for one draw."""
    width = -(-vocab_size // 32) if spec.op is StandardOp.BITMASK else spec.width
    return () if width is None else (width,)


def as_column(value: Any, spec: ColumnSpec) -> np.ndarray[Any, Any]:
    """A copy of the numbers in the column's dtype; the plugin may change its own array later.

    Raises `ValueError` for a number that does not fit in int32, of which numpy would take the lower bits.
    """
    if spec.op is StandardOp.BITMASK and isinstance(value, np.ndarray) and value.dtype == np.uint32:
        value = value.view(np.int32)  # the same bits
    with np.errstate(over="ignore"):
        array = np.array(value, dtype=spec.dtype)
    if spec.dtype == "int32" and getattr(value, "dtype", None) != np.int32 and not np.array_equal(array, value):
        raise ValueError(f"{shown(value)} does not fit in int32")
    return array
