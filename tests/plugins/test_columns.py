"""Columns of a standard operation: the core computes it for every row of a batch, so what they declare is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from nanoengine.api import API_VERSION, ColumnSpec, PluginError, ProcessorParams, SamplerSpec, StandardOp
from nanoengine.setup.plugins.validation import check_spec


def spec_with(column: Any) -> SamplerSpec:
    @dataclass(frozen=True)
    class Params(ProcessorParams):
        columns: ClassVar[Any] = {"mine": column}

        mine: float = 0.0

    return SamplerSpec(name="mine", params=Params, target="mine:Processor", api=API_VERSION)


@pytest.mark.parametrize(
    ("op", "dtype", "default"),
    [("TEMPERATURE", "float32", 1.0), ("TEMPERATURE", "float32", 0), ("TOP_K", "int32", 0), ("TOP_P", "float32", 1.0),
     ("MIN_P", "float32", 0.0)],
)  # fmt: skip
def test_inert_defaults_are_taken(op: str, dtype: str, default: float) -> None:
    check_spec(spec_with(ColumnSpec(dtype=dtype, default=default, op=StandardOp[op])))


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (ColumnSpec(dtype="float32", op=StandardOp.TOP_P), r"default is 0, which has an effect in TOP_P: .* use 1\.0"),
        (ColumnSpec(dtype="float32", op=StandardOp.TEMPERATURE, default=0.7), r"use 1\.0"),
        (ColumnSpec(dtype="float32", op=StandardOp.TOP_K), "TOP_K needs a column of dtype int32"),
        (
            ColumnSpec(dtype="int32", op=StandardOp.TEMPERATURE, default=1),
            "TEMPERATURE needs a column of dtype float32",
        ),
        (
            ColumnSpec(dtype="float32", ragged=True, op=StandardOp.TEMPERATURE, default=1.0),
            "that is neither ragged nor",
        ),
        (ColumnSpec(dtype="int32", width=2, op=StandardOp.TOP_K), "neither ragged nor has a width of its own"),
        (ColumnSpec(dtype="int32", width=2, default=-1, op=StandardOp.BITMASK), "nor has a width of its own"),
        (ColumnSpec(dtype="int32", op=StandardOp.BITMASK), "default is 0, which has an effect in BITMASK: .* use -1"),
        (
            ColumnSpec(dtype="int32", width=0),
            "width must be None, or a positive integer of a column that is not ragged",
        ),
        (ColumnSpec(dtype="int32", width=True), "width must be None, or a positive integer"),  # type: ignore[arg-type]
        (ColumnSpec(dtype="int32", width=2, ragged=True), "width must be None, or a positive integer"),
        (ColumnSpec(dtype="float32", op="temperature"), "must be a nanoengine.api.StandardOp"),  # type: ignore[arg-type]
        ("float32", "must be a ColumnSpec"),
    ],
)
def test_what_a_standard_operation_cannot_read_is_refused(column: Any, words: str) -> None:
    with pytest.raises(PluginError, match=words):
        check_spec(spec_with(column))
