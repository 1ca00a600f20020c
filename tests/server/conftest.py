"""Servers are forked: without that, each takes nine seconds of imports."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def programs(forked: None) -> None:
    pass
