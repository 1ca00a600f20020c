"""An application over a scripted engine or the mock model, and a client without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import httpx
from transformers import PreTrainedTokenizerFast

from nanoengine.params.sampling_fields import CORE_TYPES
from nanoengine.server.app import create_app
from nanoengine.server.auth import Keys
from nanoengine.server.config import ServerConfig
from nanoengine.server.gate import App, Gate
from nanoengine.server.parsing import Parsers
from nanoengine.server.record import Observer
from nanoengine.service.client import ClientRequest, EngineInfo
from nanoengine.testing.byte_tokenizer import END, byte_tokenizer
from nanoengine.testing.fake_engine import Answer, FakeEngine
from nanoengine.text import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}{% if mood %}[{{ mood }}]{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SAMPLING = frozenset(CORE_TYPES) | {
    "temperature", "top_p", "top_k", "min_p", "logit_bias", "allowed_token_ids", "bad_words", "structured_outputs",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "acme_strength",
}  # fmt: skip


@cache
def make_tokenizer(max_tokens: int | None = 4096, template: str | None = TEMPLATE) -> Tokenizer:
    """One token for most bytes; END is the end token."""
    hf = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token=END)
    hf.chat_template = template
    return Tokenizer(hf, max_tokens=max_tokens)


class Server:
    """One application and what is behind it.

    Attributes:
        says: what the engine answers: text for all samples, or a function of the request.
    """

    def __init__(
        self,
        says: str | Sequence[str] | Callable[[ClientRequest], Answer] = "Hello",
        *,
        tokenizer: Tokenizer | None = None,
        config: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
        parsers: Parsers | None = None,
        keys: Keys | None = None,
        **answer: Any,
    ) -> None:
        self.tokenizer = tokenizer or make_tokenizer()
        size = self.tokenizer.num_ids
        own: dict[str, Any] = {"default_sampling": {}, "sampling_names": SAMPLING, **(info or {})}
        self.info = EngineInfo(model="fake", tokenizer=None, vocab_size=size, max_model_len=4096, **own)
        self.says, self._answer = says, answer
        self.engine = FakeEngine(self._answered, self.info)
        options = ServerConfig(**(config or {}))
        self.routes = create_app(self.engine, options, self.tokenizer, parsers)
        self.app = self.gate(self.routes, options, keys)

    def gate(self, inside: App, options: ServerConfig, keys: Keys | None = None) -> Gate:
        return Gate(inside, options, keys or Keys({}), Observer(self.engine))

    def _answered(self, request: ClientRequest) -> Answer:
        if callable(self.says):
            return self.says(request)
        texts = [self.says] if isinstance(self.says, str) else self.says
        return Answer(samples=[self.ids(text) for text in texts], **self._answer)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, with the end token behind them."""
        return [*self.tokenizer.encode(text), self.tokenizer.eos_token_id or 0]

    def run(self, use: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            async with self.client() as client:
                return await use(client)

        return asyncio.run(main())

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=options.pop("raise_app_exceptions", True))
        async with httpx.AsyncClient(transport=transport, base_url="http://server", **options) as client:
            yield client

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request in an event loop of its own."""
        found: httpx.Response = self.run(lambda client: client.request(method, path, **options))
        return found

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **options)

    def chat(self, text: str = "hi", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def complete(self, prompt: Any = "hi", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    @property
    def last(self) -> ClientRequest:
        return self.engine.added[-1]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines), lines
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def choices(chunks: Sequence[Mapping[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def joined(chunks: Sequence[Mapping[str, Any]], index: int = 0, key: str = "content") -> str:
    """The text of a sample in a stream."""
    found = choices(chunks, index)
    return "".join(each["text"] if "text" in each else each["delta"].get(key) or "" for each in found)


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, (response.status_code, response.text[:500])
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) <= 4096
    found = response.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = found["error"]
    assert error["code"], error  # a word for programs
    return error
