"""One delta of several: what a reader that is slower than the engine gets. Nothing is lost by it, only put together."""

from __future__ import annotations

from collections.abc import Sequence

from nanoengine.api.deltas import RequestDelta, SampleDelta, join_rows


def merge(older: RequestDelta, newer: RequestDelta) -> RequestDelta:
    """Both deltas of one request as one; `newer` came behind `older`."""
    return merge_all((older, newer))


def merge_all(deltas: Sequence[RequestDelta]) -> RequestDelta:
    """All deltas, in their order, as one. Takes time linear in their tokens; one delta is returned as it is."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    samples = dict[int, list[SampleDelta]]()
    for delta in deltas:
        for sample in delta.samples:
            samples.setdefault(sample.sample_index, []).append(sample)
    return RequestDelta(
        request_id=last.request_id,
        samples=tuple(_sample(each) for each in samples.values()),
        finished=any(delta.finished for delta in deltas),
        prompt_logprobs=join_rows([d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None]),
        num_cached_tokens=max(delta.num_cached_tokens for delta in deltas),
        num_computed_tokens=max(delta.num_computed_tokens for delta in deltas),
        seed=next((d.seed for d in reversed(deltas) if d.seed is not None), None),
        first_scheduled=next((d.first_scheduled for d in deltas if d.first_scheduled is not None), None),
        pooled=next((d.pooled for d in reversed(deltas) if d.pooled is not None), None),
        error=next((d.error for d in deltas if d.error is not None), None),
    )


def _sample(parts: Sequence[SampleDelta]) -> SampleDelta:
    if len(parts) == 1:
        return parts[0]
    ended = next((part for part in parts if part.finish_reason is not None), parts[-1])
    return SampleDelta(
        parts[0].sample_index,
        tuple(token for part in parts for token in part.token_ids),
        join_rows([part.logprobs for part in parts if part.logprobs is not None]),
        ended.finish_reason,
        ended.stop_reason,
    )
