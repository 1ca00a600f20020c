"""Small engines of tests do what large ones do; a tokenizer whose ids are bytes."""

from __future__ import annotations

import pytest

from nanoengine.params.engine_options import EngineOptions
from nanoengine.testing.checkpoints import write_byte_tokenizer
from nanoengine.text import Tokenizer, load_tokenizer


@pytest.fixture(autouse=True)
def few_rows_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode rows become columns however few they are."""
    monkeypatch.setitem(EngineOptions.__init__.__kwdefaults__, "steady_rows", 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Ids are bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    found = load_tokenizer(folder)
    assert found is not None
    return found
