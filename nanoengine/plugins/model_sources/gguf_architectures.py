"""The GGUF architectures that are served, and what each has that the others have not.

What no key tells is taken as llama.cpp takes it (https://github.com/ggml-org/llama.cpp, src/models): Gemma's attention
scale, by its number of layers; which of its layers are local; the base of their rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanoengine.plugins.model_sources.gguf_metadata import Metadata, Shape

Details = Callable[[Metadata, Shape, Mapping[str, Any]], dict[str, Any]]


def _gated_silu(meta: Metadata, shape: Shape, rope: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu", "rope_parameters": rope}


def _qwen2(meta: Metadata, shape: Shape, rope: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu", "rope_parameters": rope, "use_sliding_window": False}


def _gemma2(meta: Metadata, shape: Shape, rope: Mapping[str, Any]) -> dict[str, Any]:
    local = [layer % 2 == 0 for layer in range(shape.layers)]
    caps = {name: meta.real(f"gemma2.{name}", default) for name, default in _GEMMA2_CAPS.items()}
    window = meta.positive_int("gemma2.attention.sliding_window", 4096)
    return {**_gemma(shape, local, largest=46), **caps, "sliding_window": window, "rope_parameters": rope}


def _gemma3(meta: Metadata, shape: Shape, rope: Mapping[str, Any]) -> dict[str, Any]:
    pattern = meta.positive_int("gemma3.attention.sliding_window_pattern", 6)
    local = [(layer + 1) % pattern != 0 for layer in range(shape.layers)]
    config = {
        **_gemma(shape, local, largest=62),
        "sliding_window": meta.positive_int("gemma3.attention.sliding_window"),
    }
    cap = meta.real("gemma3.final_logit_softcapping", 0.0)
    near = {"rope_type": "default", "rope_theta": meta.real("gemma3.rope.freq_base_swa", 10000.0)}
    ropes = {"full_attention": rope, "sliding_attention": near}
    return {**config, "final_logit_softcapping": cap or None, "rope_parameters": ropes}


_GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def _gemma(shape: Shape, local: list[bool], largest: int) -> dict[str, Any]:
    """`largest`: layers of the family's largest model, whose scale goes by the width instead of the head size."""
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shape.hidden // shape.heads if shape.layers == largest else shape.head_size,
        "layer_types": ["sliding_attention" if each else "full_attention" for each in local],
    }


@dataclass(frozen=True, slots=True)
class Architecture:
    """What differs between the served architectures.

    Attributes:
        hf_class, model_type: their names in config.json.
        details: what else stands there; it is given the `rope_parameters` that the file's keys make.
        interleaved: rows of q and k lie in the order of interleaved rotary pairs, and must be put back into halves.
        qk_norm: q and k have norms per head. post_norms: attention and MLP have norms behind them, too.
        unit_offset: norm weights are stored whole, where checkpoints hold them less one.
        biases: which attention projections have one. optional_biases: there may be none.
        keys: known below "<architecture>.", beyond those of all. theta: base of the rotation where no key tells.
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
    keys: frozenset[str] = frozenset()
    theta: float | None = None


_WINDOW = "attention.sliding_window"

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM", "llama", interleaved=True, biases=("q", "k", "v", "output"), optional_biases=True
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", details=_qwen2, biases=("q", "k", "v")),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", qk_norm=True),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", "gemma2", details=_gemma2, post_norms=True, unit_offset=True, theta=10000.0,
        keys=frozenset({*_GEMMA2_CAPS, _WINDOW}),
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", "gemma3_text", details=_gemma3, qk_norm=True, post_norms=True, unit_offset=True, theta=1e6,
        keys=frozenset({"final_logit_softcapping", _WINDOW, f"{_WINDOW}_pattern", "rope.freq_base_swa"}),
    ),
}  # fmt: skip

# Keys below "<architecture>." that are read, or that change nothing. Any other one (experts, other scalings, ...) would
# be a different model.
_KNOWN_KEYS = frozenset({
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
})  # fmt: skip


def read_architecture(meta: Metadata) -> tuple[str, Architecture]:
    """The file's architecture; raises `ModelSourceError` for one not served, or a key that would change it."""
    name = meta.require("general.architecture")
    if name not in ARCHITECTURES:
        raise meta.error(f"GGUF architecture {name!r} is not served; valid: {', '.join(sorted(ARCHITECTURES))}")
    if meta.get("general.type", "model") != "model":
        raise meta.error(f"it holds a {meta.get('general.type')!r}, not a model")
    parts = meta.get("split.count", 0)  # 0 and 1 are both written for a whole file
    if parts not in (0, 1):
        raise meta.error(f"it is one of {parts} parts; merge them first (llama-gguf-split --merge)")
    known = _KNOWN_KEYS | ARCHITECTURES[name].keys
    for key, value in meta.values.items():
        prefix, _, rest = key.partition(".")
        if prefix == name and rest not in known and value not in (0, False):
            raise meta.error(f"key {key} = {value!r} changes the model in a way that is not served")
    return name, ARCHITECTURES[name]
