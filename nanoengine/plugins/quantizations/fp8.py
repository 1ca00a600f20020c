"""FP8 weights (e4m3): files of `quant_method` "fp8" (DeepSeek, transformers, AutoFP8) and "fbgemm_fp8", and plain ones
that are quantised while they are loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from nanoengine.api import ExpertsMethod, LayerInfo, LinearMethod, Quantization, QuantizationContext, is_ignored
from nanoengine.plugins.quantizations.eight_bit import FP8, EightBitLinear, Scheme
from nanoengine.plugins.quantizations.eight_bit_experts import EightBitExperts
from nanoengine.plugins.quantizations.reading import KV_SCALES, Section, online_method


class Fp8(Quantization):
    """One scheme for all linear layers but those on the checkpoint's list; embeddings and output layers stay plain."""

    skip = KV_SCALES

    def __init__(self, scheme: Scheme, plain: Sequence[str] = ()) -> None:
        self._scheme, self._plain = scheme, tuple(plain)

    @classmethod
    def read(cls, ctx: QuantizationContext) -> Self:
        if ctx.online:
            return cls(Scheme(dtype=FP8, scales="channel", inputs="token", online=True))
        return cls(*_READERS[ctx.config["quant_method"]](ctx.config))

    def method(self, layer: LayerInfo) -> LinearMethod | ExpertsMethod | None:
        if self._scheme.online:
            return online_method(layer, self._scheme)
        if layer.kind in ("embedding", "head") or is_ignored(layer, self._is_plain):
            return None
        if layer.kind == "experts":
            return EightBitExperts(layer, self._scheme)
        return EightBitLinear(self._scheme)

    def _is_plain(self, module: str) -> bool:
        return any(matches(pattern, module) for pattern in self._plain)


def matches(pattern: str, module: str) -> bool:
    """As transformers reads `modules_to_not_convert`: the beginning of a name or a regular expression for it, up to a
    dot, or the end of a name."""
    return module.endswith(pattern) or re.match(up_to_a_dot(pattern), module) is not None


def up_to_a_dot(pattern: str) -> str:
    return rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))"


def _fine_grained(config: Mapping[str, Any]) -> tuple[Scheme, Sequence[str]]:
    section = Section(config, "quantization_config")
    section.only("fmt", "e4m3", "float8_e4m3fn")
    section.only("dequantize", False)
    section.only("scale_fmt", "float")
    section.only("expert_dtype", "fp8")
    section.only("modules_to_convert", [])
    section.kv()
    section.get("kv_cache_quant_method")
    plain = [*section.patterns("modules_to_not_convert", up_to_a_dot), *section.patterns("ignored_layers", up_to_a_dot)]
    static = section.one_of("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    block = section.block("weight_block_size")
    section.finish()
    return Scheme(
        dtype=FP8,
        scales=block or "tensor",
        inputs="tensor" if static else "group" if block else "token",
        scale_names=("weight_scale_inv",) if block else ("weight_scale_inv", "weight_scale"),
        input_scale_names=("activation_scale", "input_scale"),
    ), plain


def _fbgemm(config: Mapping[str, Any]) -> tuple[Scheme, Sequence[str]]:
    section = Section(config, "quantization_config")
    bound = section.number("activation_scale_ub", 1200.0)
    plain = section.patterns("modules_to_not_convert", up_to_a_dot)
    section.finish()
    return Scheme(dtype=FP8, scales="channel", inputs="token", bound=bound), plain


_READERS: Mapping[str, Callable[[Mapping[str, Any]], tuple[Scheme, Sequence[str]]]] = {
    "fp8": _fine_grained,
    "fbgemm_fp8": _fbgemm,
}
