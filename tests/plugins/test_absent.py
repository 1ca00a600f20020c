"""An unknown name: the error suggests the nearest one; if none is near, it says how to add a plugin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nanoengine import LLM, SamplingParams
from nanoengine.api import ModelError, NanoEngineError, ParamsError, PluginError
from nanoengine.setup.config.config import load_config
from nanoengine.setup.plugins.discover import discover
from nanoengine.testing.checkpoints import tiny_llama

HOW = "If a plugin provides it: install its package, or give --plugin FILE, in Python LLM(plugins=[FILE])"


def said(call: Callable[[], object]) -> str:
    with pytest.raises(NanoEngineError) as caught:
        call()
    return str(caught.value)


def test_a_part() -> None:
    registry = discover()
    assert HOW in said(lambda: registry.require("attention_backends", "yonder"))
    assert HOW in said(lambda: registry.model_for(["NobodyForCausalLM"]))
    near = said(lambda: registry.require("attention_backends", "torhc"))
    assert "did you mean 'torch'?" in near
    assert "--plugin" not in near
    with pytest.raises(PluginError):
        registry.require("attention_backends", "yonder")
    with pytest.raises(ModelError):
        registry.model_for(["NobodyForCausalLM"])


def test_a_key_of_yaml(tmp_path: Path, install: Callable[..., None]) -> None:
    install("nanoengine-bad", "import no_such_library_q", version="0.7")
    path = tmp_path / "run.yaml"
    path.write_text("model: a/b\n")

    def refused(override: str) -> str:
        return said(lambda: load_config(path, [override]))

    sparkle = refused("sampler.sparkle=1")
    assert HOW in sparkle
    assert "It may be missing because nanoengine-bad 0.7" in sparkle
    assert "--plugin" not in refused("sampler.topp=1")
    assert "--plugin" not in refused("engine.sparkle=1")  # no plugin adds engine options
    assert "or what a plugin brings: install its package, or give --plugin FILE" in refused("attention=yonder")


def test_a_parameter_in_python(tmp_path: Path, install: Callable[..., None]) -> None:
    """Only the engine knows which processors there are, so it is found there: before anything runs."""
    install("nanoengine-bad", "import no_such_library_q", version="0.7")
    with LLM(tiny_llama(tmp_path / "tiny"), load_format="dummy", num_gpu_blocks_override=32) as llm:
        sparkle = said(lambda: llm.generate([[1, 2], [3]], [SamplingParams(), SamplingParams(sparkle=1)]))
        assert sparkle.startswith("params[1]: SamplingParams has no field 'sparkle'; ")
        assert HOW in sparkle
        assert "It may be missing because nanoengine-bad 0.7" in sparkle
        for call in (llm.generate, llm.stream):
            with pytest.raises(ParamsError, match="no field 'temprature'; did you mean 'temperature'") as caught:
                call([1, 2], SamplingParams(temprature=1))
            assert HOW not in str(caught.value)
        assert llm.stats().steps == llm.stats().waiting == llm.stats().running == 0
