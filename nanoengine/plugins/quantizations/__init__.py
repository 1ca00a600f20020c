"""The built-in quantisations. This module imports no torch: classes are named by target."""

from __future__ import annotations

from nanoengine.api import API_VERSION, QuantizationSpec, hookimpl


@hookimpl
def register_quantizations() -> list[QuantizationSpec]:
    here = "nanoengine.plugins.quantizations"
    return [
        QuantizationSpec(
            name="fp8",
            target=f"{here}.fp8:Fp8",
            help="FP8 weights (e4m3): files of fp8 and fbgemm_fp8, or made while loading.",
            api=API_VERSION,
            formats=("fp8", "fbgemm_fp8"),
            online=True,
        ),
        QuantizationSpec(
            name="int8",
            target=f"{here}.int8:Int8",
            help="INT8 weights made while loading.",
            api=API_VERSION,
            online=True,
        ),
        QuantizationSpec(
            name="awq",
            target=f"{here}.awq:Awq",
            help="INT4 weights of AWQ checkpoints.",
            api=API_VERSION,
            formats=("awq",),
        ),
        QuantizationSpec(
            name="gptq",
            target=f"{here}.gptq:Gptq",
            help="INT4 weights of GPTQ checkpoints, with act-order too.",
            api=API_VERSION,
            formats=("gptq",),
        ),
        QuantizationSpec(
            name="compressed-tensors",
            target=f"{here}.compressed_tensors:CompressedTensors",
            help="FP8, INT8 and packed INT4 weights of llm-compressor.",
            api=API_VERSION,
            formats=("compressed-tensors",),
        ),
        QuantizationSpec(
            name="gguf",
            target=f"{here}.gguf:Gguf",
            help="Blocks of GGUF files, kept as they are: Q4_0 to Q8_0, Q4_K to Q6_K.",
            api=API_VERSION,
            formats=("gguf",),
        ),
    ]
