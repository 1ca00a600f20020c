"""The supported GGUF architectures, and the differences between them.

Values that the file does not have are those of llama.cpp (https://github.com/ggml-org/llama.cpp, src/models): Gemma's
attention scale (from its number of layers), which of its layers are local, and the base of their rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanoengine.plugins.model_sources.gguf_metadata import POOLING, Metadata, Shape

_WINDOW = "attention.sliding_window"

Details = Callable[[Metadata, Shape, Mapping[str, Any]], dict[str, Any]]


def _gated_silu(meta: Metadata, shape: Shape, rope: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu", "rope_parameters": rope}


def _qwen2(meta: Metadata, shape: Shape, rope: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu", "rope_parameters": rope, "use_sliding_window": False}


def _gemma2(meta: Metadata, shape: Shape, rope: Mapping[str, Any]) -> dict[str, Any]:
    local = [layer % 2 == 0 for layer in range(shape.layers)]
    caps = {name: meta.real(f"gemma2.{name}", default, positive=True) for name, default in _GEMMA2_CAPS.items()}
    window = meta.positive_int("gemma2.attention.sliding_window", 4096)
    return {**_gemma(shape, local, largest=46), **caps, "sliding_window": window, "rope_parameters": rope}


def _gemma3(meta: Metadata, shape: Shape, rope: Mapping[str, Any]) -> dict[str, Any]:
    pattern = meta.positive_int("gemma3.attention.sliding_window_pattern", 6)
    windowed = meta.get(f"gemma3.{_WINDOW}", 0) != 0  # without a window, all layers attend to everything
    local = [windowed and (layer + 1) % pattern != 0 for layer in range(shape.layers)]
    cap = meta.real("gemma3.final_logit_softcapping", 0.0)
    near = {"rope_type": "default", "rope_theta": meta.real("gemma3.rope.freq_base_swa", 10000.0, positive=True)}
    config = {
        **_gemma(shape, local, largest=62),
        "final_logit_softcapping": cap or None,
        "rope_parameters": {"full_attention": rope, "sliding_attention": near},
    }
    return config | ({"sliding_window": meta.positive_int(f"gemma3.{_WINDOW}")} if windowed else {})


_GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def _gemma(shape: Shape, local: list[bool], largest: int) -> dict[str, Any]:
    """Fields that Gemma 2 and 3 share. `largest`: number of layers of the family's largest model.

    The attention scale of the largest model depends on its width instead of the head size.
    """
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shape.hidden // shape.heads if shape.layers == largest else shape.head_size,
        "layer_types": ["sliding_attention" if each else "full_attention" for each in local],
    }


@dataclass(frozen=True, slots=True)
class Architecture:
    """The differences between the supported architectures.

    Attributes:
        hf_class, model_type: their names in config.json.
        details: makes the other fields of config.json; its last argument are the `rope_parameters` of the file.
        interleaved: rows of q and k are in the order of interleaved rotary pairs, and must be reordered into halves.
        qk_norm: q and k have norms per head. post_norms: there are norms after attention and MLP too.
        unit_offset: the file has whole norm weights, but checkpoints have them minus one.
        biases: the attention projections that have a bias. optional_biases: the biases may be missing.
        frequencies: the rotation is divided by rope_freqs.weight, if the file has it.
        keys: keys below "<architecture>." that are known in addition to those of all architectures.
    """

    hf_class: str
    model_type: str
    details: Details = _gated_silu
    interleaved: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    unit_offset: bool = False
    biases: tuple[str, ...] = ()
    optional_biases: bool = False
    frequencies: bool = False
    keys: frozenset[str] = frozenset()


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM", "llama", interleaved=True, biases=("q", "k", "v", "output"), optional_biases=True,
        frequencies=True,
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", details=_qwen2, biases=("q", "k", "v")),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", qk_norm=True),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", "gemma2", details=_gemma2, post_norms=True, unit_offset=True,
        keys=frozenset({*_GEMMA2_CAPS, _WINDOW}),
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", "gemma3_text", details=_gemma3, qk_norm=True, post_norms=True, unit_offset=True,
        keys=frozenset({"final_logit_softcapping", _WINDOW, f"{_WINDOW}_pattern", "rope.freq_base_swa"}),
    ),
}  # fmt: skip

# Keys below "<architecture>." that are read, or that no supported architecture uses.
_KNOWN_KEYS = frozenset({
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
})  # fmt: skip
# Keys that would change the model, except at these values; zero and false mean that the feature is not used.
_NONE: tuple[Any, ...] = (0, False)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys((
        "expert_count", "expert_used_count", "expert_shared_count", "expert_group_count", "expert_group_used_count",
        "expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_weights_scale",
        "expert_weights_norm", "expert_gating_func", "leading_dense_block_count", "nextn_predict_layers",
        "interleave_moe_layer_step", "use_parallel_residual", "swin_norm", "attn_logit_softcapping",
        "final_logit_softcapping", "router_logit_softcapping", "n_deepstack_layers", "attention.max_alibi_bias",
        "attention.clamp_kqv", "attention.scale", "attention.sliding_window", "attention.shared_kv_layers",
        "attention.q_lora_rank", "attention.kv_lora_rank", "rope.scaling.alpha",
    ), _NONE),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), (*_NONE, 1)),
    "attention.causal": (True,),
    "pooling_type": (*_NONE, *POOLING),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
}  # fmt: skip
_READ_ELSEWHERE = frozenset({
    "general.architecture", "general.type", "general.alignment", "general.quantization_version", "general.file_type",
    "split.no", "split.count", "split.tensors.count", "tokenizer.chat_template", "tokenizer.huggingface.json",
    "tokenizer.rwkv.world",
    *(f"general.sampling.{name}" for name in ("top_k", "top_p", "min_p", "temp", "penalty_repeat")),
    *(f"tokenizer.ggml.{name}" for name in (
        "model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges", "add_bos_token",
        "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap",
    )),
})  # fmt: skip
_QUANTISATION_VERSION = 2  # of llama.cpp since May 2023; older blocks have another format


def read_architecture(meta: Metadata) -> tuple[str, Architecture]:
    """Name and description of the file's architecture.

    Raises `ModelSourceError` if it is not supported, or if a key changes it in a way that is not supported.
    """
    if meta.get("general.type", "model") != "model":
        raise meta.error(f"it contains a {meta.get('general.type')!r}, not a model")
    name = meta.require("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise meta.error(f"GGUF architecture {name!r} is not supported; valid: {', '.join(sorted(ARCHITECTURES))}")
    parts = meta.get("split.count", 0)  # for a single file, 0 and 1 are both used
    if parts not in (0, 1):
        raise meta.error(f"it is one of {parts} parts; merge them first (llama-gguf-split --merge)")
    version = meta.get("general.quantization_version", _QUANTISATION_VERSION)
    if version != _QUANTISATION_VERSION:
        raise meta.error(f"general.quantization_version {version!r} is not supported; valid: {_QUANTISATION_VERSION}")
    for key, value in meta.values.items():
        prefix, _, rest = key.partition(".")
        if prefix == name and not _harmless(name, rest, value):
            raise meta.error(f"key {key} = {value!r:.200} changes the model in a way that is not supported")
    return name, ARCHITECTURES[name]


def _harmless(name: str, key: str, value: Any) -> bool:
    if key in _KNOWN_KEYS or key in ARCHITECTURES[name].keys:
        return True
    return not isinstance(value, list | str) and value in _NEUTRAL.get(key, ())


def skipped_keys(meta: Metadata) -> list[str]:
    """Keys that are not read and may be important: sampling defaults, tokenizer settings, keys of other programs.

    Descriptions ("general.name", ...) and keys that no model here uses are left out.
    """
    name = meta.get("general.architecture")
    return [
        key
        for key, value in meta.values.items()
        if key not in _READ_ELSEWHERE
        and not key.startswith(f"{name}.")
        and not (key.startswith("general.") and not key.startswith("general.sampling."))
        and not _unused_id(meta, key, value)
    ]


def _unused_id(meta: Metadata, key: str, value: Any) -> bool:
    """Whether the key is a token id in the vocabulary: one that is read, or one of a role that is not used here."""
    if not (key.startswith("tokenizer.ggml.") and key.endswith("_token_id")):
        return False
    return isinstance(value, int) and 0 <= value < len(meta.strings("tokenizer.ggml.tokens"))
