"""The queue's bounds as a client of HTTP sees them, over a real engine: 429 with a time, 408, and counters that fit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from nanoengine import LLM
from nanoengine.server.app import create_app
from nanoengine.server.auth import VARIABLE, configured_keys
from nanoengine.server.config import ServerConfig, service_options
from nanoengine.service.local import LocalClient
from nanoengine.service.loop import EngineService
from nanoengine.service.options import LimitOptions, MetricOptions
from nanoengine.service.parts import parts_of, service_of
from nanoengine.testing import mock_model
from tests.server.asgi import gated
from tests.server.support import error_of
from tests.service.support import until
from tests.service.test_metrics import read, total

CONFIG = ServerConfig(
    limits=LimitOptions(max_queued_requests=3, max_queued_tokens=50), metrics=MetricOptions(by_client=True)
)
KEYS = configured_keys(CONFIG, {VARIABLE: "ann:sk-ann-1234567,bob:sk-bob-1234567"})
ANN, BOB = ({"authorization": f"Bearer sk-{name}-1234567"} for name in ("ann", "bob"))
BUSY = 3000  # tokens: longer than any test here takes


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = mock_model.write_mock_checkpoint(
        tmp_path_factory.mktemp("bounds"), vocab_size=97, max_position_embeddings=4096
    )
    with LLM(
        path, attention="mock", plugins=[mock_model], load_format="dummy", max_num_seqs=1, spare_slots=0,
        device="cpu", num_gpu_blocks_override=512, skip_tokenizer_init=True,
    ) as made:  # fmt: skip
        yield made


async def complete(client: httpx.AsyncClient, headers: dict[str, str] = ANN, **body: Any) -> httpx.Response:
    body = {"prompt": [1, 2], "max_tokens": 4, "ignore_eos": True, **body}
    return await client.post("/v1/completions", json=body, headers=headers)


def served(llm: LLM, use: Any) -> None:
    async def main() -> None:
        service = service_of(llm, **parts_of(service_options(CONFIG, "mock")))
        service.start()
        client = LocalClient(service)
        app = gated(create_app(client, CONFIG, None), client, CONFIG, KEYS)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
            await asyncio.wait_for(use(http, service), 60)
        await client.close()
        await asyncio.to_thread(service.stop)

    asyncio.run(main())


async def busy(http: httpx.AsyncClient, service: EngineService) -> asyncio.Task[httpx.Response]:
    """A request that runs alone until it is cancelled."""
    task = asyncio.create_task(complete(http, max_tokens=BUSY))
    await until(lambda: service.stats().running == 1 and not service.stats().queued_requests)
    return task


async def end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_a29_a34_a_full_queue_is_429_with_a_time_and_samples_count(llm: LLM) -> None:
    async def use(http: httpx.AsyncClient, service: EngineService) -> None:
        running = await busy(http, service)
        waiting = asyncio.create_task(complete(http, n=2))
        await until(lambda: service.stats().queued_requests == 2)
        for body in ({"n": 2}, {"prompt": [1] * 47}, {"prompt": [[1, 2], [3, 4]], "max_tokens": 1}):
            response = await complete(http, BOB, **body)
            assert error_of(response, 429)["code"] == "rate_limit_exceeded"
            assert 1 <= int(response.headers["retry-after"]) <= 300
            await until(lambda: service.stats().queued_requests == 2)
        await end(running, waiting)
        await until(lambda: not service.stats().requests)
        assert (await complete(http, BOB)).status_code == 200

    served(llm, use)


@pytest.mark.parametrize("by_header", [True, False])
def test_a30_a_request_that_waits_too_long_is_408_before_it_began(llm: LLM, by_header: bool) -> None:
    async def use(http: httpx.AsyncClient, service: EngineService) -> None:
        running = await busy(http, service)
        before = service.stats().prompt_tokens
        if by_header:
            response = await complete(http, {**ANN, "x-request-timeout": "0.05"})
        else:
            response = await complete(http, timeout=0.05)
        assert error_of(response, 408)["code"] == "deadline"
        assert service.stats().prompt_tokens == before
        await end(running)

    served(llm, use)


def test_a36_the_counters_are_the_sum_of_what_users_were_answered(llm: LLM) -> None:
    async def use(http: httpx.AsyncClient, service: EngineService) -> None:
        prompts = [[i, i + 1, i + 2][: 1 + i % 3] for i in range(12)]
        sizes = [{"max_tokens": 1 + i % 5, "n": 1 + i % 2} for i in range(12)]
        answers = []
        for i, (prompt, size) in enumerate(zip(prompts, sizes, strict=True)):
            answers.append((await complete(http, (ANN, BOB)[i % 2], prompt=prompt, **size)).json()["usage"])
        found = read((await http.get("/metrics", headers=ANN)).content)
        for field, name in (("prompt_tokens", "prompt_tokens"), ("completion_tokens", "generation_tokens")):
            for i, client in enumerate(("ann", "bob")):
                theirs = sum(usage[field] for usage in answers[i::2])
                assert total(found, f"nanoengine_{name}_total", client=client) == theirs > 0
                assert total(found, f"vllm:{name}_total", client=client) == theirs
        assert total(found, "nanoengine_samples_total", finish_reason="length") == sum(size["n"] for size in sizes)
        assert total(found, "nanoengine_requests_total", endpoint="/v1/completions", status="200") == 12

    served(llm, use)
