"""The order of a plan's rows."""

from __future__ import annotations

from nanoengine.core.request import Request
from nanoengine.core.scheduling.plan_builder import Picks, advance, build_plan
from nanoengine.core.step import i32
from nanoengine.params.sampling_params import ResolvedParams


def decoding(number: int, length: int) -> Request:
    request = Request(
        id=str(number), parent=str(number), prompt_token_ids=[1] * (length - 1), params=ResolvedParams(max_tokens=9),
        seed=0, sample_index=0, arrival=number, slot=number,
    )  # fmt: skip
    request.output_token_ids.append(2)
    request.num_tokens, request.num_computed = length, length - 1
    return request


def test_the_longest_decode_rows_come_first_and_equals_by_slot() -> None:
    requests = [decoding(i, length) for i, length in enumerate((5, 90, 30, 5, 31, 90))]
    picks = advance(dict.fromkeys(reversed(requests), 1), 0)
    plan = build_plan(0, picks, {}, {}, {})
    assert plan.slots.tolist() == [1, 5, 4, 2, 0, 3]
    assert plan.starts.tolist() == [89, 89, 30, 29, 4, 4]


def test_steady_rows_and_others_are_one_order() -> None:
    picks = Picks([decoding(7, 90), decoding(3, 31)], [89, 30], [])
    plan = build_plan(0, picks, {}, {}, {}, (i32([1, 4, 2]), i32([89, 30, 29])))
    assert plan.slots.tolist() == [1, 7, 3, 4, 2]
    assert plan.starts.tolist() == [89, 89, 30, 30, 29]
    assert plan.num_decode_rows == 5
