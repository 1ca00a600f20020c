"""The server that is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.mock_server import mock_server
from tests.server.running import Running


@pytest.fixture(scope="module", params=[1, 3], ids=["one-http-process", "three"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    workers = request.param
    options = ("engine.max_num_seqs=256", "engine.kv_cache_memory=67108864", f"server.workers={workers}")
    with mock_server(tmp_path_factory.mktemp("load"), *options) as running:
        yield running.until_ready()
