"""Requests that want one output, at the end, are not told token by token; what they get is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanoengine import SamplingParams
from nanoengine.core.outputs import OutputProcessor
from nanoengine.testing.checkpoints import write_byte_tokenizer
from tests.engine.support import greedy, mock_llm, prompts, tokens_of

ASKED = prompts(6, shortest=5, longest=20)
LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All updates that reach the output processor."""
    seen: list[Any] = []
    apply = OutputProcessor.apply

    def watched(self: OutputProcessor, updates: Any, *args: Any) -> Any:
        seen.extend(updates)
        return apply(self, updates, *args)

    monkeypatch.setattr(OutputProcessor, "apply", watched)
    return seen


@pytest.mark.parametrize("overlap", [False, True])
def test_the_same_tokens_with_fewer_updates(tmp_path: Path, told: list[Any], overlap: bool) -> None:
    with mock_llm(tmp_path, block_size=16, overlap=overlap) as llm:
        stop = greedy(ASKED[0], 40)[-7]
        done = llm.generate(ASKED, SamplingParams(temperature=0, max_tokens=40, stop_token_ids=[stop], ignore_eos=True))
    expected = [greedy(prompt, 40, stop=(stop,)) for prompt in ASKED]
    assert tokens_of(done) == expected
    assert [output.metrics.num_generated for output in done] == [len(tokens) for tokens in expected]
    assert any(output.outputs[0].finish_reason == "stop" for output in done)
    assert len(told) < sum(map(len, expected)) / 3


@pytest.mark.parametrize("overlap", [False, True])
def test_the_first_token_is_told_when_it_comes(tmp_path: Path, told: list[Any], overlap: bool) -> None:
    """As the time to first token says: not with the block that it is in."""
    with mock_llm(tmp_path, block_size=64, overlap=overlap) as llm:
        done = llm.generate(ASKED, LONG)
    assert sorted(len(update.new_token_ids) for update in told) == [1] * 6 + [39] * 6
    for output in done:
        times = output.metrics
        assert times.first_token
        assert times.finished
        assert times.first_token < times.finished


@pytest.mark.parametrize("steps", range(4, 12))
def test_an_abort_keeps_the_tokens_that_came(tmp_path: Path, told: list[Any], steps: int) -> None:
    """As many as a request beside it has that is told of each."""
    folder = tmp_path / "mock"
    folder.mkdir()
    write_byte_tokenizer(folder)
    with mock_llm(tmp_path, block_size=16) as llm:
        llm.engine.add_request("quiet", ASKED[1], LONG, final_only=True)
        llm.engine.add_request("loud", ASKED[2], LONG)
        for _ in range(steps):
            llm.engine.step()
        for name in ("quiet", "loud"):
            llm.engine.abort_request(name)
        quiet, loud = sorted(llm.engine.step(), key=lambda output: output.request_id, reverse=True)
    assert quiet.outputs[0].finish_reason == "abort"
    assert len(quiet.outputs[0].token_ids) == quiet.metrics.num_generated >= steps - 1
    for output, prompt in ((quiet, ASKED[1]), (loud, ASKED[2])):
        assert output.outputs[0].token_ids == greedy(prompt, len(loud.outputs[0].token_ids))
        assert output.outputs[0].text == bytes(output.outputs[0].token_ids).decode()
    assert sum(len(update.new_token_ids) for update in told if update.request.parent == "quiet") < steps - 1
