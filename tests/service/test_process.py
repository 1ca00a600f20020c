"""The engine's process: its start, its clients, its ends."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nanoengine.api.errors import ConfigError, EngineUnavailable, ModelSourceError
from nanoengine.params.engine_options import EngineOptions
from nanoengine.service.engine_process import EngineProcess
from nanoengine.service.merge import merge_all
from nanoengine.service.remote import RemoteClient
from nanoengine.service.source import EngineSource
from nanoengine.setup.config.config import load_config
from nanoengine.setup.plugins.discover import discover
from nanoengine.testing import mock_model
from nanoengine.testing.byte_tokenizer import END, write_byte_tokenizer
from nanoengine.testing.mock_model import write_mock_checkpoint
from tests.engine.support import VOCAB, greedy, prompts
from tests.service.support import request, tokens, until, whole

pytestmark = pytest.mark.usefixtures("forked")


def source(tmp_path: Path, **options: Any) -> EngineSource:
    folder = write_mock_checkpoint(tmp_path / "mock", vocab_size=VOCAB, max_position_embeddings=4096)
    chosen = EngineOptions(**{"block_size": 4, "num_gpu_blocks_override": 2048, "load_format": "dummy", **options})
    return EngineSource.of_parts(str(folder), "mock", None, chosen, {"max_tokens": 5}, [mock_model])


def test_a_process_serves_several_clients_and_ends_with_its_starter(tmp_path: Path) -> None:
    async def main() -> None:
        engine = EngineProcess.start(source(tmp_path))
        early = engine.connect()  # before it is ready
        info = await engine.wait_ready()
        assert info.default_sampling == {"max_tokens": 5}
        assert info.pid == engine.process.pid
        clients = [RemoteClient(), RemoteClient()]
        clients[0].connect(early)
        clients[1].connect(engine.connect())
        for client in clients:
            assert await client.ready() == info
        given = prompts(6)
        asked = [request(f"r{i}", prompt, max_tokens=7) for i, prompt in enumerate(given)]
        found = await asyncio.gather(*(tokens(clients[i % 2], each) for i, each in enumerate(asked)))
        assert found == [greedy(prompt, 7) for prompt in given]
        gone = await clients[0].add(request("gone", [1], max_tokens=4000))
        await anext(gone)
        await clients[0].close()
        while (await clients[1].stats()).requests:
            await asyncio.sleep(0.01)
        engine.process.send_signal(signal.SIGINT)
        engine.process.send_signal(signal.SIGTERM)
        assert await tokens(clients[1], request("r", [1, 2], max_tokens=3)) == greedy([1, 2], 3)
        began = time.monotonic()
        engine.close()
        assert engine.process.returncode == 0
        assert time.monotonic() - began < 50
        await until(lambda: not clients[1].health.alive)
        assert "closed" in str(clients[1].health.reason)

    asyncio.run(main())


def test_a_start_that_fails_raises_the_engines_own_error(tmp_path: Path) -> None:
    async def main() -> None:
        wrong = EngineSource.of_parts(str(tmp_path / "none"), "auto", None, EngineOptions(), None)
        engine = EngineProcess.start(wrong)
        with pytest.raises(ModelSourceError, match="none"):
            await engine.wait_ready()
        assert await engine.status() == 1
        engine.close()
        killed = EngineProcess.start(source(tmp_path))
        killed.process.kill()
        with pytest.raises(EngineUnavailable, match="SIGKILL"):
            await killed.wait_ready()
        killed.close()

    asyncio.run(main())


def test_a_composed_configuration_goes_to_the_process_as_json(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("from nanoengine.api import hookimpl\n@hookimpl\ndef register_models(): return []\n")
    folder = write_mock_checkpoint(tmp_path / "mock", vocab_size=VOCAB)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {folder}\nattention: mock\nengine: {{max_num_seqs: 7, load_format: dummy}}\n"
        "speculation: {method: ngram}\nsampler: {temperature: 0.5}\n"
    )
    registry = discover(extra=[("mock", mock_model)])
    config = load_config(path, ["engine.structured_outputs.timeout=3"], registry=registry)
    made = EngineSource.from_json(EngineSource.of_config(config, [plugin, mock_model]).to_json())
    assert made.config().engine == config.engine
    assert made.config().model.source == str(folder)
    assert made.config().sampler == {"temperature": 0.5}
    assert made.plugin_files == (str(plugin),)
    assert made.registry().attention_backends["mock"]


@pytest.mark.parametrize("wrong", [{"attention": object}, {"plugins": [object()]}])
def test_what_only_this_process_has_is_refused_with_the_way_out(wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"attention": "auto", "plugins": [], **wrong}
    with pytest.raises(ConfigError, match="process=False"):
        EngineSource.of_parts("m", given["attention"], None, EngineOptions(), None, given["plugins"])


_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 20, "maxLength": 25},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 5, "maxItems": 6},
        "inner": {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]},
    },
    "required": ["name", "tags", "inner"],
    "additionalProperties": False,
}


def test_a45_an_engine_killed_in_mid_json_leaves_bytes_that_equal_an_undisturbed_run(tmp_path: Path) -> None:
    """Two engines, one after the other, each a process. The grammar's state goes on with the tokens."""
    made = source(tmp_path)
    folder = Path(made.model)
    tokenizer = write_byte_tokenizer(folder)
    end = tokenizer.token_to_id(END)
    write_mock_checkpoint(folder, vocab_size=320, max_position_embeddings=4096, eos_token_id=end)
    outputs = {"json": _SCHEMA, "whitespace_pattern": "[ ]?"}
    asked = [
        request(
            f"r{i}", [i + 1], max_tokens=900, ignore_eos=False, temperature=1.0, seed=i, n=1 + i % 2,
            structured_outputs=outputs,
        )
        for i in range(4)
    ]  # fmt: skip

    async def main() -> None:
        engines = [EngineProcess.start(made), EngineProcess.start(made)]
        await asyncio.gather(*(engine.wait_ready() for engine in engines))
        client = RemoteClient()
        client.connect(engines[0].connect())
        await client.ready()
        streams = [await client.add(each) for each in asked]
        begun = [[await anext(stream)] for stream in streams]
        for stream, deltas in zip(streams, begun, strict=True):
            while sum(len(s.token_ids) for d in deltas for s in d.samples) < 15:
                deltas.append(await anext(stream))
        engines[0].process.send_signal(signal.SIGSTOP)
        engines[0].process.kill()
        await until(lambda: not client.health.alive)
        assert len(client._open) == len(asked)
        client.connect(engines[1].connect())
        for stream, deltas in zip(streams, begun, strict=True):
            deltas += [delta async for delta in stream]
        for each, deltas in zip(asked, begun, strict=True):
            got, wanted = merge_all(deltas), await whole(await client.add(each))
            assert got.error is None
            for i in range(each.params.n):
                mine, other = (next(s for s in d.samples if s.sample_index == i) for d in (got, wanted))
                assert mine == other
                assert mine.finish_reason == "stop"
                found = json.loads(tokenizer.decode(mine.token_ids))
                assert set(found) == {"name", "tags", "inner"}
        await client.close()
        for engine in engines:
            engine.close()

    asyncio.run(main())
