from __future__ import annotations

from pathlib import Path

import pytest

from nanoengine.testing.checkpoints import tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, tokens that are bytes, and room for 2,000 of them."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"), with_tokenizer=True, max_position_embeddings=2000)
