"""Structured outputs and long log-probs as clients of HTTP meet them, over a real engine: what hurts, hurts alone."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from nanoengine import LLM
from nanoengine.api import Constraint, Grammar, GrammarSpec, hookimpl
from nanoengine.observe.steps import StepRecord
from nanoengine.server.app import create_app
from nanoengine.server.config import ServerConfig
from nanoengine.service.local import LocalClient
from nanoengine.service.parts import service_of
from tests.grammars.support import VOCAB, grammar_llm
from tests.grammars.test_engine import Careless
from tests.grammars.test_robust import HEAVY, TEXTS, spoiled
from tests.server.asgi import gated
from tests.server.support import error_of
from tests.service.support import until

PATH = "/v1/completions"
HELD = threading.Event()
CONST = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"const": {"a": [1, "two"]}}, "strict": True}}


class Hard(Careless):
    """Careless, and the constraint "held" is compiled for as long as the test wants."""

    def compile(self, constraint: Constraint) -> Grammar:
        if "held" in constraint.text:
            assert HELD.wait(60)
        return super().compile(constraint)


class Plugin:
    @hookimpl
    def register_grammars(self) -> list[GrammarSpec]:
        return [GrammarSpec(name="hard", target=f"{__name__}:Hard", api=1, preference=500)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("constraints")
    with grammar_llm(folder, plugins=[Plugin()], positions=4096, max_num_batched_tokens=64) as made:
        yield made


@asynccontextmanager
async def served(llm: LLM) -> AsyncIterator[httpx.AsyncClient]:
    service = service_of(llm)
    service.start()
    client = LocalClient(service)
    app = gated(create_app(client, ServerConfig(), llm._built.tokenizer), client)
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
            yield http
            await until(lambda: not service.stats().requests)
            stats = service.stats()
            assert stats.free_blocks == stats.num_blocks
            assert (await http.get("/health")).status_code == 200
    finally:
        await client.close()
        await asyncio.to_thread(service.stop)


def run(llm: LLM, use: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with served(llm) as http:
            await asyncio.wait_for(use(http), 200)

    asyncio.run(main())


def post(http: httpx.AsyncClient, **body: Any) -> Awaitable[httpx.Response]:
    return http.post(PATH, json={"prompt": [1, 2], "max_tokens": 60, "temperature": 0, **body}, timeout=200)


async def text_of(response: Awaitable[httpx.Response]) -> str:
    """What a whole answer or a stream brought, without what differs between two equal requests."""
    found = await response
    assert found.status_code == 200, found.text
    if not found.headers["content-type"].startswith("text/event-stream"):
        return str(found.json()["choices"])
    lines = [line for line in found.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert not any("error" in chunk for chunk in chunks)
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) + str(reasons[-1])


async def others(http: httpx.AsyncClient) -> list[str]:
    """Streams of several kinds."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.3, "seed": 5, "presence_penalty": 0.5},
        {"temperature": 1.0, "seed": 6, "structured_outputs": {"regex": "[a-f]{30}"}},
        {"temperature": 0, "response_format": CONST},
    ]
    asked = [post(http, prompt=[i, i + 1], stream=bool(i % 4), **kinds[i % 4]) for i in range(8)]
    return await asyncio.gather(*map(text_of, asked))


@pytest.mark.parametrize("name", HEAVY)
def test_a23_a_heavy_constraint_compiles_or_is_400_and_other_streams_go_on(llm: LLM, name: str) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        alone = await others(http)
        stream = len(name) % 2 == 0
        heavy = asyncio.create_task(post(http, structured_outputs=HEAVY[name], temperature=1, seed=0, stream=stream))
        assert await others(http) == alone
        response = await heavy
        if response.status_code != 200:
            assert error_of(response)["code"] in ("invalid_grammar", "prepare_timeout")

    run(llm, use)
    assert llm.stats().grammars.compiled_in_steps == 0


@pytest.mark.parametrize("leaves", [False, True])
def test_a23_a_constraint_that_compiles_for_ever_is_400_at_the_limit(
    llm: LLM, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread is still busy when its client has the answer, or has left; the other streams do not wait for it."""
    monkeypatch.setattr(llm._built.preparations, "_seconds", 0.3)
    HELD.clear()

    async def use(http: httpx.AsyncClient) -> None:
        alone = await others(http)
        held = asyncio.create_task(post(http, structured_outputs={"regex": f"held{int(leaves)}"}))
        assert await others(http) == alone
        if leaves:
            held.cancel()
            return
        error = error_of(await held)
        assert error["code"] == "prepare_timeout"
        assert "0.3 s (engine.structured_outputs.timeout)" in error["message"]
        assert not HELD.is_set()
        assert await others(http) == alone

    try:
        run(llm, use)
    finally:
        HELD.set()


def fuzzed(count: int) -> list[dict[str, Any]]:
    """Constraints of all kinds with a few places changed, in every form in which a client may give them."""
    rng, kinds, found = random.Random(24), [*TEXTS], list[dict[str, Any]]()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        text = spoiled(rng.choice(TEXTS[kind]), rng)
        while kind in ("json", "structural_tag") and number % 5 and not is_object(text):
            text = spoiled(rng.choice(TEXTS[kind]), rng)  # so that most of them reach the engine
        name = {"json": "guided_json", "regex": "guided_regex", "grammar": "guided_grammar"}.get(kind)
        if name is not None and number % 3 == 0:
            found.append({name: text})
        else:
            found.append({"structured_outputs": {kind: text}})
    return found


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


async def survives(http: httpx.AsyncClient, constraints: list[dict[str, Any]]) -> Mapping[int, int]:
    """How many had which status. After each of them, a good grammar gives what it gave before."""
    statuses: dict[int, int] = {}
    fine = {"structured_outputs": {"json": {"const": {"a": [1, "two"]}}, "disable_any_whitespace": True}}
    good = await text_of(post(http, **fine))
    for number, constraint in enumerate(constraints):
        body = {"max_tokens": 12, "temperature": 1.0, "seed": number, **constraint}
        bad, again = await asyncio.gather(post(http, **body), text_of(post(http, **fine)))
        statuses[bad.status_code] = statuses.get(bad.status_code, 0) + 1
        assert again == good
        if bad.status_code != 200:
            assert error_of(bad)["message"], constraint
    return statuses


@pytest.mark.parametrize("count", [60, pytest.param(250, marks=pytest.mark.slow)])
def test_a24_the_engine_lives_through_bad_grammars_one_after_the_other(llm: LLM, count: int) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        statuses = await survives(http, fuzzed(count))
        assert statuses.keys() <= {200, 400}
        assert min(statuses[200], statuses[400]) >= count / 10  # both happen often

    run(llm, use)


@pytest.mark.parametrize("stream", [False, True])
def test_a25_a_matcher_that_refuses_its_token_ends_that_request_alone(llm: LLM, stream: bool) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        alone = await others(http)
        wrong = {"structured_outputs": {"choice": ["a!"]}, "stream": stream}
        beside = asyncio.create_task(others(http))
        await asyncio.sleep(0)
        refused = asyncio.create_task(post(http, **wrong))
        assert await beside == alone
        error = error_of(await refused, 500)
        assert error["code"] == "grammar_failed"
        assert error_of(await post(http, **wrong), 500)["code"] == "grammar_failed"
        assert await others(http) == alone

    run(llm, use)


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"regex": "(.|\n)*"}},
        {"structured_outputs": {"regex": "(.|\n)*"}, "logit_bias": {str(VOCAB - 1): 100.0, str(VOCAB - 2): 100.0}},
        {"structured_outputs": {"regex": "(.|\n)*"}, "ignore_eos": True, "min_tokens": 30},
        {"structured_outputs": {"json_object": True}, "top_p": 0.99},
        {"structured_outputs": {"choice": ["a"]}, "ignore_eos": True},
    ],
    ids=str,
)
def test_a26_ids_behind_the_tokenizers_are_never_drawn(llm: LLM, fields: dict[str, Any]) -> None:
    known = llm._built.tokenizer.num_ids  # type: ignore[union-attr]
    assert known < VOCAB

    async def drawn(http: httpx.AsyncClient, **more: Any) -> list[int]:
        found = await post(http, n=8, temperature=100, seed=5, return_token_ids=True, **more)
        assert found.status_code == 200, found.text
        return [token for choice in found.json()["choices"] for token in choice["token_ids"]]

    async def use(http: httpx.AsyncClient) -> None:
        assert max(await drawn(http)) >= known  # without a grammar the model gives them
        assert max(await drawn(http, **fields)) < known

    run(llm, use)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"logit_bias": {"320": 1}}, "320"),
        ({"logit_bias": {"3": 1, "4294967299": 1}}, "4294967299"),
        ({"logit_bias": {"-1": 1}}, "-1"),
        ({"stop_token_ids": [5, 320]}, "320"),
        ({"stop_token_ids": [-1]}, "-1"),
        ({"allowed_token_ids": [320]}, "320"),
        ({"allowed_token_ids": [1, -7]}, "-7"),
        ({"prompt": [1, 320]}, "320"),
        ({"prompt": [[1], [-7]]}, "-7"),
        ({"structured_outputs": {"regex": "a", "reasoning": 4000}}, "4000"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_a12_a13_an_id_outside_the_vocabulary_is_400_with_its_name_in_every_field(
    llm: LLM, fields: dict[str, Any], wrong: str, stream: bool
) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        good = asyncio.create_task(text_of(post(http, prompt=[3, 4])))
        error = error_of(await post(http, stream=stream, **fields))
        assert wrong in error["message"]
        assert await good == await text_of(post(http, prompt=[3, 4]))

    run(llm, use)


@pytest.mark.parametrize("stream", [False, True])
def test_a16_long_prompts_with_all_their_log_probs_harm_no_other_request(llm: LLM, stream: bool) -> None:
    long = [[(7 * i + j) % 250 for j in range(1000)] for i in range(3)]

    async def use(http: httpx.AsyncClient) -> None:
        alone = await others(http)
        asked = {"echo": True, "logprobs": 20, "max_tokens": 1, "prompt_logprobs": 20, "stream": stream}
        heavy = [asyncio.create_task(post(http, prompt=prompt, **asked)) for prompt in long]
        assert await others(http) == alone
        for prompt, task in zip(long, heavy, strict=True):
            response = await task
            assert response.status_code == 200, response.text
            if stream:
                lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")[:-2]]
                found = [choice["logprobs"] for line in lines for choice in json.loads(line)["choices"]]
                count = sum(len(each["tokens"]) for each in found if each)
            else:
                count = len(response.json()["choices"][0]["logprobs"]["tokens"])
            assert count == len(prompt) + 1

    run(llm, use)


def test_a_stop_string_is_a_stop_in_the_engines_records_too(llm: LLM) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        free = (await post(http, ignore_eos=True)).json()["choices"][0]["text"]
        for stream in (False, True):
            response = await post(http, ignore_eos=True, stop=free[20:24], stream=stream)
            assert '"finish_reason":"stop"' in response.text
        assert (await post(http, max_tokens=3, ignore_eos=True)).status_code == 200

    records: list[StepRecord] = []
    with llm.observe(records.append):
        run(llm, use)
    assert [ending.reason for record in records for ending in record.ended][:3] == ["length", "stop", "stop"]
