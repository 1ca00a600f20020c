"""Config files of public models, as their repositories hold them: each key read, equal to transformers, or refused.

`real_configs/table.json` says where each was found, why it is refused, and which of its keys are reported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_harness import PagedModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from nanoengine.api import ModelError
from nanoengine.build import inspect_model
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry

FOLDER = Path(__file__).parent / "real_configs"
TABLE: dict[str, dict[str, Any]] = json.loads((FOLDER / "table.json").read_text())
TOLERANCE = 5e-4  # on log-probs
VOCABULARY = 151
PROMPT = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(5)).tolist()


def config_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


# Of weights in few bits, numbers are compared in tests/quantization.
SERVED = [
    name for name, row in TABLE.items() if row["refused"] is None and "quantization_config" not in config_of(name)
]


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same model in small sizes and with small token ids. No key is added, and every other one is as it was."""
    if "text_config" in config:
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        small = {
            "text_config": shrunk(config["text_config"]),
            "vision_config": {**config["vision_config"], **vision, "image_size": 28},
            "mm_tokens_per_image": 4,
        }
        return {**config, **small}
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    layers = 6 if config["model_type"] == "gemma3_text" else 2
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 36,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": groups if groups in (None, 1) else 4 if groups == heads else 2,
        "head_dim": 8 if config.get("head_dim", 0) * heads == config["hidden_size"] else 12,
        "vocab_size": VOCABULARY,
        "moe_intermediate_size": 20,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 12,
        "layer_types": config.get("layer_types", [])[:layers],
        "sliding_window": None if config.get("sliding_window") is None else 7,
    }
    result = {name: sizes.get(name, value) for name, value in config.items()}
    for name, value in config.items():
        if name.endswith("_token_id") and value is not None:
            result[name] = [each % VOCABULARY for each in value] if isinstance(value, list) else value % VOCABULARY
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        result["rope_scaling"] = {**config["rope_scaling"], "original_max_position_embeddings": 64}
    return result


def checkpoint(config: dict[str, Any], folder: Path) -> Tensor:
    """Writes a random model of transformers into the folder, config.json as given; returns its log-probs, [n, V]."""
    torch.manual_seed(1)
    (folder / "config.json").write_text(json.dumps(config))
    reference = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for name, parameter in reference.named_parameters():
        bias = name.endswith("bias")  # of the output layer, a large one would say which token comes
        nn.init.normal_(parameter, mean=float("norm" in name and not bias), std=0.05 if bias else 0.2)
    reference.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    with torch.inference_mode():
        return reference(torch.tensor([PROMPT])).logits[0].log_softmax(-1)


def served(folder: Path) -> Tensor:
    """Our log-probs from the folder, in two chunks, [n, V]."""
    model = PagedModel(folder)
    logits = [model.step({"one": part})["one"] for part in (PROMPT[:23], PROMPT[23:])]
    return torch.cat(logits).log_softmax(-1)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return discover()


def test_the_table_holds_files_of_many_families() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {*TABLE, "table"}
    assert len(TABLE) >= 30
    assert len({config_of(name)["model_type"] for name in TABLE}) >= 8
    for row in TABLE.values():
        assert row["path"].endswith("config.json")
        assert (row["repository"].count("/"), len(row["commit"])) == (1, 40)


@pytest.mark.parametrize("name", TABLE)
def test_every_key_is_read_or_harmless_or_named(name: str, registry: Registry, tmp_path: Path) -> None:
    """In its own sizes, which take no memory."""
    row, options = TABLE[name], EngineOptions(device="cpu")
    (tmp_path / "config.json").write_text((FOLDER / f"{name}.json").read_text())
    if row["refused"] is None:
        assert list(inspect_model(tmp_path, options, registry).unread) == row.get("reported", [])
        return
    with pytest.raises(ModelError, match=row["refused"]):
        inspect_model(tmp_path, options, registry)


@pytest.mark.parametrize("name", SERVED)
def test_the_numbers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    want = checkpoint(shrunk(config_of(name)), tmp_path)
    assert len(set(want.argmax(-1).tolist())) > 10  # else a model that ignores its input would pass
    torch.testing.assert_close(served(tmp_path), want, atol=TOLERANCE, rtol=0)


MUTANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama-3.2-1b-instruct", {"rope_scaling": None}),
    ("llama-2-7b", {"rope_theta": 9000.0}),
    ("llama-3-8b-instruct", {"rope_theta": None}),
    ("smollm2-135m", {"rope_parameters": None}),
    ("qwq-32b", {"use_sliding_window": True, "max_window_layers": 0}),
    ("qwen3-8b", {"rms_norm_eps": 0.1}),
    ("mixtral-dolphin-2.5", {"num_experts_per_tok": 3}),
    ("deepseek-v2-lite-chat", {"rope_scaling": None}),
    ("deepseek-v2-lite-chat", {"routed_scaling_factor": 2.0}),
    ("gpt-oss-120b", {"layer_types": ["full_attention"] * 2}),
    ("gpt-oss-120b", {"rope_scaling": {"rope_type": "default"}}),
    ("gemma-2-9b-it", {"attn_logit_softcapping": 1.0}),
    ("gemma-2-9b-it", {"query_pre_attn_scalar": None}),
    ("gemma-2-2b-it", {"sliding_window": 8}),
    ("gemma-3-270m-llmscratch", {"rope_local_base_freq": 20000.0}),
    ("gemma-3-270m-llmscratch", {"layer_types": ["full_attention"] * 6}),
]


@pytest.mark.parametrize(("name", "changes"), MUTANTS)
def test_a_key_that_is_dropped_or_misread_shows(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The comparison above can fail, by each of these keys."""
    config = shrunk(config_of(name))
    want = checkpoint(config, tmp_path)
    config = {key: value for key, value in {**config, **changes}.items() if key not in changes or value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (served(tmp_path) - want).abs().max() > 4 * TOLERANCE
