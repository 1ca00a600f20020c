"""Checkpoints of `quant_method` "compressed-tensors" (llm-compressor): FP8 and INT8 weights, and packed INT4."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from nanoengine.api import (
    ExpertsMethod,
    LayerInfo,
    LinearMethod,
    ModelError,
    Quantization,
    QuantizationContext,
    is_ignored,
)
from nanoengine.kernels.eight_bit import Inputs
from nanoengine.kernels.matmul import Ahead
from nanoengine.layers.hf_config import shown
from nanoengine.plugins.quantizations.eight_bit import FP8, INT8, EightBitLinear, Scheme
from nanoengine.plugins.quantizations.eight_bit_experts import EightBitExperts
from nanoengine.plugins.quantizations.eight_bit_packed import PackedEightBit
from nanoengine.plugins.quantizations.int4 import Int4
from nanoengine.plugins.quantizations.int4_layouts import PACK_QUANTIZED
from nanoengine.plugins.quantizations.reading import KV_SCALES, Section

_CLASSES = {"linear": "Linear", "head": "Linear", "experts": "Linear", "embedding": "Embedding"}
_CODES = {"float": FP8, "int": INT8}
_FORMATS = {"float": ("float-quantized", "naive-quantized"), "int": ("int-quantized", "naive-quantized")}
_NOTES = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")  # of how the weights were made

MakeMethod = Callable[[], LinearMethod]


@dataclass(frozen=True, slots=True)
class Group:
    """A group of `config_groups`: what its layers are, in words, and what makes the method of one. scheme: of eight
    bits; None: it has fewer."""

    name: str
    label: str
    make: MakeMethod
    scheme: Scheme | None = None


class CompressedTensors(Quantization):
    """Chooses a layer's group by its targets, which are names, "re:" expressions, or the class "Linear"."""

    skip = KV_SCALES

    def __init__(self, groups: Mapping[str, Group], plain: Sequence[str]) -> None:
        self._groups, self._plain = dict(groups), tuple(plain)

    @classmethod
    def read(cls, ctx: QuantizationContext) -> Self:
        section = Section(ctx.config, "quantization_config")
        for key in ("quantization_status", "global_compression_ratio", "version"):
            section.get(key)
        section.kv()
        section.only("moe_sparsity_config")
        for key, harmless in (("sparsity_config", ("dense",)), ("transform_config", ())):
            given = section.get(key, {})
            if given and not (isinstance(given, Mapping) and given.get("format") in harmless):
                raise section.wrong(key, "null")
        form, plain = section.get("format", ""), section.patterns("ignore")
        given = section.get("config_groups")
        section.finish()
        if not isinstance(given, Mapping) or not given:
            raise section.wrong("config_groups", "an object with groups")
        targets = dict[str, Group]()
        for name, each in given.items():
            group = Section(each, f"quantization_config.config_groups.{name}")
            wanted = group.patterns("targets")
            if not wanted:
                raise group.wrong("targets", "a list of names, 're:' expressions or 'Linear'")
            targets |= dict.fromkeys(wanted, _group(group, name, form))
        return cls(targets, plain)

    def method(self, layer: LayerInfo) -> LinearMethod | ExpertsMethod | None:
        kind = _CLASSES[layer.kind]
        if is_ignored(layer, lambda name: any(each == kind or _matches(each, name) for each in self._plain)):
            return None
        names = layer.sources or (layer.name,)
        found = {name: self._group(name) for name in names}
        own = None if any(found.values()) else self._group(layer.name)  # the file has what is fused here as one tensor
        found = {name: each or own or self._groups.get(kind) for name, each in found.items()}
        first = found[names[0]]
        if any(each is not first for each in found.values()):
            said = ", ".join(f"{name}: {each.name if each else 'plain'}" for name, each in found.items())
            raise ModelError(
                f"{layer.name}: its fused parts are of different groups of quantization_config.config_groups ({said}): "
                "that is not supported"
            )
        if first is None:
            return None
        if layer.kind == "experts":
            if first.scheme is None:
                raise ModelError(f"{layer.name}: experts are not supported in this format ({first.label})")
            return EightBitExperts(layer, first.scheme)
        if layer.kind == "embedding":
            raise ModelError(f"{layer.name}: embeddings are not supported in this format ({first.label})")
        return first.make()

    def _group(self, name: str) -> Group | None:
        """By a target that is a name, else by one that is an expression, as in compressed-tensors."""
        ordered = sorted(self._groups, key=lambda target: (target.startswith("re:"), target))
        return next((self._groups[each] for each in ordered if _matches(each, name)), None)


def _matches(target: str, name: str) -> bool:
    name = name.replace("{}", "0")
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name


def _group(section: Section, name: str, form: str) -> Group:
    given, inputs = section.get("weights"), section.get("input_activations")
    section.only("output_activations")
    form = section.get("format", form)
    section.finish()
    if given is None:
        raise section.wrong("weights", "an object: a group without quantised weights is not supported")
    weights = Section(given, f"{section.path}.weights")
    for note in _NOTES:
        weights.get(note)
    kind = weights.one_of("type", tuple(_CODES), "int")
    if form == "pack-quantized":
        return _packed(section, weights, name, inputs)
    weights.only("symmetric", True)
    weights.only("dynamic", False)
    weights.only("actorder", "weight", "static")
    if weights.get("num_bits", 8) != 8:
        raise weights.wrong("num_bits", "8, or 4 in the format pack-quantized")
    if form not in _FORMATS[kind]:
        raise ModelError(
            f"config.json: {section.path}: the format {shown(form)} is not supported for weights of type {kind} with 8 "
            f"bits; supported is {' or '.join(_FORMATS[kind])}"
        )
    scales = _scales(weights)
    weights.finish()
    found = _inputs(inputs, f"{section.path}.input_activations", scales, kind)
    scheme = Scheme(dtype=_CODES[kind], scales=scales, inputs=found)
    return Group(name, str(scheme), lambda: EightBitLinear(scheme), scheme)


def _strategy(section: Section) -> str:
    """The strategy, which older files give by `group_size` alone."""
    size = section.get("group_size")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    return section.one_of("strategy", ("tensor", "channel", "group", "block", "token"), default)


def _scales(section: Section) -> str | tuple[int, int]:
    strategy, block = _strategy(section), section.block("block_structure")
    if strategy == "block":
        if block is None:
            raise section.wrong("block_structure", "[outputs, inputs] of a block")
        return block
    if strategy == "group":
        return 1, section.group("group_size")
    if strategy == "token":
        raise section.wrong("strategy", "'tensor', 'channel', 'group' or 'block' for weights")
    return strategy


def _inputs(given: Any, path: str, scales: str | tuple[int, int], kind: str) -> Inputs:
    if given is None:
        return "plain"
    section = Section(given, path)
    for note in _NOTES:
        section.get(note)
    section.only("symmetric", True)
    section.only("num_bits", 8)
    if section.get("type", "int") != kind:
        raise section.wrong("type", f"{kind!r}, as of the weights")
    section.only("block_structure")
    section.only("actorder")
    dynamic, strategy = section.get("dynamic", False), _strategy(section)
    if strategy == "token" and dynamic is True:
        found: Inputs = "token"
    elif strategy == "group" and dynamic is True:
        columns = scales[1] if isinstance(scales, tuple) else None
        if section.group("group_size") != columns:
            raise section.wrong("group_size", f"that of the weights, {columns}")
        found = "group"
    elif strategy == "tensor" and dynamic is False:
        found = "tensor"
    else:
        raise section.wrong(
            "strategy",
            "'token' or 'group' with dynamic true, 'tensor' with dynamic false (a scale for all tokens of a step would "
            "make a request depend on others)",
        )
    section.finish()
    return found


def _packed(section: Section, weights: Section, name: str, inputs: Any) -> Group:
    """INT4 or INT8, of a layer whose inputs stay as they are."""
    weights.only("type", "int")
    weights.only("num_bits", 4, 8)
    weights.only("dynamic", False)
    weights.only("block_structure")
    if inputs is not None:
        raise section.wrong("input_activations", "null for the format pack-quantized")
    if weights.get("num_bits", 8) == 8:
        return _packed_eight_bit(weights, name)
    order = weights.get("actorder")
    if order not in (None, False, "weight", "static", "group", "dynamic"):
        raise weights.wrong("actorder", "'group', 'weight' or null")
    zeros = not weights.flag("symmetric", default=True)
    strategy = _strategy(weights)
    size = weights.get("group_size")
    if strategy not in ("group", "channel") or (strategy == "group" and (type(size) is not int or size < 1)):
        raise weights.wrong("strategy", "'channel', or 'group' with a group_size, in the format pack-quantized")
    weights.finish()
    ahead = Ahead()

    def make() -> LinearMethod:
        group = size if strategy == "group" else -1
        return Int4(PACK_QUANTIZED, group, zeros=zeros, act_order=order in ("group", "dynamic"), ahead=ahead)

    return Group(name, make().label, make)


def _packed_eight_bit(weights: Section, name: str) -> Group:
    weights.only("symmetric", True)
    weights.only("actorder", "weight", "static")
    scales = _scales(weights)
    weights.finish()
    scheme = Scheme(dtype=INT8, scales=scales, inputs="plain")
    return Group(name, f"{scheme} (pack-quantized)", lambda: PackedEightBit(scheme))
