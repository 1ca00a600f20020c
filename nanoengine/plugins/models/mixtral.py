"""Mixtral 8x7B and 8x22B: Mistral with experts in every layer."""

from __future__ import annotations

from nanoengine.layers.decoder import read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields, same_windows
from nanoengine.layers.moe import MoEConfig, MoEDecoderLM, Routing, moe_weights, read_experts_info
from nanoengine.plugins.models import mistral

# The defaults of transformers' MixtralConfig for fields that are missing in the file.
DEFAULTS = {
    **mistral.DEFAULTS,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}


class Mixtral(MoEDecoderLM):
    weights = moe_weights(block="block_sparse_moe", gate="w1", up="w3", down="w2")

    @classmethod
    def read_config(cls, hf: ConfigJSON) -> MoEConfig:
        fields = Fields(hf, model_type="mixtral", defaults=DEFAULTS)
        fields.unused("router_jitter_noise")  # of training
        return read_decoder(
            fields,
            into=MoEConfig,
            windows=same_windows(fields),
            experts=read_experts_info(fields, fields.int("intermediate_size")),
            routing=Routing(top_k=fields.int("num_experts_per_tok"), scoring="softmax_of_top"),
        )
