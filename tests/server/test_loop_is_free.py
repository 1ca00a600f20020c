"""What takes long runs beside the event loop: it answers others meanwhile."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from nanoengine.api.errors import RequestError
from nanoengine.server import render_completions
from nanoengine.server.prompts import _INLINE
from nanoengine.testing.byte_tokenizer import END, byte_tokenizer
from nanoengine.testing.fake_engine import Answer
from nanoengine.text import Tokenizer
from nanoengine.text import tokenizer as tokenizing
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
            assert self.go.wait(60)
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


WIDE = "abcdefghijklmnopqrstuvwxyz0123456789ABCD"


def wide_tokenizer(limit: int) -> Tokenizer:
    """One of its tokens has 40 characters."""
    hf = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer((WIDE,)), eos_token=END)
    hf.chat_template = "{{ messages[0].content }}"
    return Tokenizer(hf, max_tokens=limit)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("chars", "tokenized"), [(30, 8), (50, 0)])
def test_a15_a_text_that_is_too_long_is_refused_before_all_of_it_is_tokenized(
    path: str, chars: int, tokenized: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, seen, plain = 500, list[int](), tokenizing.encoded
    monkeypatch.setattr(
        tokenizing, "encoded", lambda backend, text, *more: seen.append(len(text)) or plain(backend, text)
    )
    text = "zy" * (chars * limit // 2)
    fields = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    error = error_of(Server(tokenizer=wide_tokenizer(limit)).post(path, fields))
    assert error["code"] == "context_length_exceeded"
    assert "max_model_len" in error["message"]
    assert sum(seen) == tokenized * limit


def test_a_text_of_long_tokens_is_not_refused_for_its_characters() -> None:
    assert len(wide_tokenizer(500).encode(WIDE * 490)) == 490
    with pytest.raises(RequestError, match="max_model_len"):
        wide_tokenizer(500).encode(WIDE * 501)


@pytest.mark.parametrize("text", ["", "a", LONG, "Grüße 😀 <end> " * 400])
def test_long_texts_have_the_tokens_of_short_ones(text: str) -> None:
    tokenizer = make_tokenizer(None)
    plain = tokenizer._backend.encode
    assert tokenizer.encode(text) == plain(text).ids
    assert tokenizer.encode(text, add_special_tokens=False) == plain(text, add_special_tokens=False).ids


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
