"""The server that is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nanoengine.testing.mock_model import write_mock_checkpoint
from tests.server.mock_server import mock_server
from tests.server.running import Running


@pytest.fixture(scope="module", params=[1, 3], ids=["one-http-process", "three"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With so many HTTP processes; "ids": one, and a model without a tokenizer."""
    folder, workers = tmp_path_factory.mktemp("load"), 1 if request.param == "ids" else request.param
    if request.param == "ids":
        write_mock_checkpoint(folder / "mock", vocab_size=300, max_position_embeddings=4096)
    options = ("engine.max_num_seqs=256", "engine.kv_cache_memory=67108864", f"server.workers={workers}")
    with mock_server(folder, *options) as running:
        yield running.until_ready()
