"""How tensors of a checkpoint become parameters: rules that are read from the checkpoint's names to the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class WeightRule:
    """Where tensors whose names fit a pattern go, and what is done to them on the way.

    The steps are in this order: `transpose`, the cut into `parts` (with `groups` or `interleaved`), `permute`, `scale`.
    A rank reads its own slice of the tensor only, widened to what the steps need.

    Attributes:
        to: what takes the pattern's place in the name. `{}` in it are the pattern's numbers, in order. One number more
            in the pattern is an index: the tensor is one of those that the parameter stacks along its first dimension
            (an expert).
        parts: the part of a fused parameter that the tensor fills, or the parts, where it holds several, in its own
            order. (): all of the parameter.
        transpose: the tensor is [in, out]: its last two dimensions are exchanged. A bias has one, and stays.
        groups: the tensor is so many equal pieces along its outputs, and each holds a share of every part (heads of q,
            k and v in turn). 1: the parts lie one behind the other.
        interleaved: the parts take turns, with one output each; they are equally large, and `groups` is 1.
        permute: order of the outputs, in groups of so many: output i of each is the tensor's output `permute[i]`.
        scale: factor of the values.
    """

    to: str
    parts: str | tuple[str, ...] = ()
    transpose: bool = False
    groups: int = 1
    interleaved: bool = False
    permute: tuple[int, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class WeightMap:
    """How checkpoint names become parameters. Names that no rule touches are taken as they are.

    A name is taken through `rename`, then through the rule of `fuse` and `rules` whose pattern is longest. A tensor
    with the name of a fused parameter and no rule holds its parts in their order.

    Attributes:
        fuse: module name in the checkpoint -> (fused module's name, part), e.g. {"q_proj": ("qkv_proj", "q")}:
            "model.layers.0.self_attn.q_proj.weight" fills part "q" of "model.layers.0.self_attn.qkv_proj.weight".
        rename: prefixes, old -> new: the longest that a checkpoint name begins with is replaced, before the rules. An
            empty old prefix is a prefix that files may lack: {"": "model.", "model.": "model."}.
        skip: name suffixes to skip, e.g. (".rotary_emb.inv_freq",); as in the file, like `skip_prefixes`.
        ties: parameter -> parameter that it is read from instead, e.g.
            {"lm_head.weight": "model.embed_tokens.weight"}; where the checkpoint has both, and they differ, there is no
            tie.
        skip_prefixes: name prefixes to skip, e.g. ("vision_tower.",): parts of a checkpoint that are not supported.
        rules: pattern -> `WeightRule`, or the new name where that is all. A pattern is the end of a tensor's name or of
            its module's, in whole words between dots; `{}` is any number: {"mlp.c_fc": "mlp.up_proj",
            "experts.{}.w1": WeightRule("experts", "gate")}.
    """

    fuse: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    skip_prefixes: tuple[str, ...] = ()
    rules: Mapping[str, WeightRule | str] = field(default_factory=dict)
