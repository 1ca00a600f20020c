"""Checks of a processor's host state: only `feed` advances it, and it looks at drafts as if they were fed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nanoengine.api import HostState, StandardOp
from nanoengine.params.columns import pack_draws
from nanoengine.params.host_states import Asked, BoundState, next_columns
from nanoengine.params.resolver import PackedProcessor
from nanoengine.testing.conformance.failure import require

_OUTPUT, _DRAFTS = 9, 4  # tokens
Columns = dict[str, list[list[Any]]]


def check_state(processor: PackedProcessor, make: Callable[[], HostState], vocab_size: int) -> None:
    """`make`: a new state of a sample, the same each time. Tokens are drawn from those that its masks allow."""
    rng = random.Random(5)

    def look(state: HostState, drafts: Sequence[int] = ()) -> Columns:
        specs, name = processor.params.columns, processor.name
        return {
            column: [
                each.tolist() for each in pack_draws(name, column, specs[column], values, len(drafts) + 1, vocab_size)
            ]
            for column, values in state.columns(drafts).items()
        }

    def fed(tokens: Sequence[int]) -> HostState:
        state = make()
        if tokens:
            state.feed(tokens)
        return state

    whole = _walk(processor, fed, look, rng, vocab_size)
    output, drafts = whole[:_OUTPUT], whole[_OUTPUT:]
    state, other = make(), make()
    for token in output:
        state.feed([token])
    now = look(state)
    require(look(fed(output)) == now, "columns() differs if feed() gets the same tokens at once, or one by one")
    require(look(other) == look(make()), "states of two samples are not apart: feeding one has changed the other")
    _check_together(processor, [make(), fed(output[:-1])], [[], output[-1:]], [look(make()), now], vocab_size)
    require(look(state) == now, "columns() changed the state: only feed() may advance it")
    found, after = look(state, drafts), [look(fed([*output, *drafts[:count]])) for count in range(len(drafts) + 1)]
    for column in found:
        for count, each in enumerate(after):
            require(
                found[column][count] == each[column][0],
                f"columns(drafts)[{column!r}][{count}] is not what columns(()) gives once {count} drafts are fed",
            )
    require(
        look(state) == now, "columns(drafts) changed the state: drafts may be refused, and only feed() may advance it"
    )
    require(
        look(state, [rng.randrange(vocab_size)]).keys() == now.keys(),
        "columns(drafts) leaves out a column of columns(())",
    )


def _check_together(
    processor: PackedProcessor,
    states: Sequence[HostState],
    token_ids: Sequence[Sequence[int]],
    want: Sequence[Columns],
    vocab_size: int,
) -> None:
    """A new state, and one with tokens. `want`: their columns, one by one."""
    bounds = [BoundState(processor, each) for each in states]
    asked = Asked(bounds, token_ids, np.arange(len(bounds), dtype=np.int32))
    found, failed = next_columns(asked, vocab_size)
    for error in failed.values():
        raise error
    got: list[Columns] = [{} for _ in want]
    for column, draws, values, offsets in found:
        for draw, start, end in zip(draws.tolist(), offsets[:-1], offsets[1:], strict=True):
            got[draw][column] = [values[start:end].tolist()]
    require(got == list(want), "columns_together() of several states differs from feed() and columns() of each")


def _walk(
    processor: PackedProcessor,
    fed: Callable[[Sequence[int]], HostState],
    look: Callable[[HostState], Columns],
    rng: random.Random,
    vocab_size: int,
) -> list[int]:
    """An output, as far as the masks allow one."""
    masks = [name for name, spec in processor.params.columns.items() if spec.op is StandardOp.BITMASK]
    tokens: list[int] = []
    while len(tokens) < _OUTPUT + _DRAFTS:
        allowed = np.ones(-(-vocab_size // 32) * 32, dtype=np.uint8)
        columns = look(fed(tokens))
        for name in masks:
            if name in columns:
                words = np.array(columns[name][0], dtype="<i4")
                allowed &= np.unpackbits(words.view(np.uint8), bitorder="little")
        ids = np.flatnonzero(allowed[:vocab_size]).tolist()
        if not ids:
            break
        tokens.append(rng.choice(ids))
    return tokens
