"""Each processor against its numpy twin, in batches where some rows want it and some do not.

The properties are functions of the processor and of the slot tables, so that mutants of both can be shown to fail them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nanoengine.api.errors import PluginError
from nanoengine.api.processors import LogitsProcessor, ProcessorRows, RaggedColumn
from nanoengine.params.sampling_params import SamplingParams

from . import reference
from .harness import BUILT_IN, ShiftedTables, StaleTables, Tables, Tenant, load_processor, resolver, tenant

INF = np.float32(np.inf)
LEVELS = st.sampled_from([-INF, -3.0, -0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 2.0, 4.0])
LOGITS = st.one_of(LEVELS, st.floats(-20, 20, width=32, allow_subnormal=False))
WORDS = st.text("abc", min_size=1, max_size=3)

WANTS: dict[str, Callable[[int], st.SearchStrategy[dict[str, Any]]]] = {
    "temperature": lambda v: st.fixed_dictionaries({"temperature": st.sampled_from([0.0, 1e-7, 0.3, 0.7, 1.5, 100.0])}),
    "top_k": lambda v: st.fixed_dictionaries({"top_k": st.integers(-1, v + 1)}),
    "top_p": lambda v: st.fixed_dictionaries({"top_p": st.floats(0.01, 1.0)}),
    "min_p": lambda v: st.fixed_dictionaries({"min_p": st.floats(0.0, 1.0)}),
    "penalties": lambda v: st.fixed_dictionaries(
        {
            "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
            "presence_penalty": st.sampled_from([-2.0, 0.0, 0.7]),
            "frequency_penalty": st.sampled_from([-1.0, 0.0, 0.3]),
        }
    ),
    "logit_bias": lambda v: st.fixed_dictionaries(
        {"logit_bias": st.dictionaries(st.integers(0, v - 1), st.sampled_from([-100.0, -1.5, 2.5, -float("inf")]))}
    ),
    "allowed_token_ids": lambda v: st.fixed_dictionaries(
        {"allowed_token_ids": st.lists(st.integers(0, v - 1), min_size=1, max_size=v + 2)}
    ),
    "bad_words": lambda v: st.fixed_dictionaries({"bad_words": st.lists(WORDS, max_size=3)}),
}


@st.composite
def cases(
    draw: st.DrawFn, processor: str
) -> tuple[np.ndarray, list[dict[str, Any]], list[tuple[list[int], list[int]]]]:
    """logits [R, V], parameters of each row, (prompt, output) of each row."""
    vocab, count = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    logits = np.array([draw(st.lists(LOGITS, min_size=vocab, max_size=vocab)) for _ in range(count)], dtype=np.float32)
    logits[np.isinf(logits).all(1), 0] = 0.0
    wants = [draw(st.one_of(st.just({}), WANTS[processor](vocab))) for _ in range(count)]
    letters = st.sampled_from([ord(c) % vocab for c in "abcabchij"])  # tokens of the words, bare and after a space
    tokens = st.lists(letters, max_size=6)
    return logits, wants, [(draw(tokens) or [0], draw(tokens)) for _ in range(count)]


def apply(name: str, case: Any, processor: LogitsProcessor | None = None, tables: type[Tables] = Tables) -> np.ndarray:
    """The case through the processor, its requests in slots that others used before."""
    logits, wants, histories = case
    count, vocab = logits.shape
    table = tables(vocab, slots=count + 1)
    earlier = {"top_k": 1, "temperature": 3.0, "allowed_token_ids": [0], "logit_bias": {0: 9.0}, "bad_words": ["abc"]}
    for slot in range(count + 1):
        table.enter(slot, tenant(vocab, repetition_penalty=3.0, top_p=0.01, min_p=1.0, **earlier))
    slots = list(range(count, 0, -1))
    for slot, want, (prompt, output) in zip(slots, wants, histories, strict=True):
        table.enter(slot, Tenant(resolver(vocab).resolve(SamplingParams(**want)), prompt, output))
    rows = table.processor_rows(name, slots)
    made = processor if processor is not None else load_processor(BUILT_IN[name], vocab)
    return made.apply(torch.from_numpy(logits.copy()), rows).numpy()


def expect_kept(out: np.ndarray, row: np.ndarray, must: np.ndarray, may: np.ndarray) -> None:
    """What is kept has its bits; `may` differs from `must` within rounding of the threshold."""
    kept = ~np.isneginf(out) | np.isneginf(row)
    assert (kept | ~must).all(), "a token that belongs in was cut"
    assert (may | ~kept | np.isneginf(row)).all(), "a token that does not belong in was kept"
    assert (out[kept].view(np.uint32) == row[kept].view(np.uint32)).all()


def check_temperature(out: np.ndarray, row: np.ndarray, want: dict[str, Any], *_: Any) -> None:
    np.testing.assert_allclose(out, reference.temperature(row, want["temperature"]), rtol=1e-6)


def check_top_k(out: np.ndarray, row: np.ndarray, want: dict[str, Any], *_: Any) -> None:
    kept = reference.top_k_kept(row, want["top_k"])
    expect_kept(out, row, kept, kept)


def check_top_p(out: np.ndarray, row: np.ndarray, want: dict[str, Any], *_: Any) -> None:
    above, p = reference.top_p_share_above(row.astype(np.float64)), np.float64(np.float32(want["top_p"]))
    everything = np.full(len(row), want["top_p"] == 1.0)
    expect_kept(out, row, (above < p - 1e-6) | everything, (above < p + 1e-6) | everything)


def check_min_p(out: np.ndarray, row: np.ndarray, want: dict[str, Any], *_: Any) -> None:
    p = reference.probabilities(row.astype(np.float64))
    floor = want["min_p"] * p.max()
    expect_kept(out, row, p >= floor * (1 + 1e-5), p >= floor * (1 - 1e-5))


def check_penalties(
    out: np.ndarray, row: np.ndarray, want: dict[str, Any], prompt: list[int], output: list[int]
) -> None:
    expected = reference.penalties(row.astype(np.float64), prompt, output, **want)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def check_logit_bias(out: np.ndarray, row: np.ndarray, want: dict[str, Any], *_: Any) -> None:
    expected = row.copy()
    for token, bias in want["logit_bias"].items():
        expected[token] += np.float32(bias)
    np.testing.assert_array_equal(out, expected)


def check_allowed_token_ids(out: np.ndarray, row: np.ndarray, want: dict[str, Any], *_: Any) -> None:
    allowed = np.isin(np.arange(len(row)), want["allowed_token_ids"])
    expect_kept(out, row, allowed, allowed)


def check_bad_words(
    out: np.ndarray, row: np.ndarray, want: dict[str, Any], prompt: list[int], output: list[int]
) -> None:
    sequences = []
    for word in want["bad_words"]:
        bare = [ord(c) % len(row) for c in word]
        spaced = [(ord(word[0]) + 7) % len(row), *bare[1:]]
        sequences += [bare] if spaced[0] == bare[0] else [bare, spaced]
    np.testing.assert_array_equal(out, reference.bad_words(row, output, sequences))


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def prop(name: str, case: Any, processor: LogitsProcessor | None = None, tables: type[Tables] = Tables) -> int:
    """Every row is as its own parameters say. Returns how many rows the processor changed."""
    logits, wants, histories = case
    out = apply(name, case, processor, tables)
    for r, want in enumerate(wants):
        if want:
            CHECKS[name](out[r], logits[r], want, *histories[r])
        else:
            assert out[r].tobytes() == logits[r].tobytes(), "a row that wants nothing was changed"
    return int((out.view(np.uint32) != logits.view(np.uint32)).any(1).sum())


def examine(name: str, processor: LogitsProcessor | None = None, tables: type[Tables] = Tables) -> int:
    """Runs the property on the same 120 cases each time; returns rows changed, to show that it bites."""
    changed = 0

    @settings(
        max_examples=120, derandomize=True, database=None, phases=[Phase.generate], deadline=None,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(cases(name))
    def run(case: Any) -> None:
        nonlocal changed
        changed += prop(name, case, processor, tables)

    run()
    return changed


def test_every_processor_has_its_check() -> None:
    by_state = {"structured_outputs", "functions"}  # what they do is in no parameter: test_functions, tests/grammars
    assert set(CHECKS) == set(WANTS) == set(BUILT_IN) - by_state


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_processor_against_reference(name: str) -> None:
    assert examine(name) > 20


@pytest.mark.parametrize("name", sorted(CHECKS))
@pytest.mark.parametrize("tables", [ShiftedTables, StaleTables])
def test_wrong_columns_are_noticed(name: str, tables: type[Tables]) -> None:
    with pytest.raises(AssertionError):
        examine(name, tables=tables)


class Ignored(LogitsProcessor):
    """Does nothing."""

    def apply(self, logits: torch.Tensor, rows: Any) -> torch.Tensor:
        return logits


class NoCrossing(LogitsProcessor):
    """Nucleus without the token that crosses top_p (but never empty)."""

    def apply(self, logits: torch.Tensor, rows: Any) -> torch.Tensor:
        values, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        drop = values.cumsum(-1) > rows.column("top_p")[:, None]
        drop[:, 0] = False
        drop &= (rows.column("top_p") < 1)[:, None]
        return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)


class NoTies(LogitsProcessor):
    """Exactly k tokens."""

    def apply(self, logits: torch.Tensor, rows: Any) -> torch.Tensor:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        k = rows.column("top_k")[:, None]
        drop = (torch.arange(logits.shape[1]) >= k) & (k > 0)
        return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)


class PromptCounts(LogitsProcessor):
    """Presence penalty of prompt tokens, too."""

    def apply(self, logits: torch.Tensor, rows: Any) -> torch.Tensor:
        processor = load_processor(BUILT_IN["penalties"], logits.shape[1])
        return processor.apply(logits, rows) - rows.column("presence_penalty")[:, None] * rows.prompt_mask


@pytest.mark.parametrize(
    ("name", "mutant"),
    [(name, Ignored) for name in sorted(CHECKS)]
    + [("top_p", NoCrossing), ("top_k", NoTies), ("penalties", PromptCounts)],
)
def test_mutant_processors_are_noticed(name: str, mutant: type[LogitsProcessor]) -> None:
    with pytest.raises(AssertionError):
        examine(name, processor=mutant(None))  # type: ignore[arg-type]


def test_bad_words_look_at_the_output_only() -> None:
    """As in vLLM: a word that begins in the prompt may be completed."""
    logits = np.zeros((2, 200), dtype=np.float32)
    wants = [{"bad_words": ["ab"]}] * 2
    out = apply("bad_words", (logits, wants, [([1, ord("a")], []), ([1], [ord("a")])]))
    assert out[0, ord("b")] == 0.0
    assert out[1, ord("b")] == -np.inf
    assert np.isneginf(out).sum() == 1


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p"])
def test_argmax_invariant_processors_are(name: str) -> None:
    generator = np.random.default_rng(3)
    logits = generator.integers(-4, 4, (64, 50)).astype(np.float32)  # many ties
    want = {"temperature": 0.4, "top_k": 3, "top_p": 0.5, "min_p": 0.3}[name]
    out = apply(name, (logits, [{name: want}] * 64, [([0], [])] * 64))
    assert load_processor(BUILT_IN[name], 50).argmax_invariant
    assert (out.argmax(1) == logits.argmax(1)).all()
    assert (out != logits).any()


def test_wide_rows_are_searched_level_by_level() -> None:
    """5,000 tokens: nuclei of one, hundreds and thousands of tokens, and a tie that no short list can end."""
    generator = np.random.default_rng(7)
    rows = [generator.normal(size=5000) * s for s in (8.0, 2.5, 0.1)] + [np.zeros(5000)]
    logits = np.array(rows, dtype=np.float32)
    out = apply("top_p", (logits, [{"top_p": 0.9}] * 4, [([0], [])] * 4))
    sizes = np.isfinite(out).sum(1)
    assert sizes[0] < 128 < sizes[1] < 2048 < sizes[2] < 5000 == sizes[3]
    for r in range(4):
        check_top_p(out[r], logits[r], {"top_p": 0.9})
    logits[3, :40] = 1.0
    out = apply("top_k", (logits, [{"top_k": k} for k in (40, 1000, 3000, 41)], [([0], [])] * 4))
    assert np.isfinite(out).sum(1).tolist() == [40, 1000, 3000, 5000]


def test_a_column_that_is_not_there_or_of_the_other_kind_is_refused_in_words() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    columns = {"strength": torch.zeros(2), "ids": RaggedColumn(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32))}
    rows = ProcessorRows(slots=none, positions=none, prompt_lens=none, vocab_start=0, vocab_size=9, columns=columns)
    assert rows.column("strength") is columns["strength"]
    assert rows.ragged("ids") is columns["ids"]
    for read, name, words in (
        (rows.column, "strenght", "no column 'strenght'; did you mean 'strength'"),
        (rows.ragged, "id", "no column 'id'; did you mean 'ids'"),
        (rows.column, "ids", "must be read by rows.ragged('ids')"),
        (rows.ragged, "strength", "must be read by rows.column('strength')"),
    ):
        with pytest.raises(PluginError, match=re.escape(words)):
            read(name)
