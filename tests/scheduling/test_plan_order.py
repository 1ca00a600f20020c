"""The order of a plan's rows."""

from __future__ import annotations

from nanoengine.core.request import Request
from nanoengine.core.scheduling.draft import Draft, build_plan
from nanoengine.params.resolver import ResolvedParams


def decoding(number: int, length: int) -> Request:
    request = Request(
        id=str(number), parent=str(number), prompt_token_ids=[1] * (length - 1), params=ResolvedParams(max_tokens=9),
        seed=0, sample_index=0, arrival=number, slot=number,
    )  # fmt: skip
    request.output_token_ids.append(2)
    request.length, request.num_computed = length, length - 1
    return request


def test_the_longest_decode_rows_come_first_and_equals_by_slot() -> None:
    draft = Draft(0, 100)
    for i, length in reversed(list(enumerate((5, 90, 30, 5, 31, 90)))):
        draft.book(decoding(i, length), 1)
    plan = build_plan(draft)
    assert plan.slots.tolist() == [1, 5, 4, 2, 0, 3]
    assert plan.starts.tolist() == [89, 89, 30, 29, 4, 4]
    assert plan.num_decode_rows == 6


def test_prefill_rows_follow_as_they_were_picked() -> None:
    draft, requests = Draft(0, 100), [decoding(i, length) for i, length in enumerate((5, 90, 30))]
    requests[0].num_computed = requests[2].num_computed = 2
    for request, num_new in zip(requests, (3, 1, 4), strict=True):
        draft.book(request, num_new)
    plan = build_plan(draft)
    assert plan.slots.tolist() == [1, 0, 2]
    assert plan.query_lens.tolist() == [1, 3, 4]
    assert (plan.num_decode_rows, plan.sampled.tolist(), plan.logits_index.tolist()) == (1, [True, True], [0, 3])
    assert draft.budget == 92
