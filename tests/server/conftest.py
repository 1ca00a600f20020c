"""Servers are forked; one that is started imports for nine CPU seconds, with its engine and one HTTP process."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def forked_servers(forked: None) -> None:
    pass
