"""The text model of Gemma 3. Five of six layers are local and have their own rotation; queries and keys are normalised.

In a checkpoint with images, the fields and weights of the text model are nested. The other weights are skipped.
"""

from __future__ import annotations

from dataclasses import replace

from nanoengine.layers.decoder import DECODER_WEIGHTS, DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields, layer_windows
from nanoengine.layers.rope import RopeConfig
from nanoengine.layers.rope_config import check_agreement, rope_of
from nanoengine.plugins.models.gemma2 import FAMILY_DEFAULTS, family_traits

# The defaults of transformers' Gemma3TextConfig for fields that are missing in the file, as in files with images.
DEFAULTS = {**FAMILY_DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072}
_THETA, _LOCAL_THETA = 1e6, 1e4
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.")  # below "model." in files of transformers 5
_PATTERN = 6  # every sixth layer is global
_OF_IMAGES = ("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index",
              "boi_token_id", "eoi_token_id", "image_token_id")  # fmt: skip


class Gemma3(DecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        return read_text_config(Fields(hf, defaults=DEFAULTS))


class Gemma3WithImages(DecoderLM):
    """The text model of a checkpoint with images. Images are not supported."""

    weights = replace(
        DECODER_WEIGHTS,
        skip_prefixes=tuple(f"{above}{part}" for above in ("", "model.") for part in _OTHER_PARTS),
    )

    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        whole = Fields(hf, model_type="gemma3", defaults={"tie_word_embeddings": True})
        whole.unused(*_OF_IMAGES)
        text = whole.nested("text_config", DEFAULTS)
        text.refuse("final_logit_softcapping")  # transformers ignores it in this class
        text.unused("tie_word_embeddings")  # the outer field counts; without it, transformers ties
        return read_text_config(text, tied=whole.bool("tie_word_embeddings"))


def read_text_config(fields: Fields, tied: bool | None = None) -> DecoderConfig:
    fields.refuse("model_type", "gemma3_text")
    fields.refuse("attn_logit_softcapping")  # it is null in every checkpoint, and transformers ignores it
    pattern = fields.int("sliding_window_pattern", _PATTERN)
    fields.unused("_sliding_window_pattern")  # transformers writes it with layer_types, but does not read it
    windows = layer_windows(
        fields, fields.int("num_hidden_layers"), fields.int("sliding_window"), lambda layer: (layer + 1) % pattern != 0
    )
    traits = family_traits(fields)
    traits["qk_norm"], traits["windows"] = True, windows
    traits["rope"], traits["local_rope"] = _ropes(fields)
    if tied is not None:
        traits["tied"] = tied
    return read_decoder(fields, **traits)


def _ropes(fields: Fields) -> tuple[RopeConfig, RopeConfig]:
    """The rotations of global and of local layers.

    Each has its own parameters (transformers 5), or there are two thetas and one scaling. A scaling in addition to the
    parameters is that of the global layers.
    """
    kinds, scaling = fields.nested("rope_parameters"), fields.nested("rope_scaling")
    for name in kinds.data:
        if name not in ("full_attention", "sliding_attention"):
            raise kinds.wrong(name, kinds.data[name], "left out: valid keys are full_attention and sliding_attention")
    full, local = kinds.nested("full_attention"), kinds.nested("sliding_attention")
    if not fields.has("rope_parameters") and scaling.get("rope_type") is None and scaling.get("type") != "default":
        # then transformers' object has rope_type default, and transformers does not read the older name
        scaling.refuse("type")
    both = {**full.data, **scaling.data}
    used = Fields(both, scaling.prefix if scaling.data else full.prefix)
    rope = rope_of(used, fields, "rope_theta", _THETA)
    check_agreement(full, scaling, both, rope.kind)
    fields.unused("original_max_position_embeddings")  # it is not read if there are the objects
    return (
        rope,
        rope_of(local, fields, "rope_local_base_freq", _LOCAL_THETA),
    )
