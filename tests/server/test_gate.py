"""What every request passes: keys on all routes, CORS, the size of bodies, ids of requests."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import BaseRoute

from nanoengine.api.errors import ConfigError
from nanoengine.server.auth import VARIABLE, Keys, configured_keys
from nanoengine.server.config import ServerConfig
from nanoengine.server.gate import PAGES, WITHOUT_KEY
from server.support import Server, error_of, events

KEY, OTHER = "sk-alice-123456", "sk-bob-1234567"
HASH = hashlib.sha256(KEY.encode()).hexdigest()


def keys() -> Keys:
    return configured_keys(ServerConfig(), {VARIABLE: f"alice:{KEY},{OTHER}"})


def routes(server: Server) -> Iterator[tuple[str, str]]:
    """(method, path) of everything that the application answers, documentation pages too."""
    todo: list[BaseRoute] = [*server.routes.routes]
    while todo:
        route: Any = todo.pop()
        inner = getattr(getattr(route, "original_router", route), "routes", None)  # of an included router
        if inner:
            todo += inner
        path = getattr(route, "path", None)
        if path is not None:
            assert isinstance(route.methods, set), route
            for method in route.methods:
                yield method, path.replace("{name:path}", "fake")


def test_a8_every_route_but_live_and_ready_needs_a_key() -> None:
    server = Server(keys=keys())
    found = sorted(set(routes(server)))
    assert {("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("GET", "/docs"), ("POST", "/admin/drain"),
            ("POST", "/tokenize"), ("GET", "/health"), ("GET", "/openapi.json")} <= {*found}  # fmt: skip
    assert {"/live", "/ready"} == WITHOUT_KEY
    unknown = [("GET", "/"), ("POST", "/v2/embed"), ("POST", "/invocations"), ("GET", "/live/"), ("GET", "//live")]
    for method, path in [*found, *unknown, ("DELETE", "/health"), ("OPTIONS", "/v1/models")]:
        for headers in ({}, {"authorization": "Bearer wrong-key"}, {"authorization": KEY}, {"x-api-key": HASH}):
            response = server.request(method, path, headers=headers)
            if path in WITHOUT_KEY:
                assert response.status_code in (200, 405)
            else:
                assert response.status_code == 401, (method, path)
                kind = response.headers["www-authenticate"].split()[0]
                assert kind == ("Basic" if path in PAGES and method in ("GET", "HEAD") else "Bearer")
                assert len(response.content) <= 4096
    assert server.engine.added == []


@pytest.mark.parametrize(
    "headers", [{"authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer  {KEY} "}, {"x-api-key": KEY}]
)
def test_a_key_opens_every_route(headers: dict[str, str]) -> None:
    server = Server(keys=keys())
    assert server.request("GET", "/v1/models", headers=headers).status_code == 200
    body = {"messages": [{"role": "user", "content": "a"}]}
    assert server.post("/v1/chat/completions", body, headers=headers).status_code == 200
    assert server.last.client == "alice"
    assert server.engine.usages[-1].client == "alice"


def test_a_browser_opens_the_pages_with_a_key_as_the_password_and_nothing_else() -> None:
    """It sends a password again by itself, also where a page of another origin makes it post a form."""
    server = Server(keys=keys())
    headers = {"authorization": "Basic " + base64.b64encode(f"any:{KEY}".encode()).decode()}
    for path in sorted(PAGES):
        assert server.request("GET", path, headers=headers).status_code == 200
        for wrong in ("Basic", "Basic !", "Basic " + base64.b64encode(KEY.encode()).decode()):
            assert server.request("GET", path, headers={"authorization": wrong}).status_code == 401
    for method, path in sorted(set(routes(server))):
        if path not in PAGES | WITHOUT_KEY or method not in ("GET", "HEAD"):
            assert server.request(method, path, headers=headers).status_code == 401, (method, path)
    page = server.request("GET", "/openapi.json", headers=headers).json()
    assert page["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}


def test_without_keys_everyone_may_ask_and_the_user_is_the_client() -> None:
    server = Server()
    server.chat(user="u1")
    assert server.last.client == "u1"


def test_a40_the_salt_is_the_keys_secret_and_the_clients_salt() -> None:
    server, salts = Server(keys=keys()), {}
    for name, key in (("alice", KEY), ("bob", OTHER)):
        for salt in (None, "x", "y"):
            body = {"prompt": "hi", "cache_salt": salt}
            assert server.post("/v1/completions", body, headers={"x-api-key": key}).status_code == 200
            salts[name, salt] = server.last.params.cache_salt
    assert len({*salts.values()}) == 6
    assert None not in salts.values()
    assert not any(key in str(salts) for key in (KEY, OTHER, HASH))
    again = server.post("/v1/completions", {"prompt": "hi", "cache_salt": "x"}, headers={"x-api-key": KEY})
    assert again.status_code == 200
    assert server.last.params.cache_salt == salts["alice", "x"]
    guessed = salts["alice", None]
    server.post("/v1/completions", {"prompt": "hi", "cache_salt": guessed}, headers={"x-api-key": OTHER})
    assert server.last.params.cache_salt != guessed
    plain = Server()
    plain.complete(cache_salt="x")
    assert plain.last.params.cache_salt == "x"


def test_keys_come_from_configuration_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\ncarol:{OTHER}\nsha256:{HASH}\n")
    found = configured_keys(ServerConfig(api_keys=(f"dave:sha256:{HASH.upper()}",), api_keys_file=str(file)), {})
    assert len(found) == 2
    assert found.caller({b"x-api-key": OTHER.encode()}).name == "carol"
    assert found.caller({b"x-api-key": KEY.encode()}).name == HASH[:8]
    assert len(configured_keys(ServerConfig(), {})) == 0


@pytest.mark.parametrize(
    ("config", "environment", "words"),
    [
        ({"api_keys": (KEY,)}, {}, "server.api_keys: entry 1"),
        ({"api_keys": ("a:sha256:12",)}, {}, "entry 1"),
        ({"api_keys_file": "/nowhere/keys"}, {}, "cannot be read"),
        ({}, {VARIABLE: ""}, VARIABLE),
        ({}, {VARIABLE: "short"}, "8 to 512"),
        ({}, {VARIABLE: f"{KEY},"}, "entry 2"),
    ],
)
def test_keys_that_are_none_are_refused_without_being_shown(config: Any, environment: Any, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        configured_keys(ServerConfig(**config), environment)
    assert words in str(raised.value)
    assert KEY not in str(raised.value)


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="everyone"):
        configured_keys(ServerConfig(api_keys_file=str(tmp_path / "keys")), {})


PAGE = "https://chat.example"


def test_a41_cors_is_off_unless_the_origin_is_listed() -> None:
    off, on = Server(), Server(config={"cors_origins": (PAGE,)}, keys=keys())
    asked = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for server, origin in ((off, PAGE), (on, "https://evil.example"), (on, f"{PAGE}.evil"), (on, "null")):
        response = server.request("OPTIONS", "/v1/chat/completions", headers={**asked, "origin": origin})
        assert response.status_code in (401, 405)
        assert not [name for name in response.headers if name.startswith("access-control")]
    response = on.request("OPTIONS", "/v1/chat/completions", headers=asked)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (204, PAGE)
    assert response.headers["access-control-allow-headers"] == "authorization"
    assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"origin": PAGE}, False),
        ({"origin": "null"}, False),
        ({"origin": PAGE, "sec-fetch-site": "cross-site"}, False),
        ({"origin": "http://server:1", "sec-fetch-site": "same-site"}, False),
        ({"origin": "http://server"}, True),  # the page of /docs, without TLS
        ({"origin": PAGE, "sec-fetch-site": "same-origin"}, True),  # the same behind a proxy that changes Host
        ({"origin": "https://listed.example", "sec-fetch-site": "cross-site"}, True),
    ],
)
def test_a_page_of_another_origin_cannot_post_even_without_a_preflight(headers: dict[str, str], allowed: bool) -> None:
    """Any web site may make a browser post text to 127.0.0.1: it could have ended the server by a drain."""
    server = Server(config={"cors_origins": ("https://listed.example",)})
    given = {**headers, "content-type": "text/plain"}
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/admin/drain", {"seconds": 1})):
        response = server.post(path, body, headers=given)
        if allowed:
            assert response.status_code == 200, response.text
        else:
            assert error_of(response, 403)["code"] == "origin_not_allowed"
    assert server.request("GET", "/v1/models", headers=headers).status_code == 200
    assert Server(config={"cors_origins": ("*",)}).post("/v1/completions", {"prompt": "a"}, headers=given).is_success


def test_a41_errors_and_streams_have_the_headers_too() -> None:
    server = Server(config={"cors_origins": (PAGE,)}, keys=keys())
    headers = {"origin": PAGE, "x-api-key": KEY}
    body = {"messages": [{"role": "user", "content": "a"}]}
    for response in (
        server.post("/v1/chat/completions", {**body, "stream": True}, headers=headers),
        server.post("/v1/chat/completions", body, headers=headers),
        server.post("/v1/chat/completions", {}, headers=headers),
        server.request("GET", "/v1/models", headers={"origin": PAGE}),
        server.request("GET", "/nothing", headers=headers),
        server.request("POST", "/tokenize", content=b"x" * (9 << 20), headers=headers),
    ):
        assert response.headers["access-control-allow-origin"] == PAGE
        assert response.headers["vary"] == "Origin"
    everyone = Server(config={"cors_origins": ("*",)})
    response = everyone.request("GET", "/live", headers={"origin": "https://any.example"})
    assert response.headers["access-control-allow-origin"] == "*"


def test_a42_streams_are_not_kept_or_collected_by_proxies() -> None:
    response = Server().chat(stream=True)
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache, no-transform"


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/admin/abort", "/nothing", "/live"])
def test_a15_a_body_that_is_too_large_is_refused_by_its_length_before_it_is_read(path: str) -> None:
    server, taken = Server(config={"max_body_bytes": 2048}), []

    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            taken.append(1)
            yield b"x" * 1024

    headers = {"content-length": str(100 * 1024)}
    error = error_of(server.request("POST", path, content=body(), headers=headers), 413)
    assert "2048 bytes" in error["message"]
    assert taken == []


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/admin/drain"]
)
def test_a15_a_body_of_unknown_length_is_refused_while_it_is_read(path: str) -> None:
    server, taken = Server(config={"max_body_bytes": 2048}), []

    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            taken.append(1)
            yield b"x" * 1024

    response = server.request("POST", path, content=body(), headers={"transfer-encoding": "chunked"})
    error_of(response, 413)
    assert response.headers["connection"] == "close"
    assert len(taken) == 3


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "9" * 5000])
def test_a15_a_length_that_is_none_is_refused(length: str) -> None:
    async def main(client: Any) -> Any:
        return await client.post("/tokenize", content=b"{}", headers={"content-length": length})

    assert Server().run(main).status_code == 413


def test_ids_of_requests_are_echoed_on_every_answer() -> None:
    server = Server()
    for headers, body, found in (
        ({"x-request-id": "abc-1"}, {}, "abc-1"),
        ({}, {"request_id": "abc-2"}, "abc-2"),
        ({"x-request-id": "abc-3"}, {"request_id": "other"}, "abc-3"),
    ):
        for stream in (False, True):
            response = server.post("/v1/completions", {"prompt": "a", "stream": stream, **body}, headers=headers)
            assert response.headers["x-request-id"] == found
            first = events(response)[0] if stream else response.json()
            assert first["id"] == f"cmpl-{found}"
            assert server.last.request_id.startswith(f"{found} ")
        assert error_of(server.post("/v1/completions", {"promt": 1, **body}, headers=headers))
    assert server.request("GET", "/nothing", headers={"x-request-id": "z"}).headers["x-request-id"] == "z"
    made = {server.request("GET", "/live").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    error_of(server.request("GET", "/live", headers={"x-request-id": "a b"}))
    error_of(server.request("GET", "/live", headers={"x-request-id": "a" * 201}))


def test_the_same_id_may_run_twice_at_once() -> None:
    server = Server()

    async def use(client: Any) -> Any:
        body = {"prompt": ["a", "b"], "stream": True}
        headers = {"x-request-id": "same"}
        return await asyncio.gather(*(client.post("/v1/completions", json=body, headers=headers) for _ in range(3)))

    assert [len(events(response)) > 5 for response in server.run(use)] == [True] * 3


def test_the_openapi_page_has_every_field_of_the_engine() -> None:
    server = Server()
    page = server.request("GET", "/openapi.json").json()
    schema = page["components"]["schemas"]["ChatRequest"]
    assert {"messages", "tools", "temperature", "acme_strength", "structured_outputs"} <= {*schema["properties"]}
    assert schema["additionalProperties"] is False
    text = str(page)
    assert all(name in page["components"]["schemas"] for name in re.findall(r"schemas/(\w+)", text))


def test_endpoints_of_text_are_reached_before_the_frameworks_own_and_the_page_has_each_once() -> None:
    server = Server()
    paths = [getattr(route, "path", None) for route in server.routes.routes]
    direct = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"]
    assert {*direct} <= {path for path in paths if paths.index(path) < paths.index(None)}
    page = server.request("GET", "/openapi.json").json()
    assert all([*page["paths"][path]] == ["post"] for path in direct)
