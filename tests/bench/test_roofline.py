"""The limits that every benchmark quotes, against numbers worked out apart from this code."""

from __future__ import annotations

from random import Random

import pytest

from nanoengine.lab.bench.roofline import Limits, decode_seconds, least_seconds, prefill_seconds
from nanoengine.lab.bench.shapes import SHAPES
from nanoengine.lab.bench.workloads import WORKLOADS, prefill, uniform

H200 = Limits(4.19e12, 714e12)
SMALL = SHAPES["qwen3-0.6b"]


@pytest.mark.parametrize(
    ("workload", "tokens_per_second"),
    [("d1", 3387), ("d8", 21565), ("d64", 65550), ("d256", 80128), ("ragged256", 35027), ("prefill64", 699392)],
)
def test_the_known_limits(workload: str, tokens_per_second: int) -> None:
    w = WORKLOADS[workload]()
    assert w.counted / least_seconds(SMALL, H200, w.lengths, 256) == pytest.approx(tokens_per_second, abs=0.5)


def test_the_workloads_are_those_described() -> None:
    made = {name: make() for name, make in WORKLOADS.items()}
    sizes = {name: (sum(map(len, w.prompts)), sum(w.output_lens)) for name, w in made.items()}
    assert sizes["ragged256"] == (142_827, 133_966)
    assert sizes["churn"] == (632_337, 148_601)
    assert sizes["d64"] == (64 * 128, 64 * 512)
    assert made["churn"].max_num_seqs == 128
    assert all(max(max(prompt) for prompt in w.prompts) <= 10_000 for w in made.values())


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b", "tiny", "qwen3-30b-a3b"])
def test_step_by_step_by_hand(name: str) -> None:
    """One request after the other: each step reads all weights and its own context, and computes less than that."""
    shape, limits = SHAPES[name], Limits(2e12, 1e18)
    requests = [(5, 3), (7, 2)]
    kv_per_token = 2 * shape.layers * shape.kv_heads * shape.head_size * 2  # K and V, 2 bytes each
    steps = [5, 6, 7, 7, 8]  # contexts
    read = 5 * shape.step_weights(1) * 2 + sum(steps) * kv_per_token
    assert least_seconds(shape, limits, requests, 1) == pytest.approx(read / 2e12, rel=1e-3)


def test_fewer_places_need_more_steps_and_more_places_than_requests_change_nothing() -> None:
    rng = Random(1)
    requests = [(rng.randint(1, 50), rng.randint(1, 50)) for _ in range(20)]
    found = [least_seconds(SMALL, H200, requests, places) for places in (1, 3, 10, 20, 21, 500)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 2 * found[2]
    assert found[3] == found[4] == found[5]


def test_a_cached_prefix_saves_its_products_but_is_still_attended() -> None:
    whole = prefill_seconds(SMALL, H200, 4096 + 128)
    behind = prefill_seconds(SMALL, H200, 128, 4096)
    assert whole - prefill_seconds(SMALL, H200, 4096) == pytest.approx(behind)
    assert behind > prefill_seconds(SMALL, H200, 128)
    requests = [(4224, 1)] * 8
    saved = least_seconds(SMALL, H200, requests, 8) - least_seconds(SMALL, H200, requests, 8, cached=4096)
    assert saved == pytest.approx(7 * prefill_seconds(SMALL, H200, 4096))


def test_large_batches_compute_longer_than_they_read() -> None:
    bytes_only = Limits(H200.bandwidth, 1e30)
    assert decode_seconds(SMALL, H200, 1, 0) == decode_seconds(SMALL, bytes_only, 1, 0)
    assert decode_seconds(SMALL, H200, 1024, 0) > 2 * decode_seconds(SMALL, bytes_only, 1024, 0)


def test_the_llama_shape_is_the_published_one() -> None:
    shape = SHAPES["llama-3.2-1b"]
    norms = (2 * shape.layers + 1) * shape.hidden
    assert shape.step_weights(1) + norms == 1_235_814_400  # parameters of the published checkpoint, embeddings tied


def test_the_shape_with_experts_is_the_published_one() -> None:
    """30.5 billion parameters, 3.3 billion of them of a token; a step reads the experts that its rows hit."""
    shape = SHAPES["qwen3-30b-a3b"]
    everything = shape.step_weights(10**6) + shape.vocab * shape.hidden  # the embedding
    assert everything / 1e9 == pytest.approx(30.53, abs=0.01)
    active = shape.layers * shape.layer_weights + 2 * shape.vocab * shape.hidden
    assert active / 1e9 == pytest.approx(3.35, abs=0.01)
    hit = [shape.experts_hit(rows) for rows in (1, 2, 8, 64, 256)]
    assert hit == pytest.approx([8.0, 15.5, 51.6, 126.0, 128.0], abs=0.1)
    dense, one = Limits(1e12, 1e30), 2 * shape.step_weights(1)
    assert decode_seconds(shape, dense, 1, 0) == pytest.approx(one / 1e12)
    assert decode_seconds(shape, dense, 64, 0) == pytest.approx(59.5e9 / 1e12, rel=1e-3)
    assert shape.hf_config(64)["moe_intermediate_size"] == 768


def test_scaled_workloads_keep_their_form() -> None:
    small = WORKLOADS["churn"]().scaled(0.01)
    assert (small.name, len(small.prompts), small.max_num_seqs) == ("churn*0.01", 20, 128)
    assert {len(p) for p in small.prompts} <= {1, 2, 3, 4, 5}
    assert min(small.output_lens) == 1
    assert uniform(3).scaled(1) == uniform(3)
    assert prefill(2, 8).counted == 16
