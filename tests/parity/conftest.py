from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from . import tiny

Pair = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """kind -> folder of the checkpoint, and transformers' model of it, made once."""

    @cache
    def make(kind: str) -> Pair:
        folder = tiny.write(kind, tmp_path_factory.mktemp("tiny"))
        return folder, tiny.reference(folder)

    return make
