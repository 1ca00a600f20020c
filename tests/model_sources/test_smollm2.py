"""The quickstart's model, converted: the same weights as transformers reads, and a tokenizer that splits rightly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_expanded import expanded_tensors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def test_config(smollm2_path: Path) -> None:
    config = json.loads((smollm2_path / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


def test_tokenizer(smollm2_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert tokenizer.tokenize("x =  3") == ["x", "Ġ=", "ĠĠ", "3"]
    assert tokenizer.tokenize("\n\n1.") == ["ĊĊ", "1", "."]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(text).input_ids[0] == 1
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.slow
def test_weights_equal_transformers_own_loader(
    smollm2_path: Path, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All names; the values of three layers and of what is in no layer, as its loader takes half a second a layer."""
    read = gguf.GGUFReader.__init__

    def some(self: Any, *given: Any) -> None:
        read(self, *given)
        self.tensors = [each for each in self.tensors if not re.match(r"blk\.(?!(0|13|29)\.)", each.name)]

    monkeypatch.setattr(gguf.GGUFReader, "__init__", some)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(smollm2_path))
    theirs = load_gguf_checkpoint(str(smollm2_gguf), return_tensors=True, model_to_load=model)["tensors"]
    ours = expanded_tensors(smollm2_path)
    assert len(ours) == 272
    assert ours.keys() == model.state_dict().keys() - {"lm_head.weight"}
    assert len(theirs) == 3 * 9 + 2
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
def test_it_answers(smollm2_expanded: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_expanded)
    model = AutoModelForCausalLM.from_pretrained(smollm2_expanded, dtype=torch.float32)
    chat = [{"role": "user", "content": "Tell me the capital of France."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
