"""Checkpoints of `quant_method` "awq" (AutoAWQ, GPTQModel): weights of four bits with zeros, packed along outputs."""

from __future__ import annotations

from typing import Self

from nanoengine.api import ExpertsMethod, LayerInfo, LinearMethod, Quantization, QuantizationContext, is_ignored
from nanoengine.kernels.matmul import Ahead
from nanoengine.plugins.quantizations.int4 import Int4
from nanoengine.plugins.quantizations.int4_config import Int4Config, refused_experts
from nanoengine.plugins.quantizations.int4_layouts import AWQ


class Awq(Quantization):
    """One group size for all linear layers but those on the checkpoint's list."""

    def __init__(self, group: int, *, zeros: bool, head: bool, plain: tuple[str, ...]) -> None:
        self._group, self._zeros, self._head, self._plain = group, zeros, head, plain
        self._ahead = Ahead()

    @classmethod
    def read(cls, ctx: QuantizationContext) -> Self:
        config = Int4Config(ctx.config, "quantization_config")
        config.choice("bits", 4, also=("w_bit",))
        config.choice("version", "gemm", also=("format", "checkpoint_format"), default="gemm")
        config.choice("desc_act", False, default=False)
        config.choice("pack_dtype", "int32", default="int32")
        if config.get("backend") == "llm-awq":
            raise config.wrong("backend", "another, whose layout is 'gemm'")
        group = config.inputs("group_size", also=("q_group_size",))
        zeros, head = config.flag("zero_point", default=True), config.flag("lm_head", default=False)
        plain = tuple(config.patterns("modules_to_not_convert"))
        config.finish()
        return cls(group, zeros=zeros, head=head, plain=plain)

    def method(self, layer: LayerInfo) -> LinearMethod | ExpertsMethod | None:
        if layer.kind == "embedding" or (layer.kind == "head" and not self._head):
            return None
        if is_ignored(layer, self._is_plain):
            return None
        if layer.kind == "experts":
            raise refused_experts(layer, "awq")
        return Int4(AWQ, self._group, zeros=self._zeros, ahead=self._ahead)

    def _is_plain(self, module: str) -> bool:
        """As AutoAWQ reads its list: by any part of a module's name."""
        return any(each in module for each in self._plain)
