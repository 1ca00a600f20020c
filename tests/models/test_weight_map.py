"""Weights are read forwards: each kind of rule, on one rank and several, and what a wrong map is answered with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nanoengine.api import ModelConfig, ModelError, ShardSpec, WeightLayer, WeightMap, WeightRule, WeightsError
from nanoengine.api.parallel import ShapesOnly
from nanoengine.setup.start.build_model import Builder, name_layers
from nanoengine.setup.start.weight_rules import Rules, checkpoint_name
from nanoengine.setup.start.weights import LoadReport, load_weights

WIDTH, HEADS, KV, SIZE = 6, 4, 2, 4
Q, K = HEADS * SIZE, KV * SIZE
PLAIN = WeightMap()
CONFIG = ModelConfig(vocab_size=10, hidden_size=WIDTH, max_model_len=8)
Tensors = Mapping[str, Tensor]


class Experts(WeightLayer):
    """A stack of 4 experts: gate and up joined along the outputs, cut by the outputs, or by whole experts."""

    def __init__(self, ctx: Builder, name: str, *, whole: bool) -> None:
        super().__init__(ctx, name)
        parts = (("gate", 8), ("up", 8))
        cut: dict[str, Any] = {"dim": 0, "join": 1} if whole else {"dim": 1}
        self.add_weight("w13", ShardSpec(shape=(4, 16, WIDTH), parts=parts, split="even", **cut))
        self.add_weight("w2", ShardSpec(shape=(4, WIDTH, 8), split="even", dim=0 if whole else 2, join=1))


class Small(nn.Module):
    """Every way of cutting a parameter."""

    def __init__(self, ctx: Builder, weights: WeightMap) -> None:
        super().__init__()
        self.weights = weights
        self.body = nn.Module()
        parts = [("q", Q), ("k", K), ("v", K)]
        self.body.qkv = ctx.linear("body.qkv", WIDTH, Q + 2 * K, bias=True, parallel="column", parts=parts, head_size=4)
        self.body.out = ctx.linear("body.out", Q, WIDTH, bias=True, parallel="row", head_size=4)
        self.body.two = ctx.linear("body.two", 8, 12, bias=True, parallel="row", parts=[("a", 4), ("b", 8)])
        self.body.experts = Experts(ctx, "body.experts", whole=False)
        self.body.whole = Experts(ctx, "body.whole", whole=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.requires_grad_(False)
        name_layers(self, ctx.layers)

    def weight_map(self, config: ModelConfig) -> WeightMap:
        return self.weights


def built(weights: WeightMap, rank: int = 0, size: int = 1) -> tuple[Small, ShapesOnly]:
    tp = ShapesOnly(size)
    tp.rank = rank  # type: ignore[misc]
    model = Small(Builder(tp, torch.float32, torch.device("cpu"), weights=weights), weights)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model, tp


def load(tensors: Any, weights: WeightMap = PLAIN, rank: int = 0, size: int = 1) -> tuple[Small, LoadReport]:
    model, tp = built(weights, rank, size)
    return model, load_weights(model, CONFIG, tensors, tp)  # type: ignore[arg-type]


def plain() -> dict[str, Tensor]:
    """Tensors by the names of the parameters, none of them alike."""
    model, _ = built(WeightMap())
    random = torch.Generator().manual_seed(3)
    return {name: torch.randn(value.shape, generator=random) for name, value in model.named_parameters()}


def renamed(tensors: Tensors, change: Callable[[str, Tensor], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found |= change(name, tensor)
    return found


def separate(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """q, k and v of their own."""
    if ".qkv." not in name:
        return {name: tensor}
    return {name.replace("qkv", f"{p}_proj"): part for p, part in zip("qkv", tensor.split([Q, K, K]), strict=True)}


def by_expert(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """A tensor an expert and projection."""
    if not name.endswith(("w13", "w2")):
        return {name: tensor}
    above, _, own = name.rpartition(".")
    parts = {"gate_proj": tensor[:, :8], "up_proj": tensor[:, 8:]} if own == "w13" else {"down_proj": tensor}
    return {f"{above}.{e}.{part}.weight": each[e] for part, each in parts.items() for e in range(4)}


def by_head(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """The qkv of each KV head together: its two query heads, its key, its value."""
    if ".qkv." not in name:
        return {name: tensor}
    q, k, v = tensor.split([Q, K, K])
    groups = [each.reshape(KV, -1, *tensor.shape[1:]) for each in (q, k, v)]
    return {name: torch.cat(groups, dim=1).flatten(0, 1)}


def transposed(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    return {name: tensor.T.contiguous()} if tensor.dim() == 2 else {name: tensor}


def experts_transposed(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    return {name: tensor.mT.contiguous()} if tensor.dim() == 3 else {name: tensor}


def gate_and_up_in_turn(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """[E, in, 2 * out]: gate and up are every other column."""
    if not name.endswith("w13"):
        return {name: tensor}
    return {name: torch.stack((tensor[:, :8], tensor[:, 8:]), dim=2).flatten(1, 2).mT.contiguous()}


def interleaved(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """Rows (0, 2, 1, 3) of each head of q and k."""
    if ".qkv." not in name:
        return {name: tensor}
    q, k, v = tensor.split([Q, K, K])
    order = torch.tensor([0, 2, 1, 3])
    q, k = (each.reshape(-1, SIZE, *tensor.shape[1:])[:, order].flatten(0, 1) for each in (q, k))
    return {name.replace("qkv", "q"): q, name.replace("qkv", "k"): k, name.replace("qkv", "v"): v}


def scaled(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    return {name: tensor * 4.0 if ".out." in name else tensor}


TWO = {f"{name}.{part}": WeightRule("body.two", part) for name in ("body", "two") for part in "ab"}
EXPERTS = {
    "{}.gate_proj.weight": WeightRule("w13", "gate"),
    "{}.up_proj.weight": WeightRule("w13", "up"),
    "{}.down_proj.weight": WeightRule("w2"),
}
CASES: dict[str, tuple[Callable[[str, Tensor], Mapping[str, Tensor]], WeightMap]] = {
    "as it is, parts joined": (lambda name, tensor: {name: tensor}, WeightMap()),
    "fuse": (separate, WeightMap(fuse={f"{part}_proj": ("qkv", part) for part in "qkv"})),
    "rules that fuse": (separate, WeightMap(rules={f"{part}_proj": WeightRule("qkv", part) for part in "qkv"})),
    "stack": (by_expert, WeightMap(rules=EXPERTS)),
    "groups": (by_head, WeightMap(rules={"qkv": WeightRule("qkv", ("q", "k", "v"), groups=KV)})),
    "transpose": (
        transposed,
        WeightMap(rules={name: WeightRule(name, transpose=True) for name in ("qkv", "out", "two")}),
    ),
    "transpose in a stack": (
        experts_transposed,
        WeightMap(rules={name: WeightRule(name, transpose=True) for name in ("w13", "w2")}),
    ),
    "groups, transposed, in a stack": (
        gate_and_up_in_turn,
        WeightMap(rules={"w13": WeightRule("w13", ("gate", "up"), transpose=True, groups=8)}),
    ),
    "interleaved, transposed, in a stack": (
        gate_and_up_in_turn,
        WeightMap(rules={"w13": WeightRule("w13", ("gate", "up"), transpose=True, interleaved=True)}),
    ),
    "permute": (
        interleaved,
        WeightMap(
            fuse={"v": ("qkv", "v")}, rules={part: WeightRule("qkv", part, permute=(0, 2, 1, 3)) for part in "qk"}
        ),
    ),
    "scale": (scaled, WeightMap(rules={"out": WeightRule("out", scale=0.25)})),
    "a prefix that is missing": (
        lambda name, tensor: {name.removeprefix("body."): tensor},
        WeightMap(rename={"": "body.", "norm.": "norm."}),
    ),
    "a prefix too many": (
        lambda name, tensor: {f"model.{name}": tensor},
        WeightMap(rename={"model.": ""}),
    ),
    "names by pattern": (
        lambda name, tensor: {name.replace("body.out", "body.attn.c_proj"): tensor},
        WeightMap(rules={"attn.c_proj": "out"}),
    ),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_rule_fills_every_rank_as_plain_names_do(case: str, size: int) -> None:
    change, weights = CASES[case]
    tensors = plain()
    given = renamed(tensors, change)
    assert (
        case == "as it is, parts joined"
        or given.keys() != tensors.keys()
        or any(
            given[name].shape != tensors[name].shape or not torch.equal(given[name], tensors[name]) for name in given
        )
    )
    for rank in range(size):
        want, _ = load(tensors.items(), rank=rank, size=size)
        got, report = load(given.items(), weights, rank, size)
        assert report.num_tensors == len(given)
        for (name, a), b in zip(want.named_parameters(), got.parameters(), strict=True):
            assert not a.isnan().any(), name
            assert torch.allclose(a, b, rtol=0, atol=1e-6 if case == "scale" else 0), name


def test_the_plain_names_give_each_rank_its_own_share() -> None:
    """What the test above compares with: experts by width or by expert, parts of a row layer by its inputs."""
    tensors = plain()
    for rank in range(2):
        model, _ = load(tensors.items(), rank=rank, size=2)
        got = dict(model.named_parameters())
        half = slice(4 * rank, 4 * rank + 4)
        w13 = tensors["body.experts.w13"]
        assert torch.equal(got["body.experts.w13"], torch.cat((w13[:, :8][:, half], w13[:, 8:][:, half]), dim=1))
        assert torch.equal(got["body.experts.w2"], tensors["body.experts.w2"][..., half])
        assert torch.equal(got["body.whole.w13"], tensors["body.whole.w13"][2 * rank : 2 * rank + 2])
        assert torch.equal(got["body.whole.w2"], tensors["body.whole.w2"][2 * rank : 2 * rank + 2])
        assert torch.equal(got["body.two.weight"], tensors["body.two.weight"][:, half])
        q, k, v = tensors["body.qkv.weight"].split([Q, K, K])
        one = slice(4 * rank, 4 * rank + 4)
        assert torch.equal(got["body.qkv.weight"], torch.cat((q[8 * rank : 8 * rank + 8], k[one], v[one])))


class Watched:
    """A slice that counts the elements that are read of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.read = tensor, 0

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> Tensor:
        found = self.tensor[index]
        self.read += found.numel()
        return found


@pytest.mark.parametrize("case", CASES)
def test_a_rank_reads_its_own_part_of_a_tensor_only(case: str) -> None:
    change, weights = CASES[case]
    slices = {name: Watched(tensor) for name, tensor in renamed(plain(), change).items()}
    model, report = load(slices.items(), weights, 1, 2)
    assert report.num_bytes == 4 * sum(each.read for each in slices.values())
    held = sum(parameter.numel() for parameter in model.parameters())
    assert sum(each.read for each in slices.values()) <= 1.25 * held  # groups that a cut goes through are read whole
    assert sum(each.read for each in slices.values()) < 0.75 * sum(each.tensor.numel() for each in slices.values())
    if case == "stack":
        other = [each.read for name, each in slices.items() if name.startswith(("body.whole.0", "body.whole.1"))]
        assert len(other) == 6
        assert not any(other)  # of the other rank's experts nothing at all


# Sources


def strided(tensor: Tensor) -> Tensor:
    """The same values, every other element of memory."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


def test_a_folder_an_iterator_and_tensors_of_any_order_are_sources(tmp_path: Path) -> None:
    tensors = plain()
    save_file(tensors, tmp_path / "model.safetensors")
    want, _ = load(tensors.items())
    once = ((name, tensors[name]) for name in sorted(tensors, reverse=True))
    for source in (tmp_path, str(tmp_path), once, [(name, strided(t)) for name, t in tensors.items()]):
        got, report = load(source)
        assert report.num_tensors == len(tensors)
        assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))


def test_what_is_wrong_with_given_tensors_is_said_without_a_path() -> None:
    tensors = plain()
    tensors["body.out.weight"] = tensors["body.out.weight"].to(torch.int8)
    del tensors["norm.bias"]
    with pytest.raises(
        WeightsError, match=r"^the given weights do not fit the model: 1 missing: norm\.bias; 1 misshape"
    ):
        load(tensors.items())


def test_a_transposed_tensor_is_recognised() -> None:
    """And one that a rule turns without need."""
    tensors = plain()
    turned = {**tensors, "body.experts.w2": tensors["body.experts.w2"].mT}
    with pytest.raises(WeightsError, match=r"w2 \[4, 8, 6\], expected \[4, 6, 8\] \(transpose=True would fit\)"):
        load(turned.items())
    rules = WeightMap(rules={"w2": WeightRule("w2", transpose=True)})
    with pytest.raises(WeightsError, match=r"w2 .*\(transpose=False would fit\)"):
        load(tensors.items(), rules)


def test_parts_that_take_turns_are_equally_large() -> None:
    rules = WeightMap(rules={"qkv": WeightRule("qkv", ("q", "k", "v"), interleaved=True)})
    with pytest.raises(WeightsError, match="only parts of one size can be interleaved"):
        load(plain().items(), rules)
    with pytest.raises(ModelError, match="interleaved says how many groups there are"):
        load(plain().items(), WeightMap(rules={"w13": WeightRule("w13", ("gate", "up"), groups=2, interleaved=True)}))


def calls_of(count: int) -> int:
    """Python calls of reading `count` names with as many rules."""
    one = {f"layers.{i}.experts.{e}.w1": f"layers.{i}.mlp.{e}.w1" for i in range(count // 64) for e in range(64)}
    rules, calls = Rules(WeightMap(rules=one, rename={f"m{i}.": "" for i in range(count)})), 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        found = [rules.resolve(f"m7.{name}.weight").parameter for name in one]
    finally:
        sys.setprofile(None)
    assert found == [f"{to}.weight" for to in one.values()]
    return calls


def test_reading_names_is_linear_in_their_number() -> None:
    few, many = calls_of(512), calls_of(4096)
    assert many <= 8.2 * few


# Mistakes

WRONG: list[tuple[Callable[[str, Tensor], Mapping[str, Tensor]], WeightMap, list[str]]] = [
    (
        separate,
        WeightMap(),
        [
            "2 missing: body.qkv.bias, body.qkv.weight",
            "6 unexpected: body.k_proj.bias",
            'rules={"q_proj": WeightRule("qkv", "q"), "k_proj": WeightRule("qkv", "k"), "v_proj"',
        ],
    ),
    (
        separate,
        WeightMap(fuse={"q_proj": ("qkv", "q"), "k_proj": ("qkv", "key"), "v_proj": ("qkv", "v")}),
        [
            'body.k_proj.weight by the rule "k_proj": WeightRule("qkv", "key"): body.qkv.weight has the parts q, k, v, '
            "not key",
        ],
    ),
    (
        separate,
        WeightMap(rules={"q_proj": WeightRule("out", "q"), "k_proj": WeightRule("qkv", "k"), "v_proj": "nowhere"}),
        ["body.out.weight has no parts, not q", "unexpected: body.v_proj.bias, body.v_proj.weight"],
    ),
    (
        lambda name, tensor: {f"transformer.{name}": tensor},
        WeightMap(),
        ["12 missing: ", "12 unexpected: transformer.body", 'rename={"transformer.": ""}'],
    ),
    (
        lambda name, tensor: {name.replace("body.", "h.") if "experts" not in name else name: tensor},
        WeightMap(),
        ['rename={"h.": "body."}'],
    ),
    (
        by_expert,
        WeightMap(),
        ['"{}.gate_proj.weight": WeightRule("w13", "gate")', '"{}.up_proj.weight": WeightRule("w13", "up")'],
    ),
    (
        lambda name, tensor: transposed(name.replace("two", "c_fc"), tensor) if "two" in name else {name: tensor},
        WeightMap(),
        ['rules={"c_fc": WeightRule("two", ("a", "b"), transpose=True)}'],
    ),
    (
        lambda name, tensor: {} if ".whole.2.up" in name else by_expert(name, tensor),
        WeightMap(rules={**EXPERTS, "{}.up_proj.weight": WeightRule("w13", "gate")}),
        ["the second to fill part gate of body.experts.w13", "missing: body.experts.w13"],
    ),
    (
        by_head,
        WeightMap(rules={"qkv": WeightRule("qkv", ("q", "k", "v"), groups=3)}),
        ["part q of 16 outputs is no multiple of groups=3"],
    ),
]


@pytest.mark.parametrize(("change", "weights", "told"), WRONG)
def test_a_wrong_map_is_answered_with_the_rule_to_write(change: Any, weights: WeightMap, told: list[str]) -> None:
    with pytest.raises(WeightsError) as caught:
        load(renamed(plain(), change).items(), weights)
    for words in told:
        assert words in str(caught.value)


def test_an_expert_that_is_missing_or_too_many_is_named() -> None:
    tensors = renamed(plain(), by_expert)
    gone = tensors.pop("body.whole.2.up_proj.weight")
    with pytest.raises(WeightsError, match=r"1 missing: body\.whole\.2\.up_proj\.weight$"):
        load(tensors.items(), WeightMap(rules=EXPERTS))
    more = {**tensors, "body.whole.2.up_proj.weight": gone, "body.whole.4.up_proj.weight": gone}
    with pytest.raises(WeightsError, match=r"body\.whole\.w13 \[4, 16, 6\] has no index 4"):
        load(more.items(), WeightMap(rules=EXPERTS), 1, 2)


@pytest.mark.parametrize(
    ("pattern", "rule", "words"),
    [
        ("experts.w1", WeightRule("experts.{}.w1"), "each {} of `to`"),
        ("a.{}.b.{}.c.{}", WeightRule("a.{}"), "each {} of `to`"),
        ("a..b", WeightRule("c"), "words with dots"),
        ("a", WeightRule(""), "words with dots"),
        ("a", WeightRule("b", permute=(0, 2)), "an order of 0 to 1"),
        ("a", WeightRule("b", groups=0), "at least 1"),
    ],
)
def test_a_rule_that_means_nothing_is_refused_with_its_text(pattern: str, rule: WeightRule, words: str) -> None:
    with pytest.raises(ModelError, match=f'WeightMap: "{pattern}": .*{words}'.replace("{", r"\{")):
        Rules(WeightMap(rules={pattern: rule}))


# Names


@pytest.mark.parametrize(
    ("name", "parameter", "index"),
    [
        ("layers.3.experts.12.w1.weight", "layers.3.experts.weight", 12),
        ("x.layers.3.experts.12.w1.bias", "x.layers.3.experts.bias", 12),
        ("layers.3.experts.x.w1.weight", "layers.3.experts.x.w1.weight", None),
        ("myexperts.1.w1.weight", "myexperts.1.w1.weight", None),  # whole words only
        ("a.attn.c_proj.weight", "a.attn.out.weight", None),  # the longest pattern
        ("a.mlp.c_proj.weight", "a.down.weight", None),
        ("a.sinks", "a.attn.sinks", None),  # a parameter of a name of its own
        ("a.sinks.weight", "a.attn.sinks.weight", None),
        ("h.4.ln.weight", "layers.4.norm.weight", None),
    ],
)
def test_patterns(name: str, parameter: str, index: int | None) -> None:
    weights = WeightMap(
        rules={
            "experts.{}.w1": WeightRule("experts", "gate"),
            "c_proj": "down",
            "attn.c_proj": "attn.out",
            "mlp.c_proj": "down",
            "sinks": "attn.sinks",
            "h.{}.ln": "layers.{}.norm",
        }
    )
    found = Rules(weights).resolve(name)
    assert (found.parameter, found.index) == (parameter, index)


def test_the_names_of_a_parameters_sources() -> None:
    weights = WeightMap(
        fuse={"q_proj": ("qkv", "q")},
        rules={"experts.{}.w1": WeightRule("experts", "gate"), "c_attn": WeightRule("kv", ("k", "v")), "h.{}": "l.{}"},
    )
    rules = Rules(weights)
    assert rules.sources("a.3.qkv.weight", "q") == ["a.3.q_proj.weight"]
    assert rules.sources("a.3.experts.weight", "gate") == ["a.3.experts.{}.w1.weight"]
    assert rules.sources("a.kv.bias", "v") == ["a.c_attn.bias"]
    assert rules.sources("l.5.weight") == ["h.5.weight"]
    assert rules.sources("other.weight") == ["other.weight"]
    assert checkpoint_name("a.qkv.weight", "q", weights) == "a.q_proj.weight"
