"""A tokenizer whose ids are bytes."""

from __future__ import annotations

import pytest

from nanoengine.testing.checkpoints import write_byte_tokenizer
from nanoengine.text import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Ids are bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    found = load_tokenizer(folder)
    assert found is not None
    return found
