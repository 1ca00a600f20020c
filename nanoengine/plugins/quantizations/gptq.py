"""Checkpoints of `quant_method` "gptq" (AutoGPTQ, GPTQModel): weights of four bits, packed along inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from nanoengine.api import (
    ExpertsMethod,
    LayerInfo,
    LinearMethod,
    ModelError,
    Quantization,
    QuantizationContext,
    is_ignored,
)
from nanoengine.kernels.matmul import Ahead
from nanoengine.plugins.quantizations.int4 import Int4
from nanoengine.plugins.quantizations.int4_config import Int4Config, refused_experts
from nanoengine.plugins.quantizations.int4_layouts import GPTQ, GPTQ_V1, Int4Format

_FORMATS: Mapping[str, Int4Format] = {"gptq": GPTQ_V1, "gptq_v2": GPTQ}


@dataclass(frozen=True, slots=True)
class _Scheme:
    group: int
    act_order: bool


class Gptq(Quantization):
    """A group size and act-order for all linear layers, others where GPTQModel's `dynamic` says so.

    Args:
        dynamic: regular expression for the beginning of a module's name -> its scheme; None: it is plain. The first
            that fits counts.
        only: ends of names; other modules are plain. (): none are.
    """

    def __init__(
        self,
        format_: Int4Format,
        scheme: _Scheme,
        *,
        head: bool = False,
        dynamic: Mapping[re.Pattern[str], _Scheme | None] = {},
        only: tuple[str, ...] = (),
        plain: tuple[str, ...] = (),
    ) -> None:
        self._format, self._scheme, self._head = format_, scheme, head
        self._dynamic, self._only, self._plain = dict(dynamic), only, plain
        self._ahead = Ahead()

    @classmethod
    def read(cls, ctx: QuantizationContext) -> Self:
        config = Int4Config(ctx.config, "quantization_config")
        config.choice("bits", 4)
        format_ = config.choice("checkpoint_format", *_FORMATS, also=("format",), default="gptq")
        config.choice("is_marlin_format", False, default=False)
        config.choice("pack_dtype", "int32", default="int32")
        scheme = _Scheme(config.inputs("group_size"), _act_order(config))
        read = cls(
            _FORMATS[format_],
            scheme,
            head=config.flag("lm_head", default=False),
            dynamic=_dynamic(config, scheme),
            only=tuple(config.lists("modules_in_block_to_quantize")),
            plain=tuple(config.patterns("modules_to_not_convert")),
        )
        config.finish()
        return read

    def method(self, layer: LayerInfo) -> LinearMethod | ExpertsMethod | None:
        if layer.kind == "embedding" or (layer.kind == "head" and not self._head):
            return None
        if is_ignored(layer, self._is_left_out) or self._is_unlisted(layer):
            return None
        if layer.kind == "experts":
            raise refused_experts(layer, "gptq")
        schemes = {name: self._rule(name) for name in layer.sources or (layer.name,)}
        if not any(schemes.values()):  # where the file has one tensor, it has this name
            schemes = {layer.name: self._rule(layer.name)}
        first, *others = dict.fromkeys(scheme or self._scheme for scheme in schemes.values())
        if others:
            shown = ", ".join(f"{name} {scheme or self._scheme}" for name, scheme in schemes.items())
            raise ModelError(f"{layer.name}: its fused parts are quantised in different ways ({shown}): not supported")
        return Int4(self._format, first.group, act_order=first.act_order, ahead=self._ahead)

    def _rule(self, module: str) -> _Scheme | None:
        """What `dynamic` says of a module that is quantised."""
        return next((scheme for pattern, scheme in self._dynamic.items() if pattern.match(module)), None)

    def _is_left_out(self, module: str) -> bool:
        for pattern, scheme in self._dynamic.items():
            if pattern.match(module):
                return scheme is None
        return any(each in module for each in self._plain)

    def _is_unlisted(self, layer: LayerInfo) -> bool:
        """Whether there is a list of what is quantised that has neither the layer nor its parts."""
        if not self._only or layer.kind != "linear" or layer.name.endswith(self._only):
            return False
        return is_ignored(layer, lambda module: module in layer.sources and not module.endswith(self._only))


def _act_order(config: Int4Config) -> bool:
    """Whether inputs of a group may be anywhere. With `static_groups` they are neighbours."""
    desc_act, static = config.flag("desc_act", default=False), config.flag("static_groups", default=False)
    return desc_act and not static


def _dynamic(config: Int4Config, scheme: _Scheme) -> dict[re.Pattern[str], _Scheme | None]:
    found = dict[re.Pattern[str], _Scheme | None]()
    for key, inner in config.sections("dynamic"):
        pattern = config.pattern("dynamic", key.removeprefix("-:").removeprefix("+:"))
        if key.startswith("-:"):
            found[pattern] = None
            continue
        inner.choice("bits", 4, default=4)
        order = scheme.act_order if inner.get("desc_act") is None else _act_order(inner)
        found[pattern] = replace(scheme, group=inner.inputs("group_size", default=scheme.group), act_order=order)
        inner.finish()
    return found
