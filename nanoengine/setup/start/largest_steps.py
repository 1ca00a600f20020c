"""The steps that take most memory, run at start in the dummy block, so that what they take can be measured."""

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
from nanoengine.core.execution.results import LaunchedStep
from nanoengine.core.execution.sampler import Sampler
from nanoengine.core.execution.slots import SlotTables
from nanoengine.core.execution.step_inputs import decode_plan
from nanoengine.core.step import Int32, StepPlan

LOGPROBS = 20  # asked for at each position; as many as other engines allow
_PROCESSOR_COPIES = 2  # [rows, vocabulary] float32 that a logits processor may make beside the logits


def largest_prefill(limits: BatchLimits) -> StepPlan:
    """Fills the token budget with prompts as long as they may be; a token is drawn for each."""
    longest = max(1, min(limits.max_model_len - 1, limits.max_tokens))
    count = min(limits.max_tokens // longest, limits.max_rows)
    lens = np.full(count, longest, dtype=np.int32)
    ends = np.cumsum(lens, dtype=np.int32) - 1
    return replace(decode_plan(_slots(count), 0), num_decode_rows=0, query_lens=lens, logits_index=ends)


def with_prompt_logprobs(prefill: StepPlan, count: int) -> StepPlan:
    """The same, where the first prompt wants `count` log-probs of as many positions as are computed at once."""
    asked = np.arange(min(PROMPT_LOGITS_ROWS, int(prefill.query_lens[0]) - 1), dtype=np.int32)
    none = np.zeros_like(asked)
    return replace(
        prefill,
        logits_index=np.concatenate((asked, prefill.logits_index)),
        logits_rows=np.concatenate((none, prefill.logits_rows)),
        sampled=np.concatenate((none.astype(np.bool_), prefill.sampled)),
        prompt_logprobs=np.concatenate((none + count, prefill.prompt_logprobs)),
    )


def largest_steps(
    launch: Callable[[StepPlan], LaunchedStep],
    tables: SlotTables,
    sampler: Sampler,
    limits: BatchLimits,
    *,
    draws: bool,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """What to run: the largest prefill, and the most that sampling may ask for.

    That is the largest prefill with prompt log-probs; and a draw with log-probs for every row, beside the history that
    the sampler's processors may need and what they may make of it. No plugin's processor is run: a broken one must cost
    only who uses it.

    Args:
        draws: rows use every standard operation, instead of taking the arg-max.
    """

    run = partial(_run, launch, tables)

    def sampling() -> None:
        run(with_prompt_logprobs(largest_prefill(limits), _num_logprobs(tables)))
        with _asking(tables, sampler, draws=draws), _history(tables, sampler, limits.max_rows):
            run(decode_plan(_slots(limits.max_rows), 0))

    return partial(run, largest_prefill(limits)), sampling


def one_token(launch: Callable[[StepPlan], LaunchedStep], tables: SlotTables) -> None:
    """The smallest step."""
    _run(launch, tables, decode_plan(_slots(1), 0))


def _run(launch: Callable[[StepPlan], LaunchedStep], tables: SlotTables, plan: StepPlan) -> None:
    """A step of slots that hold no request, which leaves none of its lengths behind."""
    launch(plan).wait()
    tables.num_computed.zero_()
    tables.num_tokens.zero_()


def _slots(count: int) -> Int32:
    return np.arange(count, dtype=np.int32)


def _num_logprobs(tables: SlotTables) -> int:
    return min(LOGPROBS, tables.limits.vocab_size)


@contextmanager
def _asking(tables: SlotTables, sampler: Sampler, *, draws: bool) -> Iterator[None]:
    """Every slot wants log-probs and, if `draws`, each standard operation."""
    processors = {processor for processor, _ in sampler.standard_columns.values()} if draws else set()

    def ask(wanted: bool) -> None:
        tables.host_num_logprobs.fill(_num_logprobs(tables) if wanted else -1)
        if draws:
            tables.host_greedy.fill(not wanted)
            tables.greedy.fill_(not wanted)
        for processor in processors:
            tables.host_wants[processor].fill(wanted)

    ask(True)
    try:
        yield
    finally:
        ask(False)


@contextmanager
def _history(tables: SlotTables, sampler: Sampler, rows: int) -> Iterator[None]:
    """The tables that processors need, and the rows of them that a step takes out."""
    taken = [
        tables.history(need)[:rows].clone() for need in sorted(sampler.needs & {Need.OUTPUT_COUNTS, Need.PROMPT_MASK})
    ]
    if sampler.needs:
        shape = (rows, tables.limits.vocab_size)
        taken += [torch.empty(shape, device=tables.device) for _ in range(_PROCESSOR_COPIES)]
    try:
        yield
    finally:
        tables.vocab_history.tables.clear()
        taken.clear()
