"""Latent attention as a trait of any decoder: a dense family that is no built-in one, and traits that do not fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nanoengine.api import ModelError
from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields
from nanoengine.layers.latent import LatentSizes, read_latent
from nanoengine.layers.rope import RopeConfig, read_rope
from nanoengine.testing import randomise
from nanoengine.testing.conformance import check_model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 300,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
}


class MiniCPM3(DecoderLM):
    """As a plugin would write it: halves are rotated, and factors scale embedding, residual stream and logits."""

    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="minicpm3")
        hidden, root = fields.int("hidden_size"), math.sqrt(fields.int("num_hidden_layers"))
        latent = read_latent(fields, value=hidden // fields.int("num_attention_heads"))
        return read_decoder(
            fields,
            latent=latent,
            rope=read_rope(fields, width=latent.rotated),
            attention_bias=fields.bool("attention_bias"),
            output_bias=fields.bool("attention_bias"),
            mlp_bias=fields.bool("mlp_bias"),
            embedding_scale=fields.float("scale_emb"),
            residual_scale=fields.float("scale_depth", root) / root,
            logit_scale=fields.int("dim_model_base", hidden) / hidden,
        )


def test_a_dense_family_has_it_by_a_trait(tmp_path: Path) -> None:
    config = AutoConfig.for_model("minicpm3", **SIZES, dim_model_base=24, attention_bias=True)
    model = randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), seed=0)
    model.save_pretrained(tmp_path)
    check_model(MiniCPM3, tmp_path, model)


def test_the_width_of_a_value_may_be_missing() -> None:
    fields = Fields(SIZES)
    assert read_latent(fields, value=12).value == 12
    assert read_latent(Fields({**SIZES, "v_head_dim": 9}), value=12).value == 9
    with pytest.raises(ModelError, match="lacks v_head_dim"):
        read_latent(fields)


LATENT = LatentSizes(query_rank=None, kv_rank=8, plain=10, rotated=6, value=12)
CONFIG = DecoderConfig(
    vocab_size=97, hidden_size=48, max_model_len=64, num_layers=1, intermediate_size=56, num_heads=4, num_kv_heads=4,
    head_size=16, eps=1e-6, rope=RopeConfig(theta=100.0, width=6), latent=LATENT,
)  # fmt: skip


@pytest.mark.parametrize(
    ("traits", "words"),
    [
        ({"num_kv_heads": 2}, "a key and a value for each of 4 heads, not 2"),
        ({"head_size": 12}, "head_size 12 is not that of `latent`, 16"),
        ({"rope": RopeConfig(theta=100.0)}, r"the rotation has the width 0; .* read_rope takes width=6"),
        ({"sinks": True}, "no sinks and no norms of heads"),
        ({"qk_norm": True}, "no sinks and no norms of heads"),
    ],
)
def test_traits_that_it_does_not_have_are_refused(traits: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        replace(CONFIG, **traits)


def test_scores_are_scaled_by_yarns_magnitude() -> None:
    """As transformers' `yarn_apply_mscale`, for each family with latent attention."""
    yarn = RopeConfig(theta=100.0, kind="yarn", width=6, factor=40.0, original_max_position=64, mscale_all_dim=0.707)
    assert yarn.score_factor == pytest.approx((0.1 * 0.707 * math.log(40.0) + 1.0) ** 2)
    assert replace(yarn, mscale_all_dim=0.0).score_factor == 1.0
    assert RopeConfig(theta=100.0).score_factor == 1.0
