"""config.json and generation_config.json: real ones with keys changed, moved, doubled and broken; no weights read."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from nanoengine.build import inspect_model
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry
from nanoengine.setup.start.generation import read_generation_defaults

Case = tuple[str, str]
"""config.json and generation_config.json, as texts; "" is no file."""

_REAL = Path(__file__).parent.parent / "models" / "real_configs"
_BASES = (
    "llama-3.2-1b-instruct", "llama-2-7b-chat", "smollm2-135m", "mistral-7b-instruct-v0.3", "qwen2.5-0.5b-v5",
    "qwen3-0.6b-think-sft", "gemma-2-9b-it", "gemma-3-270m-llmscratch", "gemma-3-27b-it",
)  # fmt: skip
_GENERATION: dict[str, Any] = {
    "bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 3], "max_new_tokens": 64, "min_new_tokens": 2,
    "repetition_penalty": 1.05, "stop_strings": ["END"], "suppress_tokens": [7, 9], "bad_words_ids": [[5], [6, 7]],
    "temperature": 0.7, "top_k": 20, "top_p": 0.8, "max_length": 4096, "num_beams": 1, "transformers_version": "4.0",
}  # fmt: skip
_QUANTISED: tuple[dict[str, Any], ...] = (
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "ignored_layers": ["x"]},
    {"quant_method": "gguf", "types": {"lm_head": "Q4_0", "model.embed_tokens": "Q6_K"}, "expanded": {"x": "IQ2_S"}},
    {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["re:.*head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            }
        },
    },
)
"""As a value of `quantization_config`; changed further as any object is."""
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 7, -1, 8.0, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"),
    2**31, 2**31 - 1, 2**63, 10**12, 10**40, 10**400, 1000, 4096, 65536, "", "8", "silu", "relu", "default", "linear",
    "llama3", "yarn", "full_attention", "\ud800", "a\0b", "x" * 3000, [], [1], [[]], ["full_attention"] * 9, {},
    {"a": {"b": [1]}}, {"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 2}, {"factor": 8},
    {"full_attention": {"rope_type": "default"}}, {"quant_method": "awq"}, [None] * 300, {"rope_theta": 7.0},
    *_QUANTISED,
)  # fmt: skip
_KEYS = (
    "rope_scaling", "rope_parameters", "rope_theta", "head_dim", "layer_types", "sliding_window", "num_hidden_layers",
    "quantization_config", "use_sliding_window", "max_window_layers", "sliding_window_pattern", "model_type", "type",
    "text_config", "architectures", "dtype", "eos_token_id", "partial_rotary_factor", "rope_local_base_freq", "factor",
    "per_layer_config", "unheard of", "", "tie_word_embeddings", "hidden_act", "num_key_value_heads", "attention_bias",
)  # fmt: skip
_SCRAPS = (
    "NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "{", "}", "[" * 3000, '{"a":' * 3000, "\\ud800", "\0", '"',
    ",", "\ufeff", "null", "-", "0x10", "'", "//", "\u2028", "1" * 400, "true",
)  # fmt: skip


def mutants(rng: random.Random) -> Iterator[Case]:
    while True:
        config = json.loads((_REAL / f"{rng.choice(_BASES)}.json").read_text())
        generation = deepcopy(_GENERATION)
        changed = rng.choice((config, config, config, generation))
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _change(rng, changed)
        texts = [_written(rng, config), _written(rng, generation) if rng.random() < 0.7 else ""]
        if rng.random() < 0.25:
            which = rng.randrange(2)
            texts[which] = _broken(rng, texts[which])
        yield texts[0], texts[1]


def _change(rng: random.Random, data: dict[str, Any]) -> None:
    """A key of the object, or of one in it, is set, moved or taken out."""
    inner = [value for value in data.values() if isinstance(value, dict)]
    if inner and rng.random() < 0.4:
        data = rng.choice(inner)
    key = rng.choice([*data, rng.choice(_KEYS)])
    how = rng.random()
    if how < 0.2:
        data.pop(key, None)
    elif how < 0.3 and data:
        data[key] = deepcopy(data[rng.choice(list(data))])
    elif how < 0.4 and isinstance(data.get(key), int):
        data[key] = data[key] * rng.choice((-1, 0, 3, 10**3, 10**6))
    elif how < 0.45:
        data[key] = {key: data.get(key)}
    else:
        data[key] = deepcopy(rng.choice(_VALUES))


def _written(rng: random.Random, data: dict[str, Any]) -> str:
    """As JSON, sometimes with a key that is there twice."""
    text = json.dumps(data)
    if data and rng.random() < 0.1:
        key = rng.choice(list(data))
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(rng.choice(_VALUES))}}}"
    return text


def _broken(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    end = min(len(text), at + rng.randrange(20))
    scrap = rng.choice(_SCRAPS)
    return rng.choice(
        (text[:at] + scrap + text[at:], text[:at] + scrap + text[end:], text[:at] + text[end:], text[:at])
    )


@cache
def _registry() -> Registry:
    return discover()


def warm() -> None:
    """Models, kernels and torch's meta device."""
    run(((_REAL / "gemma-3-27b-it.json").read_text(), "{}"))


def run(case: Case) -> None:
    """The model's shapes are made, without memory, and the sampling defaults read."""
    folder = Path()
    for name, text in zip(("config.json", "generation_config.json"), case, strict=True):
        (folder / name).unlink(missing_ok=True)
        if text:
            (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    seen = inspect_model(folder, EngineOptions(device="cpu"), _registry())
    processors = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logit_bias")
    found = read_generation_defaults(
        folder, seen.hf_config, processors, 2, vocab_size=seen.built.config.vocab_size, max_model_len=4096
    )
    assert all(len(line) < 2000 for line in (*seen.unread, *found.unsupported))
