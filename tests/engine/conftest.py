"""Small engines of tests do what large ones do."""

from __future__ import annotations

import pytest

from nanoengine.core.setup.options import EngineOptions


@pytest.fixture(autouse=True)
def few_rows_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode rows become columns however few they are."""
    monkeypatch.setitem(EngineOptions.__init__.__kwdefaults__, "steady_rows", 1)
