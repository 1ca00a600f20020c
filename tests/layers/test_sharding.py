"""Cutting for tensor parallelism: every tensor of models of each kind, cut and put together again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoengine.api import ModelError, Shard, ShardSpec, TensorParallelGroup, WeightLayer
from nanoengine.api.parallel import SingleRank
from nanoengine.api.sharding import even_share
from nanoengine.kernels.ops import Ops
from nanoengine.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from nanoengine.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanoengine.layers.norm import RMSNorm
from nanoengine.layers.sharding import heads_per_rank, weight_layers
from nanoengine.plugins.models.gemma3 import Gemma3
from nanoengine.plugins.models.llama import Llama
from nanoengine.plugins.models.qwen2 import Qwen2
from nanoengine.plugins.models.qwen3 import Qwen3
from nanoengine.setup.start.build_model import BuiltModel, build_model
from nanoengine.setup.start.weights import checkpoint_name, dummy_weights, load_weights
from nanoengine.testing.checkpoints import tiny_gemma3, tiny_llama, tiny_qwen2, tiny_qwen3

# 4 ranks: 2 KV heads are replicated; 131 and 151 ids are padded
LLAMA = {"num_attention_heads": 8, "attention_bias": True, "mlp_bias": True}
QWEN3 = {"num_attention_heads": 8, "tie_word_embeddings": True}
MODELS = {
    "llama": (tiny_llama, Llama, LLAMA),
    "qwen3": (tiny_qwen3, Qwen3, QWEN3),
    "qwen2": (tiny_qwen2, Qwen2, {"num_attention_heads": 8}),
    "gemma3": (tiny_gemma3, Gemma3, {"num_attention_heads": 8}),
}


class Rank(TensorParallelGroup):
    """One rank of several, without the others: for building and loading."""

    dtype, device, ops = torch.float32, torch.device("cpu"), Ops()  # as a `Placement` needs

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.tp = rank, size, self

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def highest(self, keys: Tensor) -> Tensor:
        raise NotImplementedError


def load_ranks(name: str, path: Path, size: int) -> list[BuiltModel]:
    _, cls, _ = MODELS[name]
    hf = json.loads((path / "config.json").read_text())
    ranks = []
    for rank in range(size):
        tp = Rank(rank, size)
        built = build_model(cls, hf, tp=tp, dtype=torch.float32, device="cpu")
        for parameter in built.model.parameters():
            parameter.data.fill_(float("nan"))
        load_weights(built.model, built.config, path, tp)
        ranks.append(built)
    return ranks


def reassemble(ranks: list[BuiltModel]) -> dict[str, Tensor]:
    """Checkpoint tensors from what the ranks hold; NaN where no rank has anything."""
    whole: dict[str, Tensor] = {}
    for rank, built in enumerate(ranks):
        rules = built.model.weight_map(built.config)
        for name, layer, parameter, spec in weight_layers(built.model):
            for shard in spec.shards(rank, len(ranks)):
                source = checkpoint_name(name, shard.part, rules)
                tensor = whole.setdefault(source, torch.full(shard.shape, float("nan")))
                less = 1.0 if isinstance(layer, RMSNorm) and layer.unit_offset else 0.0
                tensor[shard.source] = layer.get_parameter(parameter).data[shard.target] - less
    return whole


def same(got: Tensor, want: Tensor) -> bool:
    """Equal, but for the rounding of norm weights that are kept with their one."""
    return torch.allclose(got, want, rtol=0, atol=2e-7)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_head_of_its_own_beside_a_tied_config_is_cut_like_any(size: int, tmp_path: Path) -> None:
    path = tiny_qwen3(tmp_path, num_attention_heads=8, tie_word_embeddings=True)
    want = load_file(path / "model.safetensors")
    want["lm_head.weight"] = want["model.embed_tokens.weight"].flip(0)
    save_file(want, path / "model.safetensors")
    ranks = load_ranks("qwen3", path, size)
    for rank in ranks:
        padding = rank.model.get_submodule("lm_head").get_parameter("weight").isnan()
        assert not padding.any()  # the head's own memory, where the last rank's rows end with zeros
    got = reassemble(ranks)
    assert got.keys() == want.keys()
    assert all(same(got[name], want[name]) for name in want)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_tensor_is_cut_and_reassembled(name: str, size: int, tmp_path: Path) -> None:
    make, _, options = MODELS[name]
    path = make(tmp_path, **options)
    ranks = load_ranks(name, path, size)
    want, got = load_file(path / "model.safetensors"), reassemble(ranks)
    assert got.keys() == want.keys()
    for tensor in want:
        assert same(got[tensor], want[tensor]), tensor
    for built in ranks:
        assert not any(parameter.isnan().all() for parameter in built.model.parameters())
    held = sum(p.numel() for built in ranks for p in built.model.parameters())
    assert held > 0
    if size > 1:  # really cut: two ranks hold far less than two copies
        assert held < 0.75 * size * sum(tensor.numel() for tensor in want.values())


def _from_the_end(shard: Shard) -> Shard:
    rows, rest = shard.source[0], shard.source[1:]
    total = shard.shape[0]
    return replace(shard, source=(slice(total - rows.stop, total - rows.start), *rest))


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_cut_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant reads the neighbour's rows of the second part; the comparison above must see it."""
    right = ShardSpec.shards

    def mutant(self: ShardSpec, rank: int, size: int) -> tuple[Shard, ...]:
        cut = right(self, rank, size)
        return tuple(_from_the_end(s) if s.part == "k" else s for s in cut)

    make, _, options = MODELS[name]
    path = make(tmp_path, **options)
    monkeypatch.setattr(ShardSpec, "shards", mutant)
    ranks = load_ranks(name, path, 2)
    monkeypatch.undo()
    want, got = load_file(path / "model.safetensors"), reassemble(ranks)
    wrong = {tensor for tensor in want if not same(got[tensor], want[tensor])}
    assert wrong
    assert all(".k_proj." in tensor for tensor in wrong)


def test_replicated_kv_heads() -> None:
    shares = [even_share(2 * 16, 16, rank, 4, replicate=True) for rank in range(4)]
    assert shares == [(0, 16), (0, 16), (16, 16), (16, 16)]
    assert heads_per_rank(2, 4, replicate=True) == 1
    assert heads_per_rank(8, 4) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((9 * 64, 64, 0, 2), "9 heads of size 64 cannot be divided over tensor_parallel_size=2"),
        ((3 * 64, 64, 0, 4), "3 heads of size 64 cannot be divided over tensor_parallel_size=4"),
        ((100, 1, 0, 3), "a width of 100 cannot be divided over tensor_parallel_size=3"),
        ((100, 64, 0, 1), "100 is not a multiple of the head size 64"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_numbers(args: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        even_share(*args, replicate=True)


def test_a_model_whose_heads_do_not_divide_is_refused(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, num_attention_heads=6)
    hf = json.loads((path / "config.json").read_text())
    with pytest.raises(ModelError, match="6 attention heads cannot be divided over tensor_parallel_size=4"):
        build_model(Llama, hf, tp=Rank(0, 4), dtype=torch.float32, device="meta")


def filled(layer: WeightLayer, rank: int, size: int, whole: Tensor) -> None:
    for shard in layer.specs["weight"].shards(rank, size):
        layer.load_shard("weight", shard, whole[shard.source])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_layers_of_all_ranks_sum_or_join_to_the_whole(size: int) -> None:
    torch.manual_seed(0)
    x, column, row, bias = torch.randn(5, 8), torch.randn(12, 8), torch.randn(8, 12), torch.randn(8)
    outs, logits, embedded = [], [], []
    table, ids = torch.randn(10, 8), torch.tensor([0, 3, 9, 5, 2])
    for rank in range(size):
        tp = Rank(rank, size)
        up = ColumnParallelLinear("up", 8, 12, bias=False, place=tp)
        down = RowParallelLinear("down", 12, 8, bias=True, place=tp)
        head, embed = ParallelLMHead(8, 10, bias=False, place=tp), VocabParallelEmbedding(10, 8, place=tp)
        for layer, whole in ((up, column), (down, row), (head, table), (embed, table)):
            filled(layer, rank, size, whole)
        down.get_parameter("bias").data.copy_(bias)
        outs.append(down(up(x)))
        logits.append(head(x))
        embedded.append(embed(ids))
    torch.testing.assert_close(sum(outs), x @ column.T @ row.T + bias)
    torch.testing.assert_close(sum(embedded), table[ids])
    joined = torch.cat(logits, dim=-1)
    torch.testing.assert_close(joined[:, :10], x @ table.T)
    assert joined.shape[1] == -(-10 // size) * size
    assert (joined[:, 10:] == float("-inf")).all()
    assert size < 4 or joined.shape[1] > 10  # padding happened


@pytest.mark.parametrize("name", MODELS)
def test_dummy_weights_of_ranks_are_slices_of_one_model(name: str, tmp_path: Path) -> None:
    make, cls, options = MODELS[name]
    hf = json.loads((make(tmp_path, **options) / "config.json").read_text())

    def built(size: int, seed: int = 7) -> dict[str, Tensor]:
        ranks = []
        for rank in range(size):
            tp = Rank(rank, size)
            ranks.append(build_model(cls, hf, tp=tp, dtype=torch.float32, device="cpu"))
            dummy_weights(ranks[-1].model, seed, tp)
        return reassemble(ranks)

    one, two, four, other = built(1), built(2), built(4), built(1, seed=8)
    for tensor, values in one.items():
        assert torch.equal(values, two[tensor]), tensor
        assert torch.equal(values, four[tensor]), tensor
        if "norm" in tensor:
            assert (values == (0 if name == "gemma3" else 1)).all()  # either way they change nothing
        else:
            assert not torch.equal(values, other[tensor])
    large = torch.cat([values.flatten() for name, values in one.items() if "norm" not in name])
    assert abs(large.std() - 0.02) < 4e-4
    assert abs(large.mean()) < 4e-4
    assert len(large.unique()) > 0.98 * len(large)


def test_meta_device_shows_attention_needs_without_memory(tmp_path: Path) -> None:
    hf = json.loads((tiny_qwen3(tmp_path) / "config.json").read_text())
    built = build_model(Qwen3, hf, tp=SingleRank(), dtype=torch.bfloat16, device="meta")
    assert all(parameter.is_meta for parameter in built.model.parameters())
    assert {(a.spec.head_size, a.kv_spec.dtype) for a in built.attention_layers} == {(20, "bfloat16")}
    assert len(built.attention_layers) == 3
