"""Two plugins for one architecture: an error that says how to choose, and the choice."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest

from nanoengine import LLM, SamplingParams
from nanoengine.api import ModelSpec, hookimpl
from nanoengine.api.errors import ModelError, ModelSourceError, PluginError
from nanoengine.testing import mock_model
from nanoengine.testing.checkpoints import tiny_llama
from nanoengine.testing.mock_model import MockModel, write_mock_checkpoint

from .support import greedy


class OtherMock(MockModel):
    pass


def other_plugin() -> types.SimpleNamespace:
    @hookimpl
    def register_models() -> list[ModelSpec]:
        target = f"{OtherMock.__module__}:OtherMock"
        return [ModelSpec(name="other", architectures=(mock_model.ARCHITECTURE,), target=target, api=1)]

    return types.SimpleNamespace(register_models=register_models)


def test_one_of_two_models_is_chosen_by_name(tmp_path: Path) -> None:
    folder = write_mock_checkpoint(tmp_path / "m")
    plugins = [mock_model, other_plugin()]
    with pytest.raises(PluginError, match=r"'mock'.*'other'.*implementation"):
        LLM(folder, attention="mock", load_format="dummy", plugins=plugins)
    with LLM(folder, attention="mock", load_format="dummy", plugins=plugins, implementation="other") as llm:
        assert isinstance(llm.model, OtherMock)
        (output,) = llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        assert output.outputs[0].token_ids == greedy([1, 2], 4)
    with pytest.raises(PluginError, match=r"no model 'othr'.*did you mean 'other'"):
        LLM(folder, attention="mock", load_format="dummy", plugins=plugins, implementation="othr")


def test_an_unknown_model_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"smollm2-135n.*did you mean 'smollm2-135m'"):
        LLM("smollm2-135n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": None}, "config.json names no architecture"),
        ({"architectures": ["NobodyForCausalLM"]}, "no installed model supports architecture 'NobodyForCausalLM'"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "config.json: rope_parameters.rope_type must be"),
        ({"num_attention_heads": "many"}, "config.json: num_attention_heads must be"),
    ],
)
def test_a_model_that_cannot_be_served_is_named_by_its_folder(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ModelError) as caught:
        LLM(folder)
    assert str(caught.value).startswith(f"{folder}: {words}")
