"""What the latency figures are made of."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from nanoengine.api.deltas import RequestDelta, SampleDelta
from nanoengine.api.errors import RequestError
from nanoengine.lab.bench.latency import Percentiles, Timeline, arrivals
from nanoengine.lab.bench.report import Report, number, share


def delta(new: int, error: RequestError | None = None) -> RequestDelta:
    return RequestDelta("a", (SampleDelta(0, (7,) * new),) if new else (), error=error)


def test_a_timeline_counts_tokens_not_deltas() -> None:
    timeline = Timeline(due=0.0)
    for new in (1, 0, 3):
        timeline.take(delta(new))
    assert len(timeline.tokens) == 4
    assert timeline.tokens[1] == timeline.tokens[3] > timeline.tokens[0]
    gap = timeline.tokens[1] - timeline.tokens[0]
    assert timeline.gaps == pytest.approx([gap / 3] * 3), "tokens of one step share the time that it took"


def test_tokens_that_come_first_together_have_no_time_between_them() -> None:
    timeline = Timeline(due=0.0)
    timeline.take(delta(2))
    assert timeline.gaps == []
    timeline.take(delta(1))
    assert len(timeline.gaps) == 1


def test_a_broken_request_breaks_the_measurement() -> None:
    with pytest.raises(RequestError, match="no room"):
        Timeline(due=0.0).take(delta(0, RequestError("does_not_fit", "no room")))


def test_arrivals_come_at_the_given_rate_and_not_evenly() -> None:
    found = arrivals(4000, 20.0)
    assert found[0] == 0.0
    assert found == sorted(found)
    assert found == arrivals(4000, 20.0)
    assert found[-1] == pytest.approx(4000 / 20, rel=0.05)
    gaps = [b - a for a, b in pairwise(found)]
    assert sum(gap < 0.5 / 20 for gap in gaps) / len(gaps) == pytest.approx(0.393, abs=0.03)  # 1 - exp(-0.5)


def test_percentiles_are_in_milliseconds() -> None:
    found = Percentiles.of(x / 1000 for x in range(101))
    assert (found.p50, found.p90, found.p99, found.mean) == pytest.approx((50, 90, 99, 50))


def test_a_report_lines_its_columns_up_and_ends_with_its_notes() -> None:
    columns = {
        "name": lambda r: "x" * int(r.p50),
        "value": lambda r: number(r.p90, 1),
        "of": lambda r: share(r.p90, r.p99),
    }
    row = Percentiles(p50=6, p90=1234.5, p99=2469, mean=0)
    report = Report(
        benchmark="b", settings={"a": 1}, rows=[row, replace(row, p50=2, p90=1)], columns=columns, notes=["missing: y"]
    )
    assert report.table().splitlines() == [
        "name      value   of",
        "xxxxxx  1,234.5  50%",
        "xx          1.0   0%",
        "missing: y",
    ]
    found = report.as_dict()
    assert found["rows"][0] == {"p50": 6, "p90": 1234.5, "p99": 2469, "mean": 0}
    assert {"date", "command", "nanoengine", "gpu", "torch", "triton", "flash-attn"} <= found["environment"].keys()
    assert (number(None), share(1, None), share(None, 1)) == ("-", "-", "-")
