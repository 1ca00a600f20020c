"""The application over a real engine, of the mock model: its tokens, ids that are checked, blocks that come back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from nanoengine import LLM, SamplingParams
from nanoengine.server.app import create_app
from nanoengine.server.config import ServerConfig
from nanoengine.service.local import LocalClient
from nanoengine.service.parts import service_of
from nanoengine.testing import mock_model
from tests.server.asgi import Connection, gated
from tests.server.support import choices, error_of, events

VOCABULARY = 97


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = mock_model.write_mock_checkpoint(
        tmp_path_factory.mktemp("app"), vocab_size=VOCABULARY, max_position_embeddings=4096
    )
    with LLM(
        path, attention="mock", plugins=[mock_model], load_format="dummy", max_num_seqs=8, device="cpu",
        num_gpu_blocks_override=512, skip_tokenizer_init=True,
    ) as made:  # fmt: skip
        yield made


def served(llm: LLM, use: Any) -> None:
    """Calls `use(http client, application, engine client)`."""

    async def main() -> None:
        service = service_of(llm)
        service.start()
        client = LocalClient(service)
        app = gated(create_app(client, ServerConfig(), None), client)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
            await asyncio.wait_for(use(http, app, client), 60)
        await client.close()
        await asyncio.to_thread(service.stop)

    asyncio.run(main())


FIELDS: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "temperature": 0.8, "seed": 5, "return_token_ids": True}


def test_tokens_are_those_of_the_engine_in_this_process(llm: LLM) -> None:
    prompts = [[1, 2, 3], [4, 5], [9] * 40]
    params = SamplingParams(n=2, **{name: value for name, value in FIELDS.items() if name != "return_token_ids"})
    expected = [list(sample.token_ids) for output in llm.generate(prompts, params) for sample in output.outputs]

    async def use(http: httpx.AsyncClient, *_: Any) -> None:
        body = {"prompt": prompts, "n": 2, **FIELDS}
        whole = (await http.post("/v1/completions", json=body)).json()
        assert [choice["token_ids"] for choice in whole["choices"]] == expected
        streamed = events(await http.post("/v1/completions", json={**body, "stream": True}))
        for index, ids in enumerate(expected):
            assert [token for choice in choices(streamed, index) for token in choice.get("token_ids", ())] == ids

    served(llm, use)


@pytest.mark.parametrize("stream", [False, True])
def test_a12_a13_every_field_with_ids_is_checked_against_the_vocabulary(llm: LLM, stream: bool) -> None:
    async def use(http: httpx.AsyncClient, *_: Any) -> None:
        for bad in (VOCABULARY, 10**6, 2**31, 2**40, -1):
            for fields in (
                {"prompt": [1, bad]},
                {"prompt": [[1], [bad]]},
                {"stop_token_ids": [1, bad]},
                {"logit_bias": {"1": 1, str(bad): 1}},
                {"allowed_token_ids": [1, bad]},
            ):
                response = await http.post("/v1/completions", json={"prompt": [1], "stream": stream, **fields})
                assert str(bad) in error_of(response)["message"]
        fine = {"prompt": [1], "logit_bias": {"96": -100}, "stop_token_ids": [96], "allowed_token_ids": [1, 96]}
        assert (await http.post("/v1/completions", json=fine)).status_code == 200

    served(llm, use)


@pytest.mark.parametrize("stream", [False, True])
def test_a1_a_client_that_leaves_gives_its_blocks_back(llm: LLM, stream: bool) -> None:
    async def use(http: httpx.AsyncClient, app: Any, client: LocalClient) -> None:
        free = (await client.stats()).free_blocks
        body = {"prompt": [[1] * 50, [2] * 50], "max_tokens": 4000, "ignore_eos": True, "stream": stream, "n": 2}
        connection = Connection(SimpleNamespace(app=app), "/v1/completions", body)  # type: ignore[arg-type]
        while (await client.stats()).running < 4:
            await asyncio.sleep(0.001)
        connection.leave()
        await connection.task
        while (stats := await client.stats()).running or stats.requests:
            await asyncio.sleep(0.001)
        assert stats.free_blocks == free
        again = await http.post("/v1/completions", json={"prompt": [1], "max_tokens": 2, "ignore_eos": True})
        assert again.json()["usage"]["completion_tokens"] == 2

    served(llm, use)


def test_limits_of_the_engine_are_answered_by_name(llm: LLM) -> None:
    async def use(http: httpx.AsyncClient, *_: Any) -> None:
        async def refused(**fields: Any) -> dict[str, Any]:
            return error_of(await http.post("/v1/completions", json={"prompt": [1], **fields}))

        assert (await refused(prompt=[1] * 4096))["code"] == "context_length_exceeded"
        for fields in (
            {"top_p": 2},
            {"top_k": "many"},
            {"temperature": -1},
            {"min_p": 9},
            {"seed": 2**70},
            {"stop": "x"},
        ):
            [name] = fields
            assert name in (await refused(**fields))["message"] or name == "stop"
        for name in ("logits_processors", "batch_logits_processor"):
            assert "function" in (await refused(**{name: ["os.system"]}))["message"]

    served(llm, use)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", True), ("temperature", "1"), ("temperature", -1), ("top_k", 1.5), ("top_p", 2), ("min_p", None),
        ("min_tokens", -1), ("seed", 2**70), ("repetition_penalty", 0),
        ("logit_bias", {"1": "a"}), ("logit_bias", {"100000": 1}),
        ("allowed_token_ids", [True]), ("stop_token_ids", [1, 2**40]),
    ],
)  # fmt: skip
def test_a_value_that_the_engine_refuses_is_named_in_param(llm: LLM, field: str, value: Any) -> None:
    async def use(http: httpx.AsyncClient, *_: Any) -> None:
        response = await http.post("/v1/completions", json={"prompt": [1], "max_tokens": 1, field: value})
        if value is None:  # no value
            assert response.status_code == 200
            return
        error = error_of(response)
        assert re.split(r"[.\[]", error["param"])[0] == field, error

    served(llm, use)
