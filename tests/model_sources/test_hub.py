"""Hub ids, against a hub on the loopback: what is fetched, what is taken from the cache, what refusals say."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from empty_cache import empty_cache
from gguf_zoo import TinyGGUF
from hub_stub import Commit, Hub, Repo, commit_of, repo, serve
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save_file

from nanoengine.api import ModelSourceError, SourceContext
from nanoengine.plugins.model_sources.gguf_convert import convert
from nanoengine.plugins.model_sources.hub import HubSource
from nanoengine.plugins.model_sources.hub_repository import INDEX, SINGLE
from nanoengine.setup.start.pooling import read_pooling_defaults

Fetch = Callable[[str], Path]
EXTRAS: Commit = {
    "README.md": b"# tiny", "consolidated.safetensors": b"z" * 64, "pytorch_model.bin": b"p", "onnx/config.json": b"{}"
}  # fmt: skip
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def single(config: bytes = b"{}") -> Commit:
    return {"config.json": config, "tokenizer.json": b'{"version": "1.0"}', SINGLE: b"w" * 100_000, **EXTRAS}


def sharded() -> Commit:
    index = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}).encode()
    files: Commit = {"config.json": b"{}", INDEX: index, SHARDS[0]: b"1" * 1000, SHARDS[1]: b"2" * 90_000}
    return {**files, **EXTRAS}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        for name, value in {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "DOWNLOAD_CHUNK_SIZE": 10_000,  # what is lost of a cut connection is less than one; 10 MB as it comes
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield hub


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def fetch(hub: Hub, lines: list[str], tmp_path: Path) -> Fetch:
    def resolve(source: str) -> Path:
        hub.asked.clear()
        lines.clear()
        path = HubSource().resolve(source, SourceContext(tmp_path / "cache", lines.append))
        assert path is not None
        return path

    return resolve


def contents(folder: Path) -> Commit:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_extras(files: Commit) -> Commit:
    return {name: data for name, data in files.items() if name not in EXTRAS}


def said(caught: pytest.ExceptionInfo[ModelSourceError], *words: str) -> list[str]:
    """Which of `words` the message lacks."""
    return [word for word in words if word not in str(caught.value)]


# What is fetched


@pytest.mark.parametrize("files", [single(), sharded()], ids=["single", "sharded"])
def test_just_what_is_needed_and_only_once(files: Commit, hub: Hub, fetch: Fetch, lines: list[str]) -> None:
    hub.repos["org/tiny"] = repo(files)
    folder = fetch("org/tiny")
    assert contents(folder) == without_extras(files)
    assert sorted(hub.fetched()) == sorted(without_extras(files))
    assert hub.endpoint in lines[0]
    assert "org/tiny@main" in lines[0]
    assert lines[-1] == f"org/tiny at commit {commit_of(files)[:12]}, in {folder}"
    assert fetch("org/tiny") == folder
    assert hub.asked == ["GET /api/models/org/tiny/revision/main"]


def test_all_chat_templates_of_a_model_with_several_are_fetched(hub: Hub, fetch: Fetch) -> None:
    templates: Commit = {"chat_template.jinja": b"d", "additional_chat_templates/tool_use.jinja": b"t",
                         "additional_chat_templates/rag.jinja": b"r"}  # fmt: skip
    others: Commit = {"additional_chat_templates/notes.md": b"n", "elsewhere/tool_use.jinja": b"e"}
    hub.repos["acme/tiny"] = repo({**single(), **templates, **others})
    folder = fetch("acme/tiny")
    assert {name: (folder / name).read_bytes() for name in templates} == templates
    assert not any((folder / name).exists() for name in others)


def test_the_files_that_say_how_embeddings_are_made_are_fetched(hub: Hub, fetch: Fetch) -> None:
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    files: Commit = {"modules.json": json.dumps(modules).encode(), "1_Pooling/config.json": b'{"pooling_mode": "mean"}'}
    others: Commit = {"2_Dense/config.json": b"{}", "2_Dense/model.safetensors": b"d", "1_Pooling/notes.md": b"n"}
    hub.repos["acme/tiny"] = repo({**single(), **files, **others})
    folder = fetch("acme/tiny")
    found = read_pooling_defaults(folder, {}, 8)
    assert (found.pooling, found.normalize, found.unsupported) == ("mean", False, None)
    assert not any((folder / name).exists() for name in others)


def test_a_branch_that_moved_is_followed_and_a_commit_is_not_asked_about(hub: Hub, fetch: Fetch) -> None:
    old, new = single(), single(b'{"new": 1}')
    hub.repos["org/tiny"] = Repo(
        {commit_of(old): old, commit_of(new): new}, {"main": commit_of(old), "v2": commit_of(new)}
    )
    assert contents(fetch("org/tiny"))["config.json"] == b"{}"
    hub.repos["org/tiny"].refs["main"] = commit_of(new)
    assert contents(fetch("org/tiny"))["config.json"] == b'{"new": 1}'
    assert hub.fetched() == ["config.json"]  # the other files are the same, and in the cache
    assert contents(fetch(f"org/tiny@{commit_of(old)}"))["config.json"] == b"{}"
    assert hub.asked == []
    assert fetch("org/tiny@v2") == fetch(f"org/tiny@{commit_of(new)}")


def test_gguf_file_of_a_repository(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    data = TinyGGUF().write(tmp_path / "tiny.gguf").read_bytes()
    hub.repos["org/tiny-GGUF"] = repo({"README.md": b"", "q4/tiny.gguf": data, "other.gguf": b"x"})
    folder = fetch("org/tiny-GGUF/q4/tiny.gguf")
    assert (folder / SINGLE).is_file()
    assert hub.fetched() == ["q4/tiny.gguf"]
    assert fetch("org/tiny-GGUF/q4/tiny.gguf@main") == folder
    assert hub.fetched() == []
    with pytest.raises(ModelSourceError) as caught:
        fetch("org/tiny-GGUF")
    assert said(caught, "no config.json", "org/tiny-GGUF/other.gguf, org/tiny-GGUF/q4/tiny.gguf") == []
    with pytest.raises(ModelSourceError, match=r"has no file absent\.gguf"):
        fetch("org/tiny-GGUF/absent.gguf")


def test_what_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    names = ["name", "/a/b", "./a", "../a/b", "~/a", "a/b/c", "a/b.gguf", "a/", "/a", "a@b/c", "a/b@c@d", "org/tiny"]
    assert [name for name in names if HubSource().resolve(name, SourceContext(tmp_path)) is not None] == []


# Broken connections


def test_a_cut_connection_continues_where_it_was_cut(hub: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    files = single()
    hub.repos["org/tiny"] = repo(files, breaks={SINGLE: [40_000, 30_000]})
    assert contents(fetch("org/tiny")) == without_extras(files)
    assert [name for name in hub.fetched() if name.startswith(SINGLE)] == [
        SINGLE, f"{SINGLE} bytes=40000-", f"{SINGLE} bytes=70000-"
    ]  # fmt: skip


def test_a_download_that_broke_off_goes_on_at_the_next_call(
    hub: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    files = sharded()
    hub.repos["org/tiny"] = repo(files, breaks={SHARDS[1]: [20_000] + [0] * 30})
    with pytest.raises(ModelSourceError) as caught:
        fetch("org/tiny")
    assert said(caught, "the download of org/tiny was interrupted", "run it again: finished files are kept") == []
    hub.repos["org/tiny"].breaks.clear()
    assert contents(fetch("org/tiny")) == without_extras(files)
    assert [name.split()[0] for name in hub.fetched()] == [SHARDS[1]]


def test_nothing_partial_is_taken_from_the_cache(hub: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.repos["org/tiny"] = repo(sharded(), breaks={SHARDS[1]: [0] * 30})
    with pytest.raises(ModelSourceError):
        fetch("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelSourceError, match=r"is not, or not completely, in the cache .* HF_HUB_OFFLINE"):
        fetch("org/tiny")


# Without the hub


def test_offline_takes_the_cache_and_says_so(
    hub: Hub, fetch: Fetch, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/tiny"] = repo(sharded())
    folder = fetch("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("org/tiny") == fetch("org/tiny@main") == folder
    assert hub.asked == []
    assert lines[0].startswith("HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: using org/tiny")
    with pytest.raises(ModelSourceError) as caught:
        fetch("org/other")
    assert said(caught, "HF_HUB_OFFLINE", "unset it", "no folder org/other here") == []


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_no_network(hub: Hub, fetch: Fetch, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = repo(single())
    folder = fetch("org/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", closed_port())
    assert fetch("org/tiny") == folder
    assert "could not be reached (ConnectError" in lines[0]
    assert "which may be older" in lines[0]
    with pytest.raises(ModelSourceError) as caught:
        fetch("org/other")
    assert said(caught, constants.ENDPOINT, "check network and proxy", "HF_ENDPOINT", "hf download org/other") == []


# Refusals


@pytest.mark.parametrize(
    ("made", "source", "words"),
    [
        (None, "org/tiny", ["no repository of that name", "no folder org/tiny here", "check the spelling", "HF_TOKEN"]),
        (repo(single(), refusal=(401, "RepoNotFound", "")), "org/tiny", ["no repository of", "if it is private"]),
        (repo(single(), token="secret"), "org/tiny", ["is gated", "accept its terms on http", "hf auth login"]),
        (repo(single(), refusal=(403, "GatedRepo", "")), "org/tiny", ["is gated", "accept its terms on http"]),
        (repo(single(), refusal=(401, "", "")), "org/tiny", ["answered 401", "hf auth login"]),
        (repo(single(), refusal=(403, "", "no")), "org/tiny", ["answered 403", "the token may not read it"]),
        (repo(single(), refusal=(403, "", "Access to this resource is disabled.")), "org/tiny", ["disabled"]),
        (repo(single(), refusal=(503, "", "")), "org/tiny", ["answered 503"]),
        (repo(single()), "org/tiny@v9", ["no revision 'v9'", "it has main"]),
        (repo(single()), "org/tiny--x", ["cannot be a hub id"]),
        (repo({"README.md": b""}), "org/tiny", ["no config.json", "it has README.md"]),
        (repo({"config.json": b"{}", "a.bin": b""}), "org/tiny", [f"neither {SINGLE} nor {INDEX}", "pickle files"]),
        (repo({"adapter_config.json": b"{}"}), "org/tiny", ["no config.json", "an adapter, not a model"]),
        (repo({**sharded(), INDEX: b"[]"}), "org/tiny", ["is not a safetensors index"]),
        (repo({**sharded(), INDEX: b'{"weight_map": {"a": "../x.safetensors"}}'}), "org/tiny", ["folder of the index"]),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(made: Repo | None, source: str, words: list[str], hub: Hub, fetch: Fetch) -> None:
    if made is not None:
        hub.repos["org/tiny"] = made
    with pytest.raises(ModelSourceError) as caught:
        fetch(source)
    assert said(caught, *words) == []


def test_a_whole_file_goes_before_an_index_that_names_others(hub: Hub, fetch: Fetch) -> None:
    files = {**sharded(), SINGLE: b"w" * 1000}
    del files[SHARDS[1]]
    hub.repos["org/tiny"] = repo(files)
    folder = fetch("org/tiny")
    assert (folder / SINGLE).is_file()
    assert SHARDS[0] not in hub.fetched()
    assert fetch("org/tiny") == folder
    assert hub.fetched() == []


def test_missing_shard_is_named(hub: Hub, fetch: Fetch) -> None:
    files = sharded()
    del files[SHARDS[1]]
    hub.repos["org/tiny"] = repo(files)
    with pytest.raises(ModelSourceError) as caught:
        fetch("org/tiny")
    assert said(caught, "names 2 files, and 1 of them are missing", SHARDS[1], "org/tiny@main") == []
    assert SHARDS[0] not in hub.fetched()


def test_token_opens_a_gated_repository(hub: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = repo(single(), token="secret")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ModelSourceError, match="the current token may not"):
        fetch("org/tiny")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert contents(fetch("org/tiny")) == without_extras(single())


# The whole way, by the variables


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Commit:
    """A model that runs, in two shards."""
    folder = tmp_path_factory.mktemp("real")
    source = TinyGGUF().write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    convert(source, folder, lambda text: None)
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    halves = {SHARDS[0]: sorted(tensors)[:9], SHARDS[1]: sorted(tensors)[9:]}
    for shard, names in halves.items():
        save_file({name: tensors[name] for name in names}, folder / shard)
    index = {"weight_map": {name: shard for shard, names in halves.items() for name in names}}
    (folder / INDEX).write_text(json.dumps(index))
    return contents(folder)


@pytest.mark.slow
def test_run_fetches_and_says_from_where(hub: Hub, real: Commit, tmp_path: Path) -> None:
    hub.repos["org/real"] = Repo({commit_of(real): real}, {"main": "0" * 40, "v1": commit_of(real)})
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
           "NANOENGINE_CACHE": empty_cache(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    env.pop("HF_HUB_CACHE", None)
    (tmp_path / "run.yaml").write_text(
        "model: {source: org/real, revision: v1}\nengine: {max_model_len: 64}\n"
        "sampler: {temperature: 0, max_tokens: 4}\nprompts: [hello]\n"
    )

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nanoengine", "run", "run.yaml"],
            capture_output=True, text=True, check=False, cwd=tmp_path, env={**env, **more}, timeout=120,
        )  # fmt: skip

    first = run()
    assert first.returncode == 0, first.stderr
    assert f"downloading org/real@v1 from {hub.endpoint}: 2 files" in first.stderr
    assert f"org/real at commit {commit_of(real)[:12]}" in first.stderr
    hub.asked.clear()
    second = run(HF_HUB_OFFLINE="1")
    assert second.returncode == 0, second.stderr
    assert hub.asked == []
    assert "using org/real@v1 from the cache" in second.stderr
    assert second.stdout == first.stdout
