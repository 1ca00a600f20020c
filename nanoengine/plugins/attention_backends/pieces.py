"""Groups the rows of a step into padded batches, in plain Python, from the lengths that the host knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from nanoengine.api import StepInputs

DECODE_WASTE = 20  # padding blocks that cost as much as one more piece (40 us against 2 us a block, two CPU cores)
PREFILL_WASTE = 4096  # query-key pairs that cost as much as one more piece
LONG = 4 * PREFILL_WASTE  # query-key pairs from which a row is not faster in a batch
DRAFT_QUERIES = 16  # rows of more tokens have no drafts, so the host knows their exact lengths


@dataclass(frozen=True, slots=True)
class Rows:
    """Query lengths, context lengths (including this step's tokens) and first token of each row."""

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, inputs: StepInputs) -> Rows:
        return cls(inputs.query_lens_host, inputs.seq_lens_host, tuple(accumulate(inputs.query_lens_host, initial=0)))


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are computed together, padded to `queries` queries and `blocks` blocks.

    `exact`: the lengths on the host are exact, not upper bounds.
    """

    rows: tuple[int, ...]
    queries: int
    blocks: int
    exact: bool


def plan_pieces(rows: Rows, block_size: int, max_gather: int) -> list[Group]:
    """Divides all rows into groups. A group gathers at most `max_gather` tokens; a single row may need more.

    Rows with one query are sorted by length and divided where padding would cost more than another group. Short rows
    with several queries are grouped in the same way; a long one is a group of its own, unless it may have drafts.
    """
    blocks = [-(-length // block_size) for length in rows.seq_lens]
    single = [row for row, count in enumerate(rows.query_lens) if count == 1]
    several = [row for row, count in enumerate(rows.query_lens) if count > 1]
    most = max_gather // block_size
    groups = [
        Group(tuple(batch), 1, max(blocks[row] for row in batch), False)
        for batch in _batches(single, [1] * len(blocks), blocks, most, DECODE_WASTE)
    ]
    exact = {row for row in several if rows.query_lens[row] > DRAFT_QUERIES}
    alone = {row for row in exact if rows.query_lens[row] * blocks[row] * block_size > LONG}
    short = [row for row in several if row not in alone]
    for batch in _batches(short, rows.query_lens, blocks, most, PREFILL_WASTE // block_size):
        queries = max(rows.query_lens[row] for row in batch)
        groups.append(Group(tuple(batch), queries, max(blocks[row] for row in batch), exact.issuperset(batch)))
    groups += [Group((row,), rows.query_lens[row], blocks[row], True) for row in sorted(alone)]
    return groups


def _batches(
    rows: Iterable[int], queries: tuple[int, ...] | list[int], blocks: list[int], most: int, allowed: int
) -> Iterator[list[int]]:
    """One batch of all rows in ascending order if they fit in it, else batches of similar rows, the longest first.

    `allowed`: most padding of a batch (queries times blocks). `most`: most blocks that a batch may gather.
    """
    batch: list[int] = []
    wide = deep = real = 0
    for row in sorted(rows, key=lambda row: (-blocks[row], -queries[row], row)):
        wide_now, deep_now = max(wide, queries[row]), max(deep, blocks[row])
        real_now = real + queries[row] * blocks[row]
        count = len(batch) + 1
        if batch and (count * wide_now * deep_now - real_now > allowed or count * deep_now > most):
            yield sorted(batch)
            batch, wide_now, deep_now, real_now = [], queries[row], blocks[row], queries[row] * blocks[row]
        batch.append(row)
        wide, deep, real = wide_now, deep_now, real_now
    if batch:
        yield sorted(batch)
