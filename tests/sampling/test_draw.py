"""The draw: its bits, its quality, its distribution, and that nothing beside the row has a say in it."""

from __future__ import annotations

import json
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanoengine.kernels import sampling
from nanoengine.kernels.philox import draw_keys, log_exponential, noise_bits, philox4x32, uniform

from . import reference
from .make_vectors import PATH, logits, vectors

VECTORS = json.loads(PATH.read_text())
INT64 = st.integers(-(2**63), 2**63 - 1)


def unsigned(bits: torch.Tensor) -> np.ndarray:
    return bits.numpy().view(np.uint32)


def keys_of(seeds: list[int], positions: list[int], index: list[int]) -> torch.Tensor:
    return draw_keys(torch.tensor(seeds), torch.tensor(positions), torch.tensor(index))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: str) -> None:
    """From Random123's kat_vectors."""
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), (torch.tensor([key[0]]), torch.tensor([key[1]])))
    assert " ".join(f"{int(w):08x}" for w in words) == expected
    assert [int(w) for w in words] == reference.philox(counter, key)


def test_vectors_are_the_references() -> None:
    assert VECTORS["rows"] == vectors()


@pytest.mark.parametrize("row", VECTORS["rows"], ids=lambda r: f"{r['seed']}-{r['position']}-{r['sample_index']}")
def test_vectors(row: dict[str, object]) -> None:
    key = keys_of([row["seed"]], [row["position"]], [row["sample_index"]])  # type: ignore[list-item]
    assert unsigned(key)[0].tolist() == row["key"]
    assert unsigned(noise_bits(key, torch.tensor(VECTORS["ids"], dtype=torch.int32)))[0].tolist() == row["noise_bits"]
    for vocab, token in row["tokens"].items():  # type: ignore[attr-defined]
        assert int(sampling.draw(torch.from_numpy(logits(int(vocab)))[None], key)[0]) == token


@given(INT64, st.integers(0, 2**40), st.integers(0, 2**31 - 1), st.integers(0, 2**20))
def test_bits_equal_the_reference(seed: int, position: int, index: int, start: int) -> None:
    key = keys_of([seed], [position], [index])
    expected = reference.draw_key(seed, position, index)
    assert unsigned(key)[0].tolist() == list(expected)
    ids = torch.arange(start, start + 37, dtype=torch.int32)
    bits = noise_bits(key, ids)
    assert (unsigned(bits)[0] == reference.noise_bits(expected, ids.numpy())).all()
    assert (uniform(bits).numpy()[0] == reference.uniform(unsigned(bits)[0])).all()
    np.testing.assert_allclose(-log_exponential(bits).numpy()[0], reference.gumbel(unsigned(bits)[0]), atol=2e-6)


def test_extreme_bits_make_finite_noise() -> None:
    bits = torch.tensor([0, 1, 255, 2**31 - 1, -(2**31), -129, -128, -1], dtype=torch.int32)
    u = uniform(bits).numpy()
    assert u.tolist() == reference.uniform(unsigned(bits)).tolist()
    assert u.min() == 2.0**-33
    assert u.max() == 1 - 2.0**-24
    assert torch.isfinite(log_exponential(bits)).all()


# Quality --------------------------------------------------------------------------------------------------------------


def z_score(observed: np.ndarray, expected: np.ndarray | float) -> float:
    """How far the chi-square statistic lies from its mean, in standard deviations."""
    freedom = observed.size - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / sqrt(2 * freedom))


def joint(a: torch.Tensor, b: torch.Tensor, bits: int = 4) -> float:
    """Whether two noise streams are uniform and independent, by their highest bits."""
    pair = (unsigned(a) >> (32 - bits)).astype(np.int64).ravel() << bits | (unsigned(b) >> (32 - bits)).ravel()
    table = np.bincount(pair, minlength=4**bits)
    return z_score(table, pair.size / 4**bits)


N = 1 << 17


def many_keys(seed_step: int = 1, position: int = 100, index: int = 0, first: int = 0) -> torch.Tensor:
    seeds = torch.arange(first, first + N * seed_step, seed_step)
    return draw_keys(seeds, torch.full((N,), position), torch.full((N,), index))


def noise_at(keys: torch.Tensor, token: int) -> torch.Tensor:
    return noise_bits(keys, torch.tensor([token], dtype=torch.int32))


@pytest.mark.parametrize("token", [0, 777, 151000])
@pytest.mark.parametrize("other", [1, 2, 3, 16, 4096, 65536])
def test_noise_of_two_tokens_is_independent(token: int, other: int) -> None:
    keys = many_keys()
    assert abs(joint(noise_at(keys, token), noise_at(keys, token ^ other))) < 4.5


@pytest.mark.parametrize("change", [{"position": 101}, {"index": 1}, {"first": N}, {"seed_step": 2}, {"first": 1}])
def test_noise_of_two_rows_is_independent(change: dict[str, int]) -> None:
    for token in (0, 49151):
        assert abs(joint(noise_at(many_keys(), token), noise_at(many_keys(**change), token))) < 4.5


def test_the_measure_sees_dependence() -> None:
    keys = many_keys()
    assert joint(noise_at(keys, 5), noise_at(keys, 5)) > 1000
    assert joint(noise_at(keys, 5), noise_at(keys, 5) ^ 0x0FFFFFFF) > 1000


def test_largest_noise_of_a_row_has_its_law() -> None:
    """The least of V uniforms: 1 - (1 - u)^V is uniform; Kolmogorov-Smirnov over 4,000 rows of 4,096 tokens."""
    keys, ids = many_keys()[:4000], torch.arange(4096, dtype=torch.int32)
    least = np.concatenate([unsigned(noise_bits(part, ids)).min(1) for part in keys.split(500)]) / 2.0**32
    law = np.sort(1 - (1 - least) ** 4096)
    steps = np.arange(len(law) + 1) / len(law)
    distance = max(np.abs(law - steps[1:]).max(), np.abs(law - steps[:-1]).max())
    assert distance * sqrt(len(law)) < 1.95  # 0.1 %


def counts_of(row: np.ndarray, draws: int, **processors: torch.Tensor) -> np.ndarray:
    """Tokens drawn from one distribution, at one position after the other."""
    positions = torch.arange(draws)
    keys = draw_keys(torch.full((draws,), 1234), positions, torch.zeros_like(positions))
    batch = torch.from_numpy(row.astype(np.float32)).expand(draws, -1)
    columns = {name: value.expand(draws) for name, value in processors.items()}
    tokens = sampling.draw_truncated(batch, keys, **columns)[0] if columns else sampling.draw(batch, keys)[0]
    return np.bincount(tokens.numpy(), minlength=len(row))


ROW = np.array([2.0, 1.0, 1.0, 0.0, -1.0, -np.inf, 0.5, -0.5])


def test_drawn_tokens_follow_softmax() -> None:
    counts, p = counts_of(ROW, 40000), reference.probabilities(ROW)
    assert counts[5] == 0
    assert z_score(np.delete(counts, 5), np.delete(p, 5) * 40000) < 4
    assert z_score(np.delete(counts, 5), np.delete(reference.probabilities(ROW / 1.1), 5) * 40000) > 20


def test_drawn_tokens_follow_the_truncated_softmax() -> None:
    counts = counts_of(
        ROW, 40000, top_k=torch.tensor([3], dtype=torch.int32), top_p=torch.tensor([0.99]), min_p=torch.tensor([0.1])
    )
    kept = np.array([0, 1, 2])
    p = reference.probabilities(ROW[kept])
    assert counts.sum() == counts[kept].sum()
    assert z_score(counts[kept], p * 40000) < 4


def test_uniform_over_a_large_vocabulary() -> None:
    counts = np.zeros(64)
    for seed in range(8):
        keys = draw_keys(torch.full((500,), seed), torch.arange(500), torch.zeros(500, dtype=torch.int64))
        tokens = sampling.draw(torch.zeros(500, 8192), keys)[0].numpy()
        counts += np.bincount(tokens // 128, minlength=64)
    assert abs(z_score(counts, 4000 / 64)) < 4


# Independence of the batch --------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("truncated", [False, True])
def test_a_row_alone_has_the_same_token_and_score_bits(truncated: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    batch = torch.randn(13, 4003, generator=generator) * torch.linspace(0.5, 6, 13)[:, None]
    keys = keys_of(list(range(13)), [9] * 13, [0] * 13)
    columns = [torch.full((13,), 700, dtype=torch.int32), torch.full((13,), 0.8), torch.full((13,), 0.01)]
    columns[0][::3] = 0

    def run(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        if truncated:
            return sampling.draw_truncated(batch[rows], keys[rows], *(c[rows] for c in columns))
        return sampling.draw(batch[rows], keys[rows])

    tokens, scores = run(slice(None))
    for r in range(13):
        token, score = run(slice(r, r + 1))
        assert (int(token), score.numpy().tobytes()) == (int(tokens[r]), scores[r].numpy().tobytes())


def test_shards_draw_the_same_token() -> None:
    batch = torch.randn(16, 4096, generator=torch.Generator().manual_seed(4))
    keys = keys_of(list(range(16)), [3] * 16, [0] * 16)
    whole, best = sampling.draw(batch, keys)
    starts = range(0, 4096, 1024)
    parts = [sampling.draw(batch[:, start : start + 1024], keys, vocab_start=start) for start in starts]
    scores = torch.stack([score for _, score in parts])
    ids = torch.stack([column + 1024 * i for i, (column, _) in enumerate(parts)])
    winner = scores.argmax(0, keepdim=True)
    assert torch.equal(scores.gather(0, winner)[0], best)
    assert torch.equal(ids.gather(0, winner)[0], whole)
    assert len(set((whole // 1024).tolist())) == 4


def test_equal_scores_go_to_the_lowest_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "log_exponential", lambda bits: torch.zeros_like(bits, dtype=torch.float32))
    batch = torch.zeros(2, 300)
    batch[1, :7] = -1.0
    keys = torch.zeros(2, 2, dtype=torch.int32)
    assert sampling.draw(batch, keys)[0].tolist() == [0, 7]
    k = torch.full((2,), 200, dtype=torch.int32)
    assert sampling.draw_truncated(batch, keys, k, None, None)[0].tolist() == [0, 7]
