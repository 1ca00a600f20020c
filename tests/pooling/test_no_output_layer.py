"""Models for embeddings that have no output layer: vectors as of transformers, and no tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from nanoengine import ModelError, RequestError
from nanoengine.setup.start.pooling import with_output_layer

PROMPTS = tiny.prompts(6, shortest=5, longest=40)


def without_output_layer(kind: str, folder: Path) -> Path:
    """As sentence-transformers saves it: the inner model alone."""
    tiny.write(kind, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [config["architectures"][0].replace("ForCausalLM", "Model")]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept = {name.removeprefix("model."): value for name, value in tensors.items() if name != "lm_head.weight"}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["mistral", "qwen3", "llama"])
def test_it_makes_embeddings_and_refuses_to_generate(kind: str, tmp_path: Path) -> None:
    folder = without_output_layer(kind, tmp_path)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with tiny.llm(folder, max_num_batched_tokens=16) as llm:
        outputs = llm.embed(PROMPTS, "mean", normalize=False, use_tqdm=False)
        for output, prompt in zip(outputs, PROMPTS, strict=True):
            with torch.no_grad():
                want = model(torch.tensor([prompt])).last_hidden_state[0].mean(0).numpy()
            assert output.embedding is not None
            assert np.abs(output.embedding - want).max() < 1e-5 * np.abs(want).max()
        [refused] = llm.generate([[1, 2]], use_tqdm=False)
        assert refused.error is not None
        assert refused.error.code == "not_supported"
        assert "this model has no output layer" in str(refused.error)
        with pytest.raises(RequestError, match="this model has no output layer"):
            next(llm.stream([1, 2]))


def test_an_architecture_that_no_model_has_is_refused_by_its_own_name(tmp_path: Path) -> None:
    folder = without_output_layer("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MarbleModel"]}))
    with pytest.raises(ModelError, match="no installed model supports architecture 'MarbleModel'"):
        tiny.llm(folder)


def test_a_plugin_that_has_the_architecture_itself_goes_first() -> None:
    assert with_output_layer({}, ["LlamaModel"], {"LlamaForCausalLM"}.__contains__) == {
        "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True,
    }  # fmt: skip
    for names in (["LlamaModel"], ["LlamaForCausalLM"]):
        assert with_output_layer({}, names, {"LlamaForCausalLM", "LlamaModel"}.__contains__) is None
    assert with_output_layer({}, [], {"ForCausalLM"}.__contains__) is None
