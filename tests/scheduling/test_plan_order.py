"""The order of a plan's rows."""

from __future__ import annotations

from nanoengine.core.request import Request
from nanoengine.core.sampling_params import ResolvedParams
from nanoengine.core.scheduling.plan_builder import advance


def decoding(number: int, length: int) -> Request:
    request = Request(
        id=str(number), parent=str(number), prompt_token_ids=[1] * (length - 1), params=ResolvedParams(max_tokens=9),
        seed=0, sample_index=0, arrival=number,
    )  # fmt: skip
    request.output_token_ids.append(2)
    request.num_tokens, request.num_computed = length, length - 1
    return request


def test_the_longest_decode_rows_come_first_and_equals_in_service_order() -> None:
    requests = [decoding(i, length) for i, length in enumerate((5, 90, 30, 5, 31, 90))]
    picks = advance(dict.fromkeys(requests, 1), 0)
    assert [r.arrival for r in picks.decode] == [1, 5, 4, 2, 0, 3]
    assert picks.decode_starts == [89, 89, 30, 29, 4, 4]
