"""A name that only YAML knows, given to Python: the error names the source that it means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nanoengine import LLM
from nanoengine.api.errors import ModelSourceError
from nanoengine.api.specs import Origin
from nanoengine.setup.config.model_options import option_hint
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry


@pytest.fixture
def providing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry]:
    """A registry with a further config root, `model/NAME.yaml` -> text."""

    def do(**files: str) -> Registry:
        folder = tmp_path / "options_of_a_test" / "model"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        for name, text in files.items():
            (folder / f"{name}.yaml").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        return replace(discover(), config_roots=(("pkg://options_of_a_test", Origin(plugin="mine")),))

    return do


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("qwen3-0.6b", "'qwen3-0.6b' is an option of a configuration (model=qwen3-0.6b), where it means"),
        ("qwen3-0.6b", "'Qwen/Qwen3-0.6B': give that here"),
        ("qwen3-0.6b@v1", "it means 'Qwen/Qwen3-0.6B@v1': give that here"),
        ("Qwen3_0.6b", "'Qwen3_0.6b' is near 'qwen3-0.6b', an option"),
    ],
)
def test_an_option_of_yaml_given_to_python(given: str, words: str) -> None:
    with pytest.raises(ModelSourceError, match=f"no model '{given}'") as caught:
        LLM(given)
    assert words in str(caught.value)


def test_other_names_are_not_talked_of(providing: Callable[..., Registry]) -> None:
    registry = providing(mine="source: smollm2-135m\n", pinned="source: a/b@v2\n", open="source: ${oc.env:MODEL}\n")
    assert option_hint("nothing-like-it", registry) == ""
    assert option_hint("mine", registry) == ""  # the source that it means is among the valid names
    assert "means 'a/b@v2'" in option_hint("pinned@v3", registry)
    hint = ". In a configuration model=open chooses pkg://options_of_a_test/model/open.yaml"
    assert option_hint("open", registry) == hint


def test_a_broken_option_hides_no_other_mistake(providing: Callable[..., Registry]) -> None:
    assert option_hint("torn", providing(torn="source: [\n")) == ""
