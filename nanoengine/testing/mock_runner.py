"""A runner without a model, in numpy. The sampled tokens show whether the plans were correct.

It has the state of a device: slot tables, which the plans write, and a KV cache with block tables. The KV entry of a
token depends on the token, its position and every KV entry before it, *read through the block table when it is
computed*. A sampled token depends on the entries of its whole history, read in the same way. So a wrong block, a block
that is reused too early, an old slot or a row that should not run any more changes the tokens. `expected_tokens` gives
the correct ones, and `expected_vector` that of a request that pools.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nanoengine.api.deltas import LogprobRows
from nanoengine.core.step import (
    POOL_ALL,
    ROW_FINE,
    NewSlots,
    ProcessorColumn,
    StepPlan,
    StepResult,
    SuppliedColumn,
    f32,
    i32,
    num_slots,
    offsets_of,
)

_MASK = (1 << 64) - 1
_WEIGHTS = np.arange(1, 1 << 16, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)  # one per position


def _mix(value: int) -> int:
    """The 64-bit finaliser of splitmix64: all bits of the result depend on all bits of the value."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _entry(history: int, token: int, position: int) -> int:
    """The KV entry of `token` at `position`, after a history with the weighted sum `history`."""
    return _mix((history + 0x632BE59BD9B4E019 * (token + 1) + (position << 40)) & _MASK)


def _add(history: int, entry: int, position: int) -> int:
    return (history + entry * int(_WEIGHTS[position])) & _MASK


def _choose(
    history: int, length: int, vocab: int, stop_ids: Collection[int], min_len: int, seed: int, index: int, bias: int
) -> int:
    """The token at position `length`. Stop ids are masked if `length` is less than `min_len`."""
    token = (_mix(history ^ _mix((seed * 1000003 + index) & _MASK)) + bias) % vocab
    while length < min_len and token in stop_ids:
        token = (token + 1) % vocab
    return token


def fake_logprob(token: int, position: int) -> float:
    """The log-prob that the mock reports for a token at a position."""
    return -float((token * 31 + position * 7) % 101) / 16


def _hidden(entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """Hidden states [N, 2] of tokens with these KV entries: small integers, whose sums are exact in float32."""
    return np.stack((entries & np.uint64(1023), entries >> np.uint64(54)), axis=1).astype(np.float32)


def expected_vector(prompt: Sequence[int], pooling: str) -> npt.NDArray[np.float32]:
    """float32 [2]: what a request that pools gets if it runs alone in a correct engine."""
    history, entries = 0, []
    for position, token in enumerate(prompt):
        entries.append(_entry(history, token, position))
        history = _add(history, entries[-1], position)
    hidden = _hidden(np.array(entries, dtype=np.uint64))
    return f32(hidden.sum(axis=0) / np.float32(len(prompt)) if pooling == "mean" else hidden[-1])


def expected_tokens(
    prompt: Sequence[int],
    max_tokens: int,
    vocab: int,
    *,
    stop_ids: Collection[int] = (),
    min_tokens: int = 0,
    seed: int = 0,
    sample_index: int = 0,
    bias: Callable[[Sequence[int]], int] = lambda outputs: 0,
) -> list[int]:
    """The output of a request that runs alone in a correct engine, including the stop token that ends it.

    `bias(outputs so far)` is the sum of the request's processor columns. A greedy request has seed 0 and sample index
    0.
    """
    history, tokens = 0, list(prompt)
    for position, token in enumerate(tokens):
        history = _add(history, _entry(history, token, position), position)
    outputs: list[int] = []
    min_len = len(prompt) + min_tokens
    while len(outputs) < max_tokens:
        position = len(tokens)
        token = _choose(history, position, vocab, stop_ids, min_len, seed, sample_index, bias(outputs))
        tokens.append(token)
        outputs.append(token)
        if token in stop_ids and position >= min_len:
            break
        history = _add(history, _entry(history, token, position), position)
    return outputs


class MockRunner:
    """Runs plans in order: `launch` a step, then `wait` for the oldest one. One step may be launched ahead.

    Args:
        groups, num_blocks, block_size: those of the block manager, including the dummy block.
        max_num_seqs, max_model_len, spare_slots: sizes of the slot tables.
        vocab: ids are 0 to vocab - 1.
        guess: the device makes drafts itself, each right with this probability. None: the host does.
    """

    def __init__(
        self,
        *,
        groups: int,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        vocab: int,
        spare_slots: int = 8,
        guess: float | None = None,
    ) -> None:
        assert max_model_len < len(_WEIGHTS)
        garbage = np.random.default_rng(0)
        self.vocab, self.block_size = vocab, block_size
        self.kv = garbage.integers(1, 1 << 63, (groups, num_blocks, block_size), dtype=np.uint64)
        width = -(-max_model_len // block_size)
        slots = num_slots(max_num_seqs, spare_slots)
        self.block_tables = garbage.integers(0, num_blocks, (groups, slots, width), dtype=np.int32)
        self.token_ids = garbage.integers(0, vocab, (slots, max_model_len + 1), dtype=np.int32)
        self._groups, positions = np.arange(groups)[:, None], np.arange(max_model_len + 1)
        self._columns, self._offsets = positions // block_size, positions % block_size  # of each position
        self.lengths = np.zeros(slots, dtype=np.int32)  # known and sampled tokens
        self.computed = np.zeros(slots, dtype=np.int32)
        self.slots: list[dict[str, Any]] = [{} for _ in range(slots)]
        self.columns: list[dict[tuple[str, str], int]] = [{} for _ in range(slots)]
        self.fail_row: Callable[[StepPlan, int], int] = lambda plan, row: ROW_FINE
        """The `failed` code of a row; tests may override it."""
        self._late: StepPlan | None = None  # the newest step, which waits for columns
        self._supplied: dict[int, dict[tuple[str, str], int]] = {}  # its draws -> columns in place of the slot's
        self._guess, self._random = guess, np.random.default_rng(1)
        self._results: deque[StepResult] = deque()

    def launch(self, plan: StepPlan) -> None:
        """Runs the step. Its result is available after `wait`, of a late step after `supply`."""
        assert self._late is None, "launched behind a step without its columns"
        self._enter(plan.new)
        for column in plan.columns:
            self._set_column(column)
        appends = plan.appends
        self.block_tables[appends.group, appends.slot, appends.index] = appends.block
        self._check_plan(plan)
        if plan.late:
            self._late = plan
        else:
            self._results.append(self._run(plan))

    def supply(self, columns: Sequence[SuppliedColumn]) -> None:
        """Runs the late step with these columns."""
        plan, self._late = self._late, None
        assert plan is not None
        for column in columns:
            for i, draw in enumerate(column.draws.tolist()):
                assert plan.sampled[draw], "a column for a position that is not drawn"
                values = column.values[column.offsets[i] : column.offsets[i + 1]]
                self._supplied.setdefault(draw, {})[column.processor, column.column] = int(values.sum())
        self._results.append(self._run(plan))
        self._supplied.clear()

    def wait(self) -> StepResult:
        """The result of the oldest launched step."""
        return self._results.popleft()

    def drop(self) -> None:
        """Drops the results of launched steps, which have failed."""
        self._results.clear()
        self._late = None

    def _enter(self, new: NewSlots) -> None:
        for i, slot in enumerate(new.slots.tolist()):
            tokens = new.token_ids[new.token_offsets[i] : new.token_offsets[i + 1]]
            self.token_ids[slot, : len(tokens)] = tokens
            self.lengths[slot], self.computed[slot] = len(tokens), new.num_computed[i]
            self.columns[slot] = {}
            self.slots[slot] = {
                "seed": 0 if new.greedy[i] else int(new.seeds[i]),
                "index": 0 if new.greedy[i] else int(new.sample_index[i]),
                "min_len": int(new.min_lens[i]),
                "stop_ids": set(new.stop_ids[new.stop_offsets[i] : new.stop_offsets[i + 1]].tolist()),
                "num_logprobs": int(new.num_logprobs[i]),
            }

    def _set_column(self, column: ProcessorColumn) -> None:
        for i, slot in enumerate(column.slots.tolist()):
            values = column.values[column.offsets[i] : column.offsets[i + 1]]
            self.columns[slot][column.processor, column.column] = int(values.sum())

    def _check_plan(self, plan: StepPlan) -> None:
        """Checks what every device requires of a plan. Decode rows read their token on the device, at `starts`."""
        assert plan.num_rows and (plan.query_lens > 0).all()
        assert len(set(plan.slots.tolist())) == plan.num_rows, "a slot twice in one step"
        drafts = plan.drafts if len(plan.drafts) else np.zeros_like(plan.slots)
        assert (plan.query_lens[: plan.num_decode_rows] == 1 + drafts[: plan.num_decode_rows]).all()
        assert not drafts[plan.num_decode_rows :].any()
        assert len(plan.draft_tokens) == drafts.sum()
        assert self._guess is not None or (plan.draft_tokens >= 0).all()
        starts = self.computed[plan.slots]
        exact = self._guess is None or (np.arange(plan.num_rows) >= plan.num_decode_rows)
        assert np.where(exact, plan.starts == starts, plan.starts >= starts).all(), "a row does not begin where KV ends"
        assert (starts + plan.query_lens - drafts <= self.lengths[plan.slots]).all(), "a row reads unknown tokens"
        assert (np.diff(plan.logits_index) > 0).all()
        written = self.written_slots(plan)
        assert (written >= self.block_size).all(), "a row writes into the dummy block"
        assert len({tuple(each) for each in written.T.tolist()}) == plan.num_tokens, "two rows write one KV slot"

    def written_slots(self, plan: StepPlan) -> npt.NDArray[np.int64]:
        """block * block_size + offset of each token, [groups, T]."""
        slots = np.repeat(plan.slots, plan.query_lens)
        starts = np.minimum(plan.starts, self.computed[plan.slots])  # the host's may be too high
        positions = np.concatenate(
            [np.arange(s, s + n) for s, n in zip(starts, plan.query_lens, strict=True)], dtype=np.int64
        )
        blocks = self.block_tables[:, slots, positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size

    def _run(self, plan: StepPlan) -> StepResult:
        offsets = offsets_of(plan.query_lens)
        tokens: list[int] = []
        counts, failed = [0] * plan.num_rows, [ROW_FINE] * plan.num_rows
        sampled_entries: list[tuple[int, int, int, int]] = []
        prompt_entries: list[tuple[int, int, int, int]] = []
        wants: list[list[int]] = [[] for _ in range(plan.num_rows)]
        for i, row in enumerate(plan.logits_rows.tolist()):
            wants[row].append(i)
        drafts = offsets_of(plan.drafts)
        for row, slot in enumerate(plan.slots.tolist()):
            at = int(self.computed[slot])
            end = at + int(plan.query_lens[row])
            guesses = self._guesses(plan, row, slot, drafts) if len(plan.drafts) else []
            self.token_ids[slot, at + 1 : at + 1 + len(guesses)] = guesses
            first, last, right = at - int(offsets[row]) + 1, end - len(guesses), True
            for i in wants[row]:
                position = first + int(plan.logits_index[i])
                if not plan.sampled[i]:
                    token = int(self.token_ids[slot, position])
                    prompt_entries.append((row, position, token, int(plan.prompt_logprobs[i])))
                    continue
                history, at = self._forward(slot, at, position), position
                if not right:
                    continue
                failed[row] = self.fail_row(plan, row)
                columns = {**self.columns[slot], **self._supplied.get(i, {})}
                token, guess = self._sample(slot, history, position, columns), guesses[counts[row] :][:1]
                if failed[row] == ROW_FINE:
                    counts[row] += 1
                    tokens.append(token)
                    if self.slots[slot]["num_logprobs"] >= 0:
                        sampled_entries.append((row, position, token, self.slots[slot]["num_logprobs"]))
                right = guess == [token] and failed[row] == ROW_FINE
            if at < end:
                self._forward(slot, at, end)
            self.computed[slot] = last + max(0, counts[row] - 1)
        for row in np.flatnonzero(plan.pooled).tolist():
            failed[row] = self.fail_row(plan, row)
        return StepResult(
            step=plan.step,
            token_ids=i32(tokens),
            counts=i32(counts),
            failed=i32(failed),
            sampled_logprobs=_logprob_rows(sampled_entries),
            prompt_logprobs=_logprob_rows(prompt_entries),
            pooled=self._sums(plan),
        )

    def _sums(self, plan: StepPlan) -> npt.NDArray[np.float32]:
        """Of the rows that pool, the sums of hidden states, flat. Read from the cache, behind the step."""
        out = [f32()]
        for row in np.flatnonzero(plan.pooled).tolist():
            slot, start, end = int(plan.slots[row]), int(plan.starts[row]), int(plan.starts[row] + plan.query_lens[row])
            positions = np.arange(start if plan.pooled[row] == POOL_ALL else end - 1, end)
            entries = self.kv[0, self.block_tables[0, slot, positions // self.block_size], positions % self.block_size]
            out.append(_hidden(entries).sum(axis=0))
        return np.concatenate(out)

    def _guesses(self, plan: StepPlan, row: int, slot: int, offsets: npt.NDArray[np.int32]) -> list[int]:
        """The row's drafts: the host's, or what the model would draw, now and then another token."""
        given: list[int] = plan.draft_tokens[offsets[row] : offsets[row + 1]].tolist()
        if self._guess is None or -1 not in given:
            return given
        out, at = list[int](), int(self.computed[slot])
        history, token = self._read(slot, at), int(self.token_ids[slot, at])
        for position in range(at, at + int(plan.drafts[row])):
            history = _add(history, _entry(history, token, position), position)
            token = self._draw(slot, history, position + 1, self.columns[slot])
            if self._random.random() >= self._guess:
                token = (token + 1) % self.vocab
            out.append(token)
        return out

    def _forward(self, slot: int, start: int, end: int) -> int:
        """Writes the KV of tokens [start, end). Returns the weighted sum of the whole history, read through the tables.

        All groups have equal entries; if one differs, the sum differs.
        """
        history = self._read(slot, start)
        for position in range(start, end):
            entry = _entry(history, int(self.token_ids[slot, position]), position)
            blocks = self.block_tables[:, slot, position // self.block_size]
            self.kv[np.arange(len(self.kv)), blocks, position % self.block_size] = entry
            history = _add(history, entry, position)
        again = self._read(slot, end)
        return history if again == history else again ^ 1

    def _read(self, slot: int, length: int) -> int:
        blocks = self.block_tables[:, slot, self._columns[:length]]  # [groups, length]
        entries = self.kv[self._groups, blocks, self._offsets[:length]]
        sums = (entries * _WEIGHTS[:length]).sum(axis=1, dtype=np.uint64).tolist()
        first = int(sums[0])
        for other in sums[1:]:
            first = first if other == sums[0] else _mix(first ^ int(other))
        return first

    def _draw(self, slot: int, history: int, position: int, columns: Mapping[tuple[str, str], int]) -> int:
        own = self.slots[slot]
        return _choose(
            history,
            position,
            self.vocab,
            own["stop_ids"],
            own["min_len"],
            own["seed"],
            own["index"],
            sum(columns.values()),
        )

    def _sample(self, slot: int, history: int, position: int, columns: Mapping[tuple[str, str], int]) -> int:
        token = self._draw(slot, history, position, columns)
        if position < self.token_ids.shape[1]:
            self.token_ids[slot, position] = token
        self.lengths[slot] = position + 1
        return token


def _logprob_rows(entries: Sequence[tuple[int, int, int, int]]) -> LogprobRows:
    """Log-probs of the mock for (row, position, token, top) entries. The top ids are those that follow the token."""
    tops = [(token + 1 + k, position) for _, position, token, top in entries for k in range(top)]
    return LogprobRows(
        rows=i32([row for row, _, _, _ in entries]),
        positions=i32([position for _, position, _, _ in entries]),
        token_ids=i32([token for _, _, token, _ in entries]),
        logprobs=f32([fake_logprob(token, position) for _, position, token, _ in entries]),
        ranks=i32([1] * len(entries)),
        top_ids=i32([token for token, _ in tops]),
        top_logprobs=f32([fake_logprob(token, position) for token, position in tops]),
        top_offsets=offsets_of([top for _, _, _, top in entries]),
    )
