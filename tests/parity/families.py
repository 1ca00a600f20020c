"""Tiny random checkpoints of families as transformers writes them, by config fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: Mapping[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LONG = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 3.5, 6.0, 9.0, 14.0],
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
OLMOE = {"num_experts": 8, "num_experts_per_tok": 3}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "rope_parameters": {**YARN, "rope_theta": 300.0, "mscale": 0.707, "mscale_all_dim": 0.707},
}
DEEPSEEK = {  # keys of the published files that change nothing there
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "greedy",
}
GPT_OSS = {
    "head_dim": 16,
    "num_local_experts": 8,
    "sliding_window": 9,
    "rope_parameters": {**YARN, "rope_theta": 300.0, "truncate": False},
}

# name -> (model type, fields, standard deviation of the weights)
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], float]] = {
    "olmo2": ("olmo2", {}, 0.2),
    "olmo2, one KV head, biases": ("olmo2", {"num_key_value_heads": 1, "attention_bias": True}, 0.25),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.35,
            "residual_multiplier": 0.6,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
        0.15,
    ),
    "granite, biases": ("granite", {"mlp_bias": True, "attention_bias": True, "residual_multiplier": 1.4}, 0.2),
    "phi3": ("phi3", {}, 0.2),
    "phi3, a window, all heads": ("phi3", {"num_key_value_heads": 4, "sliding_window": 9}, 0.2),
    "phi3, partly rotated": (
        "phi3",
        {"partial_rotary_factor": 0.5, "tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1},
        0.15,
    ),
    "phi3, as Phi-4-mini": (
        "phi3",
        {
            "hidden_size": 64,
            "rope_parameters": {**LONG, "original_max_position_embeddings": 128, "partial_rotary_factor": 0.75},
            "max_position_embeddings": 512,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            **dict.fromkeys(("attention_bias", "lm_head_bias", "mlp_bias"), False),
            **dict.fromkeys(("full_attn_mod", "interpolate_factor"), 1),
        },
        0.15,
    ),
    "cohere": ("cohere", {"logit_scale": 0.4, "tie_word_embeddings": False}, 0.2),
    "cohere, norms of heads": (
        "cohere",
        {"logit_scale": 0.2, "use_qk_norm": True, "attention_bias": True},
        0.2,
    ),
    "starcoder2": ("starcoder2", {"norm_epsilon": 1e-3}, 0.3),
    "starcoder2, a window, no biases, a head": (
        "starcoder2",
        {"use_bias": False, "sliding_window": 9, "tie_word_embeddings": False, "num_key_value_heads": 1},
        0.2,
    ),
    "glm": ("glm", {"head_dim": 16}, 0.2),
    "glm4": ("glm4", {"head_dim": 16, "attention_bias": False}, 0.2),
    "glm4, biases, a quarter rotated": (
        "glm4",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 90.0, "partial_rotary_factor": 0.25},
        },
        0.2,
    ),
    "gpt2": ("gpt2", {}, 0.15),
    "gpt2, a head, narrow, unscaled": (
        "gpt2",
        {"n_inner": 40, "scale_attn_weights": False, "tie_word_embeddings": False, "activation_function": "gelu_new"},
        0.1,
    ),
    "gemma": ("gemma", {"head_dim": 16, "hidden_act": "gelu", "tie_word_embeddings": False}, 0.1),
    "phi": ("phi", {"hidden_size": 64}, 0.15),
    "phi, norms of heads": (
        "phi",
        {"hidden_size": 64, "num_key_value_heads": 1, "qk_layernorm": True, "hidden_act": "gelu"},
        0.2,
    ),
    "gpt_neox": ("gpt_neox", {"hidden_size": 64}, 0.15),
    "gpt_neox, one after the other": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "relu",
            "hidden_size": 64,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
        },
        0.2,
    ),
    "qwen3-moe, one layer dense": (
        "qwen3_moe",
        {**EXPERTS, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1], "attention_bias": True},
        0.25,
    ),
    "qwen3-moe, every second layer": (
        "qwen3_moe",
        {**EXPERTS, "decoder_sparse_step": 2, "num_experts_per_tok": 1},
        0.25,
    ),
    "qwen2-moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 28}, 0.25),
    "deepseek-v2, as V2-Lite": ("deepseek_v2", {**LATENT, **DEEPSEEK, "q_lora_rank": None}, 0.25),
    "deepseek-v2, as V2.5": (
        "deepseek_v2",
        {
            **LATENT,
            **DEEPSEEK,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "rope_parameters": {**YARN, "rope_theta": 300.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        0.15,
    ),
    "deepseek-v2, biases, wide values": (
        "deepseek_v2",
        {
            **LATENT,
            "v_head_dim": 20,
            "rms_norm_eps": 1e-3,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {**YARN, "rope_theta": 300.0, "mscale": 0.7, "mscale_all_dim": 1.5},
        },
        0.15,
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {**LATENT, "n_group": 4, "topk_group": 2, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        0.2,
    ),
    "deepseek-v3, halves rotated": (
        "deepseek_v3",
        {**LATENT, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "q_lora_rank": None}
        | {"rope_interleave": False, "rope_parameters": {"rope_type": "default", "rope_theta": 90.0}},
        0.2,
    ),
    "olmoe": ("olmoe", {**OLMOE, "attention_bias": True}, 0.25),
    "olmoe, renormalised, one KV head": ("olmoe", {**OLMOE, "norm_topk_prob": True, "num_key_value_heads": 1}, 0.25),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}, 0.2),
    "smollm3, windows, biases": (
        "smollm3",
        {
            "no_rope_layers": [0, 1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 9,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
        0.2,
    ),
    "mixtral": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 11}, 0.25),
    "gpt_oss": ("gpt_oss", {**GPT_OSS, "num_experts_per_tok": 3}, 0.3),
    "gpt_oss, no biases, full attention first": (
        "gpt_oss",
        {
            **GPT_OSS,
            "num_experts_per_tok": 1,
            "num_key_value_heads": 1,
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        0.25,
    ),
    "qwen3, yarn": ("qwen3", {"head_dim": 12, "rope_parameters": {**YARN, "rope_theta": 300.0}}, 0.2),
    "llama, yarn with its numbers": (
        "llama",
        {
            "rope_parameters": {
                **YARN,
                "rope_theta": 100.0,
                "beta_fast": 6.0,
                "beta_slow": 2.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.5,
                "truncate": False,
            }
        },
        0.2,
    ),
}


def is_norm(name: str) -> bool:
    """Whether a parameter is the weight of a norm."""
    return name.endswith("weight") and ("norm" in name or ".ln_" in name)


def write(folder: Path, family: str, **fields: Any) -> Path:
    """The checkpoint of one of `FAMILIES`, with further fields."""
    kind, given, std = FAMILIES[family]
    return write_model(folder, kind, std=std, **{**given, **fields})


def write_model(folder: Path, model_type: str, *, std: float = 0.2, **fields: Any) -> Path:
    """A random model of transformers: config.json and safetensors. Weights of norms are near one."""
    torch.manual_seed(len(model_type))
    known = AutoConfig.for_model(model_type)
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name)}
    config = AutoConfig.for_model(model_type, **{**sizes, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    corrections = [each for name, each in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(is_norm(name)), std=0.3 if is_norm(name) else std)
    for correction in corrections:
        nn.init.normal_(correction, std=0.2)
    model.save_pretrained(folder)
    hf = json.loads((folder / "config.json").read_text())
    assert hf["architectures"] == [type(model).__name__]
    return folder
