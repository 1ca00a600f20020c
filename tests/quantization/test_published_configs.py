"""`quantization_config` as the programs write it that quantise models: each is read, with its many other keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanoengine.api import LayerInfo, Quantization, QuantizationContext
from nanoengine.plugins.quantizations.awq import Awq
from nanoengine.plugins.quantizations.compressed_tensors import CompressedTensors
from nanoengine.plugins.quantizations.fp8 import Fp8
from nanoengine.plugins.quantizations.gptq import Gptq

_ARGS = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": None,
    "num_bits": 8,
    "observer": "minmax",
    "observer_kwargs": {},
    "strategy": "channel",
    "symmetric": True,
    "type": "float",
}
_INT4 = {**_ARGS, "num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
_TOKEN = {**_ARGS, "dynamic": True, "strategy": "token", "observer": None}
_GPTQ = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "true_sequential": True}
_GPTQMODEL = {
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "lm_head": False,
    "pack_dtype": "int32",
    "sym": True,
    "meta": {"quantizer": ["gptqmodel:5.7.0"], "uri": "", "mse": 0.0, "act_group_aware": True},
}
_AUTOROUND = {
    "bits": 4,
    "data_type": "int",
    "group_size": 128,
    "sym": True,
    "batch_size": 4,
    "iters": 1000,
    "low_gpu_mem_usage": True,
    "nsamples": 512,
    "autoround_version": "0.9.0",
    "provider": "auto-round",
    "static_kv_granularity": "tensor",
    "static_attention_granularity": "tensor",
}


def _compressed(weights: dict[str, Any], inputs: Any, form: str, **more: Any) -> dict[str, Any]:
    group = {"input_activations": inputs, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        **more,
    }


CONFIGS: dict[str, tuple[type[Quantization], dict[str, Any], str]] = {
    "fine-grained": (
        Fp8,
        {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
        "fp8 block",
    ),
    "fine-grained, dtype of torch": (
        Fp8,
        {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
        "fp8 block",
    ),
    "transformers, static": (
        Fp8,
        {
            "activation_scheme": "static",
            "dequantize": False,
            "weight_block_size": None,
            "modules_to_not_convert": ["model.vision_tower", "lm_head"],
        },
        "fp8 tensor, static",
    ),
    "AutoFP8": (
        Fp8,
        {"activation_scheme": "static", "ignored_layers": ["lm_head"], "kv_cache_scheme": "static"},
        "fp8 tensor, static",
    ),
    "AutoAWQ": (
        Awq,
        {
            "backend": "autoawq",
            "bits": 4,
            "do_fuse": False,
            "exllama_config": None,
            "fuse_max_seq_len": None,
            "group_size": 128,
            "modules_to_not_convert": None,
            "version": "gemm",
            "zero_point": True,
        },
        "int4",
    ),
    "GPTQModel, AWQ": (
        Awq,
        {**_GPTQMODEL, "zero_point": False, "version": "gemm", "format": "gemm", "checkpoint_format": "gemm"},
        "int4",
    ),
    "AutoRound, AWQ": (
        Awq,
        {
            **_AUTOROUND,
            "zero_point": False,
            "version": "gemm",
            "to_quant_block_names": "model.layers",
            "modules_to_not_convert": ["lm_head"],
        },
        "int4",
    ),
    "optimum, GPTQ": (
        Gptq,
        {
            **_GPTQ,
            "batch_size": 1,
            "block_name_to_quantize": "model.layers",
            "cache_block_outputs": True,
            "damp_percent": 0.01,
            "dataset": None,
            "exllama_config": {"version": 1},
            "max_input_length": None,
            "module_name_preceding_first_block": ["model.embed_tokens"],
            "pad_token_id": None,
            "use_cuda_fp16": False,
            "modules_in_block_to_quantize": [["self_attn.k_proj"], ["self_attn.o_proj"]],
            "use_exllama": True,
        },
        "int4",
    ),
    "GPTQModel, GPTQ": (Gptq, {**_GPTQMODEL, "format": "gptq", "checkpoint_format": "gptq", "dynamic": {}}, "int4"),
    "AutoRound, GPTQ": (
        Gptq,
        {**_AUTOROUND, **_GPTQ, "block_name_to_quantize": "model.layers", "lm_head": False},
        "int4",
    ),
    "llm-compressor, W4A16": (
        CompressedTensors,
        _compressed(
            {**_INT4, "actorder": "weight", "scale_dtype": None, "zp_dtype": None},
            None,
            "pack-quantized",
            sparsity_config={"format": "dense", "global_sparsity": 0.13},
            transform_config={},
            version="0.12.2",
        ),
        "int4",
    ),
    "llm-compressor, AWQ": (
        CompressedTensors,
        _compressed({**_INT4, "symmetric": False, "zp_dtype": "torch.int8"}, None, "pack-quantized"),
        "int4",
    ),
    "llm-compressor, FP8": (
        CompressedTensors,
        _compressed(_ARGS, _TOKEN, "float-quantized", kv_cache_scheme={**_ARGS, "strategy": "tensor"}),
        "fp8 channel, dynamic",
    ),
    "llm-compressor, W8A8": (
        CompressedTensors,
        _compressed({**_ARGS, "type": "int"}, {**_TOKEN, "type": "int"}, "int-quantized"),
        "int8 channel",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_read(name: str) -> None:
    reader, config, label = CONFIGS[name]
    ctx = QuantizationContext(
        config={"quant_method": "fp8", **config}, name="", dtype=torch.bfloat16, device="cpu", tp_size=1
    )
    made = reader.read(ctx)
    layer = LayerInfo(name="model.layers.0.self_attn.o_proj", kind="linear", shape=(256, 256))
    method = made.method(layer)
    assert method is not None
    assert method.label.startswith(label)
    assert made.method(LayerInfo(name="lm_head", kind="head", shape=(256, 256))) is None
