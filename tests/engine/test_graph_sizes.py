"""Row counts that graphs are captured for: the usual ones exactly, any other padded by little."""

from __future__ import annotations

from bisect import bisect_left

import pytest

from nanoengine.core.execution.graphs import graph_sizes


@pytest.mark.parametrize("most", [1, 7, 8, 20, 64, 100, 256, 1000, 1024])
def test_sizes_hold_every_number_of_rows_with_little_padding(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == most
    assert {n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if n <= most} <= set(sizes)
    for rows in range(1, most + 1):
        assert sizes[bisect_left(sizes, rows)] <= max(2 * rows, rows + 3), rows
