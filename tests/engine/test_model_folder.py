"""What a model folder asks for and does not get is logged once, by name; a value out of range names the file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nanoengine import LLM
from nanoengine.api.errors import DeviceMemoryError, ModelError
from nanoengine.lab.doctor import Asked, examine
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.plugins.discover import discover
from nanoengine.testing.checkpoints import tiny_llama


def llm_of(folder: Path, generation: dict[str, Any], **fields: Any) -> LLM:
    tiny_llama(folder, **fields)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return LLM(str(folder), device="cpu", num_gpu_blocks_override=32, max_num_seqs=4)


def test_unread_keys_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generation = {"num_beams": 4, "suppress_tokens": [5], "do_sample": False, "max_new_tokens": 3}
    with (
        caplog.at_level(logging.WARNING, "nanoengine"),
        llm_of(tmp_path, generation, residual_multiplier=0.5, use_cache=False) as llm,
    ):
        llm.generate([[1, 2, 3]] * 3, use_tqdm=False)
        params = llm.default_params
    said = [message for message in caplog.messages if "config.json" in message]
    assert len(said) == 2
    assert any("generation_config.json: num_beams = 4 has no effect here: there is no beam search" in m for m in said)
    assert any("config.json: the model does not read residual_multiplier = 0.5" in message for message in said)
    assert (params.temperature, params.max_tokens, params.logit_bias) == (0.0, 3, {5: float("-inf")})


def test_the_doctor_names_them(tmp_path: Path) -> None:
    tiny_llama(tmp_path, residual_multiplier=0.5)
    options = EngineOptions(device="cpu", skip_tokenizer_init=True)
    found = examine(discover(), Asked(source=str(tmp_path), options=options), lambda line: None)
    notes = [each.text for each in found.findings if each.name == "config.json"]
    assert notes == ["residual_multiplier = 0.5: llama does not read this key"]


def test_a_value_out_of_range_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json: top_p must be above 0 and at most 1, not 7"):
        llm_of(tmp_path, {"top_p": 7.0})


def test_weights_beyond_the_machine_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    """A checkpoint's sizes, or a mistake in them, that no machine here holds."""
    tiny_llama(tmp_path)
    file = tmp_path / "config.json"
    sizes = {"hidden_size": 2**17, "intermediate_size": 2**18, "num_attention_heads": 128, "num_hidden_layers": 60}
    file.write_text(json.dumps(json.loads(file.read_text()) | sizes))
    with pytest.raises(DeviceMemoryError, match=r"weights take [\d,.]+ GiB, and this machine has"):
        LLM(str(tmp_path), device="cpu", load_format="dummy", skip_tokenizer_init=True)
