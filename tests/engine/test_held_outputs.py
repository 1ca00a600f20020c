"""Streamed outputs copy a sample's tokens only when they are read; they show what it had when they were made."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoengine import LLM, CompletionOutput, RequestOutput, SamplingParams
from nanoengine.api.deltas import LogprobRows, RequestDelta, SampleDelta
from nanoengine.api.outputs import RequestMetrics, copy_when_read
from nanoengine.core.step import f32, i32
from nanoengine.params.input_processor import CheckedRequest
from nanoengine.params.resolver import ResolvedParams
from nanoengine.text import Tokenizer
from nanoengine.text import outputs as output_module
from nanoengine.text.outputs import OutputAssembler
from tests.engine.support import greedy, mock_llm

Step = tuple[int, bytes, bool]  # which sample, its new tokens, whether its length ends it
TOKENS = st.text("abc", min_size=1, max_size=4).map(str.encode)
STEPS = st.lists(st.tuples(st.integers(0, 1), TOKENS, st.integers(0, 7).map((7).__eq__)), max_size=12)


def drawn(token_ids: bytes) -> LogprobRows:
    n = len(token_ids)
    return LogprobRows(
        rows=i32([0] * n),
        positions=i32(range(n)),
        token_ids=i32(list(token_ids)),
        logprobs=f32([-t for t in token_ids]),
        ranks=i32([1] * n),
        top_offsets=i32([0] * (n + 1)),
    )


def streamed(tokenizer: Tokenizer, steps: list[Step], params: ResolvedParams) -> list[RequestOutput]:
    """One output a step that a sample had a part in; none of them is read."""
    given = CheckedRequest(request_id="r", prompt_token_ids=(1,), params=params)
    assembler, made, gone = OutputAssembler(given, tokenizer), list[RequestOutput](), set[int]()
    for index, token_ids, ends in steps:
        if index not in gone:
            reason: Any = "length" if ends else None
            new = SampleDelta(index, tuple(token_ids), drawn(token_ids), reason)
            gone |= {*assembler.take(RequestDelta("r", (new,))), *([index] if ends else [])}
            output = assembler.output()
            counted = RequestMetrics(arrival=0.0, num_generated=output.metrics.num_generated)  # without its times
            made.append(dataclasses.replace(output, metrics=counted))
    return made


def differs(tokenizer: Tokenizer, steps: list[Step], params: ResolvedParams) -> bool:
    """Whether an output that is read at the end shows anything but what the steps up to its own make."""
    alone = [streamed(tokenizer, steps[:i], params) for i in range(1, len(steps) + 1)]
    then = {len(made): made[-1] for made in alone if made}  # a step of a sample that has ended makes none
    return streamed(tokenizer, steps, params) != [then[number] for number in sorted(then)]


@given(STEPS, st.sampled_from([(), ("ab",), ("cab", "bb")]), st.sampled_from([None, 0]))
@settings(max_examples=150, deadline=None)
def test_what_is_held_never_changes(
    tokenizer: Tokenizer, steps: list[Step], stop: tuple[str, ...], logprobs: int | None
) -> None:
    assert not differs(tokenizer, steps, ResolvedParams(n=2, stop=stop, logprobs=logprobs))


def test_without_a_bound_it_would(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant: it copies all that the list has by the time."""

    def boundless(output: Any, fields: Mapping[str, list[Any]]) -> None:
        copy_when_read(output, fields)
        object.__setattr__(output, "_growing", {name: (entries, sys.maxsize) for name, entries in fields.items()})

    monkeypatch.setattr(output_module, "copy_when_read", boundless)
    assert differs(tokenizer, [(0, b"ab", False), (0, b"c", False)], ResolvedParams(n=2))


def two() -> tuple[CompletionOutput, CompletionOutput]:
    """Two equal outputs: one of a sample that went on, one made at once."""
    ids, logprobs = [5, 6], [{5: 0}, {6: 0}]
    one: Any = {"index": 0, "text": "x"}
    held = CompletionOutput(**one, token_ids=())
    copy_when_read(held, {"token_ids": ids, "logprobs": logprobs})
    ids.append(7)
    logprobs.append({7: 0})
    return held, CompletionOutput(**one, token_ids=(5, 6), logprobs=({5: 0}, {6: 0}))  # type: ignore[arg-type, dict-item]


@pytest.mark.parametrize(
    "way",
    [
        lambda output: output,
        lambda output: pickle.loads(pickle.dumps(output)),
        copy.copy,
        copy.deepcopy,
        dataclasses.replace,
        lambda output: CompletionOutput(**dataclasses.asdict(output)),
    ],
    ids=["itself", "pickle", "copy", "deepcopy", "replace", "asdict"],
)
def test_it_is_like_any_other(way: Any) -> None:
    held, plain = two()
    assert way(held) == plain
    held, plain = two()
    assert plain == way(held)
    assert repr(way(held)) == repr(plain)
    assert json.dumps(way(held).token_ids) == "[5, 6]"
    assert type(held.token_ids) is tuple
    assert held.token_ids is held.token_ids
    assert hash(held.token_ids) == hash((5, 6))


def test_it_is_frozen_and_has_no_other_names() -> None:
    held, plain = two()
    for output in (held, plain):
        with pytest.raises(AttributeError, match="'CompletionOutput' object has no attribute 'tokens'"):
            output.tokens  # noqa: B018  # type: ignore[attr-defined]
        with pytest.raises(dataclasses.FrozenInstanceError):
            output.token_ids = ()  # type: ignore[misc]
    assert not hasattr(plain, "_growing")


@pytest.mark.parametrize("way", [OutputAssembler.output, OutputAssembler.new_output])
def test_what_a_stream_makes_is_what_the_constructors_make(tokenizer: Tokenizer, way: Any) -> None:
    """Of the same classes, frozen, equal to a copy of all fields by the constructor, and as easily pickled."""
    given = CheckedRequest(request_id="r", prompt_token_ids=(1,), params=ResolvedParams(logprobs=0))
    assembler = OutputAssembler(given, tokenizer)
    assembler.take(RequestDelta("r", (SampleDelta(0, (97, 98), drawn(b"ab"), None),)))
    made: RequestOutput = way(assembler)
    for each, kind in ((made, RequestOutput), (made.outputs[0], CompletionOutput), (made.metrics, RequestMetrics)):
        values = {f.name: getattr(each, f.name) for f in dataclasses.fields(kind)}
        assert type(each) is kind
        assert each == kind(**values) == pickle.loads(pickle.dumps(each))
        assert repr(each) == repr(kind(**values))
        for name in values:
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(each, name, None)


def test_outputs_that_are_not_read_copy_no_tokens(tokenizer: Tokenizer) -> None:
    """Two thousand outputs of a sample that grows to as many tokens: some hundred bytes each, not eight a token."""
    steps = [(0, b"x", False)] * 2000
    tracemalloc.start()
    try:
        held = streamed(tokenizer, steps, ResolvedParams(n=2, detokenize=False))
        size, _ = tracemalloc.get_traced_memory()
        assert size < 4 * 2**20
        read = sum(len(output.outputs[0].token_ids) for output in held)
        assert read == sum(range(1, 2001))
        assert tracemalloc.get_traced_memory()[0] > 16 * 2**20  # the measure sees copies
    finally:
        tracemalloc.stop()


def test_a_stream_held_whole(tmp_path: Path) -> None:
    llm: LLM
    with mock_llm(tmp_path) as llm, llm.stream([1, 2], SamplingParams(temperature=0, max_tokens=30)) as stream:
        held = list(stream)
    tokens = greedy([1, 2], 30)
    assert [output.outputs[0].token_ids for output in held] == [tokens[:i] for i in range(1, 31)]
