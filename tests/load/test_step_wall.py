"""A28: with 1,000 streams a step takes the engine as long as it takes `LLM.generate`."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from nanoengine import LLM, SamplingParams
from nanoengine.testing import mock_model
from tests.load.driver import run, stream
from tests.server.mock_server import metric, mock_folder
from tests.server.running import Running

STREAMS, TOKENS, ROUNDS = 1000, 64, 3
MOST = 1.05
CORES = 8  # with fewer, the steps share them with the HTTP process and the client, and only a wide bound is held


def offline(folder: Path) -> float:
    """Seconds of a step, the best round."""
    spent = [0.0, 0]
    with LLM(
        mock_folder(folder), attention="mock", load_format="dummy", plugins=[mock_model], device="cpu",
        kv_cache_memory=67108864, max_num_batched_tokens=2048, max_num_seqs=256,
    ) as llm:  # fmt: skip
        advance = llm.engine.advance

        def timed() -> None:
            began = time.perf_counter()
            advance()
            spent[0] += time.perf_counter() - began
            spent[1] += 1

        llm.engine.advance = timed  # type: ignore[method-assign]
        found = []
        for _ in range(ROUNDS):
            spent[:] = [0.0, 0]
            params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
            llm.generate([f"{n} once upon a time" for n in range(STREAMS)], params, use_tqdm=False)
            found.append(spent[0] / spent[1])
    return min(found)


def served(server: Running) -> float:
    """The same, of the server's own metric."""

    def seen() -> tuple[float, float]:
        text = server.ask("/metrics")[2].decode()
        return metric(text, "nanoengine_step_seconds_sum"), metric(text, "nanoengine_step_seconds_count")

    async def together() -> list[Any]:
        body = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
        return await asyncio.gather(
            *(
                stream(server.port, "/v1/completions", {"prompt": f"{n} once upon a time", **body})
                for n in range(STREAMS)
            )
        )

    found = []
    for _ in range(ROUNDS):
        before = seen()
        assert all(one.status == 200 and one.done for one in run(together()))
        after = seen()
        found.append((after[0] - before[0]) / (after[1] - before[1]))
    return min(found)


@pytest.mark.load
@pytest.mark.alone
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("server", [1], indirect=True)
def test_a28_a_step_with_1000_streams_takes_as_long_as_offline(server: Running, tmp_path: Path) -> None:
    plain, loaded = offline(tmp_path / "offline"), served(server)
    print(f"a step: offline {plain * 1e3:.2f} ms, served {loaded * 1e3:.2f} ms, {loaded / plain:.2f} times", flush=True)
    assert loaded <= (MOST if (os.cpu_count() or 1) >= CORES else 4.0) * plain
