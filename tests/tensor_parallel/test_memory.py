"""A rank that runs out of memory: all ranks leave the step, and its rows run in smaller steps. No rank hangs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from engine.support import prompts

from nanoengine import LLM
from nanoengine.core.scheduling.draft import TokenBudget

from . import faulty
from .faulty import Shortage
from .support import PARAMS, faulty_llm, generate, pids

ASKED = [[token % faulty.HARMLESS for token in prompt] for prompt in prompts(7, shortest=3, longest=9)]
MIXED = [
    PARAMS.replace(temperature=i % 3 * 0.7, seed=i, presence_penalty=i % 2 * 0.5, logprobs=1 if i == 2 else None)
    for i in range(len(ASKED))
]
MIXED[4:6] = [each.replace(chain=60, allowed_token_ids=list(range(faulty.HARMLESS))) for each in MIXED[4:6]]
Engine = tuple[LLM, list[tuple[int, ...]]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine of two ranks, and the tokens of one rank."""
    folder = tmp_path_factory.mktemp("two")
    with faulty_llm(folder, tensor_parallel_size=1) as one:
        wanted = generate(one, ASKED, MIXED)
    with faulty_llm(folder, step_timeout=20.0) as llm:
        yield llm, wanted


def set_shortage(llm: LLM, shortage: Shortage) -> None:
    llm._built.executor.call("tensor_parallel.faulty:set_shortage", *shortage)


@pytest.mark.parametrize(
    "shortage",
    [
        Shortage((1,), "writes", 4),
        Shortage((1,), "first", 4),
        Shortage((0,), "forward", 4),
        Shortage((1,), "logits", 2),
        Shortage((1,), "tail", 2),
        Shortage((0,), "tail", 2),
        Shortage((0, 1), "forward", 4),
    ],
    ids=str,
)
def test_all_ranks_leave_the_step(two: Engine, shortage: Shortage, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever memory runs out, on one rank or on both: the tokens stay the same, and the ranks live on."""
    llm, wanted = two
    before, processes = llm.stats(), pids(llm)
    set_shortage(llm, shortage)
    llm.engine._logged_errors.clear()
    llm.engine.scheduler._budget = TokenBudget(2048)
    with caplog.at_level(logging.WARNING):
        assert generate(llm, ASKED, MIXED) == wanted
    stats = llm.stats()
    assert stats.steps_withdrawn > before.steps_withdrawn + 1
    assert stats.preemptions == stats.steps_broken == 0
    assert stats.free_blocks == stats.num_blocks
    set_shortage(llm, Shortage())
    assert generate(llm, ASKED, MIXED) == wanted
    assert pids(llm) == processes
    (message,) = caplog.messages
    assert "of 2: MemoryError: no memory for " in message
    assert any(f"rank {rank} of 2" in message for rank in shortage.ranks)


def test_a_request_that_does_not_fit_fails_alone(two: Engine) -> None:
    """Rank 1 has no memory for a step that holds a certain token."""
    llm, _ = two
    plain = generate(llm, ASKED)
    outputs = llm.generate([*ASKED[:3], [5, faulty.RUNS_OUT, 7], *ASKED[3:]], PARAMS, use_tqdm=False)
    failed = outputs.pop(3)
    assert [output.outputs[0].token_ids for output in outputs] == plain
    stats = llm.stats()
    assert stats.free_blocks == stats.num_blocks
    assert stats.preemptions == 0
    assert failed.error is not None
    assert failed.error.code == "out_of_memory"
    for text in ("rank 1 of 2: RuntimeError: ", "allocate", "in a step of a single token"):
        assert text in str(failed.error)
