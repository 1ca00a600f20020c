"""The steps that need the most memory. They run at the start, in the dummy block, to measure this memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from nanoengine.api.attention import BatchLimits
from nanoengine.api.processors import Need
from nanoengine.core.execution.finish_step import PROMPT_LOGITS_ROWS
from nanoengine.core.execution.results import StepHandle
from nanoengine.core.execution.sampler import Sampler
from nanoengine.core.execution.slots import LOGPROBS, RANDOM, SlotTables
from nanoengine.core.execution.step_inputs import decode_plan
from nanoengine.core.step import Int32, StepPlan

_PROCESSOR_COPIES = 2  # copies of the logits, float32 [rows, vocabulary], that a logits processor may make


def largest_prefill(limits: BatchLimits) -> StepPlan:
    """A step that fills the token budget with prompts of the largest length, and draws a token for each."""
    longest = max(1, min(limits.max_model_len - 1, limits.max_tokens))
    count = min(limits.max_tokens // longest, limits.max_rows)
    lens = np.full(count, longest, dtype=np.int32)
    ends = np.cumsum(lens, dtype=np.int32) - 1
    return replace(decode_plan(_slots(count), 0), num_decode_rows=0, query_lens=lens, logits_index=ends)


def with_prompt_logprobs(prefill: StepPlan, count: int) -> StepPlan:
    """`prefill` with `count` log-probs for the first prompt, at as many positions as are computed at once."""
    asked = np.arange(min(PROMPT_LOGITS_ROWS, int(prefill.query_lens[0]) - 1), dtype=np.int32)
    none = np.zeros_like(asked)
    return replace(
        prefill,
        logits_index=np.concatenate((asked, prefill.logits_index)),
        logits_rows=np.concatenate((none, prefill.logits_rows)),
        sampled=np.concatenate((none.astype(np.bool_), prefill.sampled)),
        prompt_logprobs=np.concatenate((none + count, prefill.prompt_logprobs)),
    )


def largest_draw(limits: BatchLimits, drafts: int) -> StepPlan:
    """A decode step with the most draws: a token of each row and, behind it, so many drafts, as far as tokens go."""
    drafts = min(drafts, limits.max_model_len - 1, limits.max_tokens - 1)
    rows = min(limits.max_rows, limits.max_tokens // (1 + drafts))
    plan = decode_plan(_slots(rows), 0)
    if not drafts:
        return plan
    each = np.full(rows, drafts, dtype=np.int32)
    draws = np.arange(rows * (1 + drafts), dtype=np.int32)
    return replace(
        plan,
        query_lens=1 + each,
        drafts=each,
        logits_index=draws,
        logits_rows=draws // np.int32(1 + drafts),
        sampled=np.ones_like(draws, dtype=np.bool_),
        prompt_logprobs=np.zeros_like(draws),
    )


def largest_steps(
    launch: Callable[[StepPlan], StepHandle],
    tables: SlotTables,
    sampler: Sampler,
    limits: BatchLimits,
    *,
    draws: bool,
    max_logprobs: int,
    drafts: int = 0,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two functions to run: the largest prefill, and the largest sampling.

    The largest sampling is the largest prefill with prompt log-probs, and all draws of a decode step with log-probs
    together with the history that processors may need and their copies of the logits. Processors of plugins are not
    run: a broken one must fail only the requests that use it.

    Args:
        draws: rows use every standard operation instead of the arg-max.
        max_logprobs: the most log-probs that a request may ask for at a position; -1: those of the whole vocabulary.
        drafts: the most that speculation gives a row; 0: it is off.
    """
    vocab_size, run = tables.limits.vocab_size, partial(_run, launch, tables)
    num_logprobs = vocab_size if max_logprobs < 0 else min(max_logprobs, vocab_size)

    def sampling() -> None:
        run(with_prompt_logprobs(largest_prefill(limits), num_logprobs))
        plan = largest_draw(limits, drafts)
        with _asking(tables, sampler, num_logprobs, draws=draws), _history(tables, sampler, len(plan.sampled)):
            run(plan)

    return partial(run, largest_prefill(limits)), sampling


def one_token(launch: Callable[[StepPlan], StepHandle], tables: SlotTables) -> None:
    """Runs a step of one token."""
    _run(launch, tables, decode_plan(_slots(1), 0))


def _run(launch: Callable[[StepPlan], StepHandle], tables: SlotTables, plan: StepPlan) -> None:
    """Runs a step on slots that have no request, and resets the lengths in these slots."""
    launch(plan).wait()
    tables.num_computed.zero_()
    tables.num_tokens.zero_()


def _slots(count: int) -> Int32:
    return np.arange(count, dtype=np.int32)


@contextmanager
def _asking(tables: SlotTables, sampler: Sampler, num_logprobs: int, *, draws: bool) -> Iterator[None]:
    """A context in which every slot requests so many log-probs and, with `draws`, each standard operation."""
    processors = {processor for processor, _ in sampler.standard_columns.values()} if draws else set()

    def ask(wanted: bool) -> None:
        tables.host_num_logprobs.fill(num_logprobs if wanted else -1)
        tables.host_asks[:, LOGPROBS] = wanted
        if draws:
            tables.host_asks[:, RANDOM] = wanted
            tables.greedy.fill_(not wanted)
        for processor in processors:
            tables.host_asks[:, tables.asks_of[processor]] = wanted

    ask(True)
    try:
        yield
    finally:
        ask(False)


@contextmanager
def _history(tables: SlotTables, sampler: Sampler, rows: int) -> Iterator[None]:
    """A context that holds the history tables that processors need, and a step's draws, of so many rows."""
    needs = sorted(sampler.needs & {Need.OUTPUT_COUNTS, Need.PROMPT_MASK})
    slots = torch.arange(rows, device=tables.device) % tables.limits.max_slots
    taken = [tables.history(need).index_select(0, slots) for need in needs]
    if sampler.needs:
        shape = (rows, tables.limits.vocab_size)
        taken += [torch.empty(shape, device=tables.device) for _ in range(_PROCESSOR_COPIES)]
    try:
        yield
    finally:
        tables.vocab_history.tables.clear()
        taken.clear()
