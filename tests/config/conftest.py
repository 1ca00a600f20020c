"""A registry with one backend of our own and what is installed, and folders of config files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nanoengine.api import AttentionSpec, ModelSourceSpec, hookimpl
from nanoengine.api.errors import ConfigError
from nanoengine.setup.config.composer import Root, SearchPath, Shorthand, compose
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry


class Parts:
    """A backend and a named model that no group file knows."""

    @hookimpl
    def register_attention_backends(self) -> list[AttentionSpec]:
        return [AttentionSpec(name="mirror", target="nowhere:Mirror", api=1)]

    @hookimpl
    def register_model_sources(self) -> list[ModelSourceSpec]:
        return [ModelSourceSpec(name="shelf", target="nowhere:Shelf", api=1, models=("tiny-shelf-model",))]


@pytest.fixture(scope="session")
def registry() -> Registry:
    return discover(extra=[("parts", Parts())])


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[Mapping[str, str]], Path]:
    """Writes files, by their path, and gives the folder."""

    def write(files: Mapping[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path

    return write


Composer = Callable[..., dict[str, Any]]


@pytest.fixture
def composed(folder: Callable[[Mapping[str, str]], Path]) -> Composer:
    """Composes config.yaml of the given files, without any schema."""

    def run(
        files: Mapping[str, str], *overrides: str, shorthands: Mapping[str, Shorthand] | None = None
    ) -> dict[str, Any]:
        path = folder(files)
        search = SearchPath(Root(path, str(path), "own"), [])
        primary = search.find("", "config")
        assert primary is not None
        return compose(primary, search, overrides, shorthands=shorthands or {}, defaults={}).data

    return run


@pytest.fixture
def refusal(composed: Composer) -> Callable[..., str]:
    """The message of the `ConfigError` that composing raises."""

    def run(files: Mapping[str, str], *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            composed(files, *overrides)
        return str(caught.value)

    return run
