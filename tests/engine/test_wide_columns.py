"""Columns of fixed width, in slots' tables and supplied for a draw; and the checks of their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from nanoengine import SamplingParams
from nanoengine.api import ColumnSpec, PluginError, StandardOp
from nanoengine.core.execution.slots import FixedTable
from nanoengine.params.columns import pack_columns, pack_draws
from nanoengine.testing.conformance import ConformanceError, check_processor
from nanoengine.testing.mock_model import reference_logits

from . import chain_plugin
from .chain_plugin import Chain, hashed, one_by_one, pair_behind
from .support import VOCAB, mock_llm, prompts, tokens_of

COUNT = 16
Forbidden = Callable[[Sequence[int]], Sequence[int]]


def without(prompt: Sequence[int], forbidden: Forbidden) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(COUNT):
        logits = reference_logits(tokens, VOCAB)
        logits[list(forbidden(tokens))] = float("-inf")
        tokens.append(int(logits.argmax()))
    return tuple(tokens[len(prompt) :])


def expected(prompt: Sequence[int], kind: int) -> tuple[int, ...]:
    """A request without the processor, with a fixed pair, and with one that walks."""
    kinds: list[Forbidden] = [lambda _: [], lambda _: pairs(prompt), lambda tokens: pair_behind(tokens[-1], VOCAB)]
    return without(prompt, kinds[kind])


def pairs(prompt: Sequence[int]) -> tuple[int, int]:
    """The two ids that the model likes best behind the prompt."""
    best = reference_logits(list(prompt), VOCAB).topk(2).indices.tolist()
    return best[0], best[1]


GREEDY = SamplingParams(temperature=0, max_tokens=COUNT)


def params_of(prompt: Sequence[int], kind: int) -> SamplingParams:
    return [GREEDY, GREEDY.replace(pair=pairs(prompt)), GREEDY.replace(pair=pairs(prompt), pair_walks=True)][kind]


@pytest.mark.parametrize(
    "options", [{}, {"num_gpu_blocks_override": 24}, {"max_num_seqs": 2, "spare_slots": 0}], ids=str
)
def test_each_row_has_its_own_pair(tmp_path: Path, options: dict[str, Any]) -> None:
    asked = prompts(9, shortest=4, longest=12)
    kinds = [2, 1, 0] * 3  # the last request of a slot had other values
    with mock_llm(tmp_path, plugins=[chain_plugin], **options) as llm:
        found = tokens_of(llm.generate(asked, list(map(params_of, asked, kinds)), use_tqdm=False))
        assert (llm.stats().preemptions > 0) == ("num_gpu_blocks_override" in options)
    assert found == list(map(expected, asked, kinds))
    assert len(set(found)) == 9


def test_a_slot_forgets_the_pair_of_its_last_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its other rows would be wrong: the mutant resets the first of the two values alone."""
    prompt = [5, 6, 7]
    (first, second), whole = pairs(prompt), expected(prompt, 0)
    reset = FixedTable.reset

    def broken(table: FixedTable, slots: Any) -> None:
        if table.key == ("pair", "ids"):
            table._buffer.write(table.key, slots * 2, np.full(len(slots), -1))
        else:
            reset(table, slots)

    with mock_llm(tmp_path, plugins=[chain_plugin], max_num_seqs=2, spare_slots=0) as llm:
        for mutant in (False, True):
            if mutant:
                monkeypatch.setattr(FixedTable, "reset", broken)
            paired = GREEDY.replace(pair=(second, first))
            llm.generate([prompt, prompt], paired, use_tqdm=False)
            found = tokens_of(llm.generate([prompt, prompt], [GREEDY, paired], use_tqdm=False))
            assert (found[0] == whole) is not mutant


@pytest.mark.parametrize(
    ("spec", "examples"),
    [
        (chain_plugin.register_samplers()[0], [{"chain": 3}, {"chain": 40}]),
        (chain_plugin.register_samplers()[1], [{"pair": (3, 4)}, {"pair_walks": True}]),
    ],
    ids=["mask", "width"],
)
def test_the_kit_checks_such_processors(spec: Any, examples: list[dict[str, Any]]) -> None:
    check_processor(spec, *examples)


class Advances(Chain):
    """Its columns take the drafts for accepted."""

    def columns(self, drafts: Sequence[int]) -> Any:
        found = super().columns(drafts)
        self.history = hashed(drafts, self.history)
        return found


class Counts(Chain):
    """It counts how often it was asked."""

    def columns(self, drafts: Sequence[int]) -> Any:
        self.history += 1
        return super().columns(drafts)


class Blind(Chain):
    """It does not look at drafts."""

    def columns(self, drafts: Sequence[int]) -> Any:
        return {"mask": np.repeat(super().columns(())["mask"], 1 + len(drafts), axis=0)}


class TakesTheLast(Chain):
    """It takes one token of each call."""

    def feed(self, token_ids: Sequence[int]) -> None:
        super().feed(token_ids[-1:])


class Shared(Chain):
    """All samples have one state."""

    one: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args: Any) -> None:
        if not self.one:
            super().__init__(*args)
            self.one.update(self.__dict__)
        self.__dict__ = self.one


class Mixed(Chain):
    """Together, each has what another one has."""

    @classmethod
    def columns_together(cls, states: Any, token_ids: Any, out: Any) -> Any:
        failed = one_by_one(states, token_ids, out)
        out["mask"][:] = out["mask"][::-1].copy()
        return failed


class Together(Chain):
    columns_together = staticmethod(one_by_one)  # type: ignore[assignment]


def test_the_kit_asks_states_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_plugin, "Chain", Together)
    check_processor(chain_plugin.register_samplers()[0], {"chain": 3})


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (Mixed, "columns_together() of several states differs"),
        (Advances, "columns(drafts) changed the state"),
        (Counts, "columns() changed the state"),
        (Blind, "['mask'][1] is not what columns(()) gives once 1 drafts are fed"),
        (TakesTheLast, "the same tokens at once, or one by one"),
        (Shared, "once|apart"),
    ],
)
def test_the_kit_sees_what_is_wrong_with_a_state(
    monkeypatch: pytest.MonkeyPatch, state: type[Chain], said: str
) -> None:
    monkeypatch.setattr(chain_plugin, "Chain", state)
    with pytest.raises(ConformanceError) as raised:
        check_processor(chain_plugin.register_samplers()[0], {"chain": 3})
    assert any(each in str(raised.value) for each in said.split("|"))


WIDE = ColumnSpec(dtype="int32", width=3, default=-1)
MASK = ColumnSpec(dtype="int32", op=StandardOp.BITMASK, default=-1)
HEAT = ColumnSpec(dtype="float32", op=StandardOp.TEMPERATURE, default=1.0)
MANY = ColumnSpec(dtype="int32", ragged=True)
FLAG = ColumnSpec(dtype="bool")


@pytest.mark.parametrize(
    ("spec", "values", "packed"),
    [
        (WIDE, [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]),
        (MASK, np.array([[1], [2**32 - 1]], dtype=np.uint32), [[1], [-1]]),
        (MASK, [[-1], [7]], [[-1], [7]]),
        (HEAT, (0, 0.5), [[0.0], [0.5]]),
        (FLAG, np.array([True, False]), [[True], [False]]),
        (MANY, [[1, 2], []], [[1, 2], []]),
    ],
    ids=str,
)
def test_values_of_two_draws(spec: ColumnSpec, values: Any, packed: list[list[Any]]) -> None:
    found = pack_draws("mine", "x", spec, values, 2, 30)
    assert [each.tolist() for each in found] == packed
    assert {each.dtype for each in found} == {np.dtype(spec.dtype)}


@pytest.mark.parametrize(
    ("spec", "values", "said"),
    [
        (WIDE, [[1, 2, 3]], r"is not of shape \(2, 3\)"),
        (WIDE, [1, 2, 3], r"is not of shape \(2, 3\)"),
        (MASK, [[1, 2], [3, 4]], r"is not of shape \(2, 1\)"),
        (MASK, np.array([[1], [2**32 - 1]]), "does not fit in int32"),
        (HEAT, [0.5, -1.0], "a temperature must be a number from 0"),
        (HEAT, [0.5], r"is not of shape \(2,\)"),
        (FLAG, [True], r"is not of shape \(2,\)"),
        (MANY, [[1, 2]], "1 sequences for 2 draws"),
        (MANY, [[1, 2], [[3]]], "is not a flat sequence"),
    ],
    ids=str,
)
def test_wrong_values_of_two_draws(spec: ColumnSpec, values: Any, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        pack_draws("mine", "x", spec, values, 2, 30)


def test_what_pack_gives_for_columns_of_several_values() -> None:
    specs = {"wide": WIDE, "mask": MASK}
    assert {name: value.tolist() for name, value in pack_columns("mine", specs, {"wide": (1, 2, 3)}).items()} == {
        "wide": [1, 2, 3]
    }
    with pytest.raises(PluginError, match=r"column 'wide': 4 is not of shape \(3,\)"):
        pack_columns("mine", specs, {"wide": 4})
    with pytest.raises(PluginError, match=r"packed \['mask', 'wide'\] for its columns \['wide'\]"):
        pack_columns("mine", specs, {"wide": (1, 2, 3), "mask": [-1]})
