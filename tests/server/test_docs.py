"""Commands of README.md, docs/serving.md and docs/http-api.md: they run on the mock model, requests are answered."""

from __future__ import annotations

import dataclasses
import http.client
import json
import re
import shlex
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from nanoengine.cli.app import app
from nanoengine.params.sampling_fields import CORE_TYPES
from nanoengine.server.auth import configured_keys
from nanoengine.server.config import ServerConfig, server_config
from nanoengine.server.protocol.base import RequestModel
from nanoengine.server.protocol.chat import ChatRequest
from nanoengine.server.protocol.completions import CompletionRequest
from nanoengine.server.protocol.messages import MessagesRequest
from nanoengine.server.protocol.responses import ResponsesRequest
from nanoengine.setup.config.config import load_config
from tests.server.mock_server import PLUGIN, mock_folder
from tests.server.running import Running

ROOT = Path(__file__).parents[2]
SERVING = (ROOT / "docs/serving.md").read_text("utf-8")
PAGES = {
    "README.md": (ROOT / "README.md").read_text("utf-8"),
    "docs/serving.md": SERVING,
    "docs/http-api.md": (ROOT / "docs/http-api.md").read_text("utf-8"),
}
MOCK = ("attention=mock", "engine.load_format=dummy", "engine.kv_cache_memory=8388608", "server.port=0")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


def lines(page: str, command: str) -> list[list[str]]:
    """The words of each line that begins with the command."""
    text = "".join(blocks(page, "sh")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(command)]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = mock_folder(tmp_path_factory.mktemp("docs") / "mock")
    [words] = lines("README.md", "nanoengine serve")
    command = [sys.executable, "-m", *words, f"model={model}", *MOCK, "--plugin", str(PLUGIN)]
    with Running(command) as server:
        yield server.until_ready()


@pytest.mark.parametrize("page", PAGES)
def test_the_server_of_the_page_answers_its_curl(page: str, quickstart: Running) -> None:
    served = lines(page, "nanoengine serve") or [lines(page, "NANOENGINE_API_KEYS=")[0][1:]]
    assert served == lines("README.md", "nanoengine serve")
    assert lines(page, "curl")
    for curl in lines(page, "curl"):
        url, headers, data = parsed(curl)
        assert (url.hostname, url.port) == (ServerConfig().host, ServerConfig().port)
        connection = http.client.HTTPConnection("127.0.0.1", quickstart.port, timeout=60)
        connection.request("GET" if data is None else "POST", url.path, data, headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        assert "assistant" in (answer.get("role"), *(said.get("role") for said in messages(answer)))
        connection.close()


def test_the_keys_of_the_page_are_keys() -> None:
    [[variable, *_]] = lines("docs/http-api.md", "NANOENGINE_API_KEYS=")
    name, _, given = variable.partition("=")
    keys = configured_keys(ServerConfig(), {name: given})
    sent = [each.partition(":")[2].encode() for each in given.split(",")]
    assert [keys.caller({b"x-api-key": key}).name for key in sent] == ["alice", "bob"]


def messages(answer: Any) -> list[Any]:
    """The messages in an answer of chat completions or responses."""
    return [choice["message"] for choice in answer.get("choices", ())] + answer.get("output", [])


def parsed(curl: list[str]) -> tuple[Any, dict[str, str], str | None]:
    """(URL, headers, body) of a command line of curl with -H and -d alone."""
    headers, data, rest = dict[str, str](), None, iter(curl[1:])
    url = ""
    for word in rest:
        if word == "-H":
            name, _, value = next(rest).partition(": ")
            headers[name] = value
        elif word == "-d":
            data = next(rest)
        else:
            assert word.startswith("http"), word
            url = word
    return urlsplit(url), headers, data


def test_the_configuration_of_the_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [text] = [text for text in blocks("docs/serving.md", "yaml") if text.startswith("# file: serve.yaml")]
    Path("serve.yaml").write_text(text, "utf-8")
    assert server_config(load_config("serve.yaml").sections).workers == 2
    for words in lines("docs/serving.md", "nanoengine config"):
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, result.stderr
        assert "server" in result.stdout


def keys(options: type[Any], prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(typing.cast(Any, hints[field.name]), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_the_page_has_every_key_of_the_section() -> None:
    section = SERVING.partition("\n## The section `server`\n")[2].partition("\n## ")[0]
    documented = [
        key
        for row in re.findall(r"^\| ((?:`[a-z_.]+`(?:, )?)+) \|", section, re.MULTILINE)
        for key in re.findall("`([a-z_.]+)`", row)
    ]
    assert sorted(documented) == sorted(keys(ServerConfig))


SECTIONS: dict[str, tuple[type[RequestModel], ...]] = {
    "Completions and chat completions": (CompletionRequest, ChatRequest),
    "Messages": (MessagesRequest,),
    "Responses": (ResponsesRequest,),
}


@pytest.mark.parametrize("title", SECTIONS)
def test_the_table_of_the_page_has_every_field(title: str) -> None:
    """Those of sampling are in the reference."""
    section = PAGES["docs/http-api.md"].partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    table = section.partition("\n| field | |\n")[2].partition("\n\n")[0]
    first = [row.split(" | ")[0] for row in table.splitlines()]
    documented = [name for cell in first for name in re.findall("`([a-z_.]+)`", cell)]
    assert len(documented) == len(set(documented))
    models = SECTIONS[title]
    assert not [name for name in documented if not any(_has(model, name) for model in models)]
    fields = {name for model in models for name in model.model_fields}
    assert not fields - {name.partition(".")[0] for name in documented} - set(CORE_TYPES)


def _has(model: type[RequestModel], path: str) -> bool:
    name, _, inner = path.partition(".")
    field = model.model_fields.get(name)
    if field is None or not inner:
        return field is not None
    return any(_has(part, inner) for part in typing.get_args(field.annotation) if part is not type(None))
