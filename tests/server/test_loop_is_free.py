"""What takes long runs beside the event loop: it answers others meanwhile."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from nanoengine.api.errors import RequestError
from nanoengine.server import render_completions
from nanoengine.server.prompts import _INLINE
from nanoengine.testing.fake_engine import Answer
from server.asgi import Connection
from server.support import Server, error_of, events, make_tokenizer

LONG = "word " * 500


class Slow:
    """A tokenizer whose slow calls wait until the test lets them go on."""

    def __init__(self) -> None:
        self.go, self.threads = threading.Event(), list[threading.Thread]()
        self._own = make_tokenizer()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._own, name)
        if name not in ("encode", "decode", "chat"):
            return found

        def slow(*args: Any, **options: Any) -> Any:
            self.threads.append(threading.current_thread())
            assert self.go.wait(30)
            return found(*args, **options)

        return slow


REQUESTS: dict[str, Any] = {
    "/v1/completions": {"prompt": LONG, "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": LONG}], "max_tokens": 1},
    "/tokenize": {"prompt": LONG},
    "/detokenize": {"tokens": [97] * 10},
}


@pytest.mark.parametrize("path", REQUESTS)
def test_a27_eight_long_prompts_do_not_keep_others_waiting(path: str) -> None:
    slow = Slow()
    server = Server(lambda request: Answer(samples=[[97]]), tokenizer=slow)  # type: ignore[arg-type]

    async def use() -> None:
        several = [Connection(server, path, REQUESTS[path]) for _ in range(8)]
        while len(slow.threads) < 4:  # server.threads
            await asyncio.sleep(0.001)
        async with server.client() as client:
            assert (await client.get("/live")).status_code == 200
            plain = await client.post("/v1/completions", json={"prompt": [97], "stream": True})
            assert len(events(plain)) == 1
        assert [each.status for each in several] == [None] * 8
        slow.go.set()
        await asyncio.gather(*(each.task for each in several))
        assert [each.status for each in several] == [200] * 8
        assert threading.main_thread() not in slow.threads

    asyncio.run(asyncio.wait_for(use(), 100))


def test_a_short_text_is_tokenized_at_once() -> None:
    slow = Slow()
    slow.go.set()
    assert Server("x", tokenizer=slow).complete("a" * _INLINE).status_code == 200  # type: ignore[arg-type]
    assert threading.main_thread() in slow.threads


@pytest.mark.parametrize("limit", [100, 1000])
def test_a15_a_text_that_is_too_long_is_refused_before_all_of_it_is_tokenized(limit: int) -> None:
    tokenizer = make_tokenizer(limit)
    tokenized: list[int] = []
    ids = tokenizer._ids
    tokenizer._ids = lambda text, *more: tokenized.append(len(text)) or ids(text, *more)  # type: ignore[assignment, func-returns-value, method-assign]
    text = "abcdefg hijkl " * (10 * limit)
    with pytest.raises(RequestError, match="max_model_len") as raised:
        tokenizer.encode(text)
    assert raised.value.code == "too_long"
    assert sum(tokenized) <= 8 * limit
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        tokenized.clear()
        error = error_of(Server(tokenizer=tokenizer).post(path, body))
        assert error["code"] == "context_length_exceeded"
        assert sum(tokenized) <= 8 * limit


def test_a_text_of_long_tokens_is_not_refused_for_its_length() -> None:
    tokenizer = make_tokenizer(3000)
    text = "false" * 2900  # a token each
    assert len(text) < 8 * 3000
    assert len(tokenizer.encode(text)) == 2900
    with_limit = make_tokenizer(500)
    assert len(make_tokenizer().encode("false" * 450)) == 450
    assert len(with_limit.encode("false" * 450)) == 450


@pytest.mark.parametrize("text", ["", "a", LONG, "Grüße 😀 <end> " * 400])
def test_long_texts_have_the_tokens_of_short_ones(text: str) -> None:
    tokenizer = make_tokenizer(None)
    assert tokenizer.encode(text) == tokenizer._backend.encode(text).ids
    assert (
        tokenizer.encode(text, add_special_tokens=False)
        == tokenizer._backend.encode(text, add_special_tokens=False).ids
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a16_long_log_probs_are_written_beside_the_loop(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, plain = [], render_completions.CompletionLogprobs.of

    def noted(*args: Any, **more: Any) -> Any:
        threads.append(threading.current_thread())
        return plain(*args, **more)

    monkeypatch.setattr(render_completions.CompletionLogprobs, "of", noted)
    response = Server("x").complete([97] * 2000, echo=True, logprobs=1, max_tokens=0, stream=stream)
    found = events(response)[0] if stream else response.json()
    assert len(found["choices"][0]["logprobs"]["tokens"]) == 2000
    assert threading.main_thread() not in threads
