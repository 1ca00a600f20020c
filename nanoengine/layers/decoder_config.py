"""The configuration of `DecoderLM`, and how families read it from config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from nanoengine.api import ModelConfig, ModelError
from nanoengine.api.errors import nearest
from nanoengine.layers.hf_config import Fields, layer_windows
from nanoengine.layers.latent import LatentSizes
from nanoengine.layers.mlp import PlainActivation
from nanoengine.layers.rope import Rope, RopeConfig, read_rope

__all__ = [
    "ACTIVATIONS",
    "PLAIN_ACTIVATIONS",
    "POST_NORMS",
    "PRE_NORMS",
    "SANDWICH_NORMS",
    "DecoderConfig",
    "DecoderTraits",
    "NormNames",
    "read_decoder",
]


NormKind = Literal["rms", "layer"]
QKNormKind = Literal["head", "each_head", "all_heads"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormNames:
    """Which norms a layer has, by their names in it (those of the checkpoint); None: there is none."""

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None


PRE_NORMS = NormNames(before_attention="input_layernorm", before_mlp="post_attention_layernorm")
"""Llama's."""
SANDWICH_NORMS = NormNames(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
"""Gemma 2's and 3's."""
POST_NORMS = NormNames(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm")
"""OLMo 2's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """Sizes and options of a decoder. A family with more of its own subclasses it.

    Attributes:
        num_layers, intermediate_size, num_heads, num_kv_heads, head_size, eps: as usual.
        rope: the rotation of queries and keys; None: there is none.
        tied: the output layer shares the embedding's weight.
        attention_bias: a bias on q, k and v. output_bias: on o. mlp_bias: on gate, up and down. head_bias: on the
            output layer.
        qk_norm: q and k are normalised before the rotation.
        qk_norm_over: "head": each head, all by the same weights. "each_head": each by its own, a `LayerNorm` without
            bias. "all_heads": all heads together, by `SharedRMSNorm`.
        rotated: for each layer whether q and k are rotated; (): all layers rotate them.
        windows: each layer's attention window; None: the layer attends to all positions. (): no layer has a window.
        local_rope: rotation in layers with a window, if it differs from `rope`.
        score_scale: factor of the attention scores; None: head_size ** -0.5.
        score_cap, logit_cap: soft caps on attention scores and on the logits.
        sinks: each head has a score that takes part in the softmax and has no value (`AttentionSinks`).
        latent: widths of latent attention (`LatentAttention`), which takes the place of `DecoderAttention`.
        logit_scale: factor of the logits, before their cap.
        embedding_scale: factor of the embedded tokens; it is rounded to the model's dtype first.
        residual_scale: factor of what attention and MLP add to the residual stream.
        activation: the activation of the MLP, of its gate if it has one.
        gated: the MLP has a gate (`GatedMLP`); else it is `MLP`.
        norm: "rms", `RMSNorm`, or "layer", `LayerNorm`. norm_bias: the latter has a bias.
        unit_offset: checkpoints store norm weights minus one; with "rms".
        norms: which norms a layer has.
        parallel: attention and MLP read the same stream, and are added together; the MLP by the norm `before_attention`
            too, unless there is one `before_mlp`.
    """

    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    eps: float
    rope: RopeConfig | Rope | None
    tied: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    qk_norm_over: QKNormKind = "head"
    rotated: tuple[bool, ...] = ()
    windows: tuple[int | None, ...] = ()
    local_rope: RopeConfig | Rope | None = None
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    sinks: bool = False
    latent: LatentSizes | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    activation: PlainActivation = "silu"
    gated: bool = True
    norm: NormKind = "rms"
    norm_bias: bool = False
    unit_offset: bool = False
    norms: NormNames = PRE_NORMS
    parallel: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_heads} attention heads cannot be divided equally over {self.num_kv_heads} KV heads "
                "(num_attention_heads, num_key_value_heads)"
            )
        if self.latent is not None:
            self._check_latent(self.latent)
        if self.gated and self.activation not in ACTIVATIONS.values():
            raise ModelError(f"activation {self.activation} is of MLPs without a gate; set gated=False")
        if self.windows and len(self.windows) != self.num_layers:
            raise ModelError(f"{len(self.windows)} attention windows for {self.num_layers} layers")
        if self.rotated and len(self.rotated) != self.num_layers:
            raise ModelError(f"rotated says it of {len(self.rotated)} layers; there are {self.num_layers}")

    def _check_latent(self, latent: LatentSizes) -> None:
        if self.num_heads != self.num_kv_heads:
            raise ModelError(
                f"latent attention has a key and a value for each of {self.num_heads} heads, not {self.num_kv_heads} "
                "(num_attention_heads, num_key_value_heads)"
            )
        if self.head_size != latent.head_size:
            raise ModelError(f"head_size {self.head_size} is not that of `latent`, {latent.head_size}: leave it out")
        for rope in (self.rope, self.local_rope):
            if rope is not None and rope.width != latent.rotated:
                raise ModelError(
                    f"the rotation has the width {rope.width}; with these sizes of latent attention read_rope takes "
                    f"width={latent.rotated} (LatentSizes.rotated)"
                )
        if self.sinks or self.qk_norm:
            raise ModelError("LatentAttention has no sinks and no norms of heads; override make_attention")


class DecoderTraits(TypedDict, total=False):
    """The attributes of `DecoderConfig`, for type checkers: what `read_decoder` accepts."""

    vocab_size: int
    hidden_size: int
    max_model_len: int
    default_max_model_len: int | None
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    eps: float
    rope: RopeConfig | Rope | None
    tied: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_bias: bool
    qk_norm: bool
    qk_norm_over: QKNormKind
    rotated: tuple[bool, ...]
    windows: tuple[int | None, ...]
    local_rope: RopeConfig | Rope | None
    score_scale: float | None
    score_cap: float | None
    logit_cap: float | None
    sinks: bool
    latent: LatentSizes | None
    logit_scale: float
    embedding_scale: float
    residual_scale: float
    activation: PlainActivation
    gated: bool
    norm: NormKind
    norm_bias: bool
    unit_offset: bool
    norms: NormNames
    parallel: bool


ACTIVATIONS: Mapping[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Value of `hidden_act` -> name of the activation here, of gates too."""
PLAIN_ACTIVATIONS: Mapping[str, PlainActivation] = {**ACTIVATIONS, "gelu": "gelu", "relu": "relu"}
"""The same of MLPs without a gate."""

_LARGEST_MODEL = 2**44  # parameters
C = TypeVar("C", bound=DecoderConfig)


@overload
def read_decoder(fields: Fields, **traits: Unpack[DecoderTraits]) -> DecoderConfig: ...
@overload
def read_decoder(fields: Fields, into: type[C], **traits: Any) -> C: ...
def read_decoder(fields: Fields, into: type[Any] = DecoderConfig, **traits: Any) -> Any:
    """Reads a `DecoderConfig` from the fields of config.json that all families share.

    Args:
        fields: config.json, with the family's defaults.
        into: the family's own config, a subclass.
        traits: attributes that the family sets itself, instead of reading them here.

    Raises `ModelError` that names the field, or a trait that `into` does not have.
    """
    known = {field.name for field in dataclasses.fields(into)}
    for name in traits.keys() - known:
        raise ModelError(f"{into.__name__} has no {name!r}; {nearest(name, known)}")
    found: dict[str, Any] = dict(traits)

    def read(name: str, how: Any, *args: Any) -> Any:
        return found[name] if name in found else found.setdefault(name, how(*args))

    if (latent := found.get("latent")) is not None:
        found.setdefault("head_size", latent.head_size)
    hidden, heads = read("hidden_size", fields.int, "hidden_size"), read("num_heads", fields.int, "num_attention_heads")
    if "head_size" not in found and not fields.has("head_dim") and hidden % heads:
        raise fields.wrong("hidden_size", hidden, f"a multiple of {fields.own_name('num_attention_heads')} {heads}")
    read("vocab_size", fields.int, "vocab_size")
    layers = read("num_layers", fields.int, "num_hidden_layers")
    read("intermediate_size", fields.int, "intermediate_size")
    read("num_kv_heads", fields.int, "num_key_value_heads", heads)
    read("head_size", fields.int, "head_dim", hidden // heads)
    read("eps", fields.float, "rms_norm_eps")
    read("tied", fields.bool, "tie_word_embeddings")
    if "activation" not in found:
        known_here = ACTIVATIONS if found.get("gated", True) else PLAIN_ACTIVATIONS
        found["activation"] = known_here[fields.choice("hidden_act", tuple(known_here))]
    if "windows" not in found:
        _refuse_windows(fields, layers)
    read("rope", read_rope, fields)
    if "max_model_len" not in found:
        found |= _lengths(fields, found["rope"])
    config = into(**found)
    check_decoder(config)
    return config


def _lengths(fields: Fields, rope: RopeConfig | Rope | None) -> dict[str, int]:
    """How many positions the model supports, with the scaling of its rotation."""
    longest = fields.int("max_position_embeddings")
    if not isinstance(rope, RopeConfig):
        return {"max_model_len": longest}
    found = {"max_model_len": rope.limit(longest)}
    # scaled by the engine's longest request: unscaled, as transformers' up to here, unless more is asked for
    return found | ({"default_max_model_len": longest} if rope.kind == "dynamic" else {})


def _refuse_windows(fields: Fields, layers: int) -> None:
    """Rejects windows in config.json of a family without them. transformers' cache would apply them nevertheless."""
    if not fields.has("layer_types"):
        fields.refuse("sliding_window")
    layer_windows(fields, layers, None)
    fields.unused("sliding_window")


def check_decoder(config: DecoderConfig) -> None:
    """Raises `ModelError` if values that are valid separately are not together."""
    for rope in (config.rope, config.local_rope):
        if isinstance(rope, RopeConfig):
            rope.rope(config.head_size, config.max_model_len)
    attention = 2 * config.head_size * (config.num_heads + config.num_kv_heads)
    layer = config.hidden_size * (attention + 3 * config.intermediate_size)
    total = config.num_layers * layer + 2 * config.vocab_size * config.hidden_size
    if total > _LARGEST_MODEL:
        raise ModelError(
            f"config.json: hidden_size {config.hidden_size}, intermediate_size {config.intermediate_size}, "
            f"num_hidden_layers {config.num_layers} and the others make {total:.2g} parameters; at most "
            f"{_LARGEST_MODEL:.2g} are possible"
        )
