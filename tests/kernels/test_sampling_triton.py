"""Sampling in Triton against the torch reference: the same bits, the same tokens, the same failures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_interpreter import interpreted

from nanoengine.core.step import ROW_BAD_LOGITS, ROW_FINE, ROW_NOTHING_LEFT
from nanoengine.kernels import bitmask, philox, sampling

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from nanoengine.kernels import philox_triton, sampling_triton  # noqa: E402
from nanoengine.kernels.sampling_triton import Tail, Tuning, sample  # noqa: E402

ON_GPU = torch.cuda.is_available()
VECTORS = json.loads((Path(__file__).parent.parent / "sampling" / "vectors.json").read_text())
TINY = Tuning(group=16, tile_groups=16, tiles=2, capacity=128, max_k=40, slow_tile=256, collect_groups=16)
TUNINGS = {
    "tiny": TINY,
    "narrow": replace(TINY, group=32, tile_groups=4, tiles=3, capacity=64, slow_tile=512, rounds=1),
}
NAN, INF = float("nan"), float("inf")

Columns = dict[str, Tensor]


def columns(rows: int, device: torch.device, **values: object) -> Columns:
    """Per-row parameters; a list is cycled over the rows."""

    def column(name: str, default: object, dtype: torch.dtype) -> Tensor:
        value = values.get(name, default)
        cycle = value if isinstance(value, list) else [value]
        return torch.tensor([cycle[r % len(cycle)] for r in range(rows)], dtype=dtype, device=device)

    out = {
        "greedy": column("greedy", False, torch.bool),
        "temperature": column("temperature", 0.7, torch.float32),
        "top_k": column("top_k", 0, torch.int32),
        "top_p": column("top_p", 1.0, torch.float32),
        "min_p": column("min_p", 0.0, torch.float32),
        "sample_index": column("sample_index", [0, 3], torch.int64),
    }
    ramp = torch.arange(rows, dtype=torch.int64, device=device)
    return out | {"seeds": (ramp + 1) * 0x9E3779B97F4A7C1 - 2**62, "positions": 5 + ramp * 11}


def reference(logits: Tensor, tail: Tail, c: Columns, sound: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What `Sampler` makes of them."""
    x = logits.float().clone()
    good = x.amax(-1).isfinite() if sound is None else sound
    ids = x.argmax(-1)
    scores = x.gather(1, ids[:, None]).squeeze(1)
    if tail is not Tail.GREEDY:
        keys = philox.draw_keys(c["seeds"], c["positions"], c["sample_index"])
        sampling.scale_by_temperature_(x, c["temperature"])
        if tail is Tail.TRUNCATION:
            drawn = sampling.draw_truncated(x, keys, c["top_k"], c["top_p"], c["min_p"])
        else:
            drawn = sampling.draw(x, keys)
        ids, scores = torch.where(c["greedy"], ids, drawn[0]), torch.where(c["greedy"], scores, drawn[1])
    failed = torch.where(good, torch.where(scores.isfinite(), ROW_FINE, ROW_NOTHING_LEFT), ROW_BAD_LOGITS)
    return torch.where(failed == ROW_FINE, ids, 0), failed.to(torch.int32)


def kernel(
    logits: Tensor, tail: Tail, c: Columns, tuning: Tuning | None = None, sound: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    tokens = torch.full((len(logits),), -7, dtype=torch.int64, device=logits.device)
    failed = torch.full((len(logits),), -7, dtype=torch.int32, device=logits.device)
    before = logits.clone()
    raw_tops = None if sound is None else torch.where(sound, 0.0, NAN)
    sample(logits, tail, tokens, failed, raw_tops=raw_tops, tuning=tuning, **c)
    assert torch.equal(before.nan_to_num(1e9), logits.nan_to_num(1e9)), "the logits must be left alone"
    return tokens, failed


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert got[1].tolist() == expected[1].tolist()
    assert got[0].tolist() == expected[0].tolist()


def mixed_logits(rows: int, vocab: int) -> Tensor:
    """From flat to peaked, and with ties, masked tokens, whole rows of one value, and broken rows."""
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * torch.linspace(0.5, 9, rows)[:, None]
    x[1 % rows] = x[1 % rows].round()
    x[2 % rows, ::3] = -INF
    x[3 % rows] = 1.0
    x[4 % rows, 17:] = -INF
    return x


def by_slot(c: Columns, slots: list[int], count: int) -> Columns:
    """The columns as tables of `count` slots, with other values where no row is; positions stay those of the rows."""
    at = torch.tensor(slots, dtype=torch.int32, device=c["seeds"].device)
    tables: Columns = {}
    for name, column in c.items():
        dtype = torch.int32 if name == "greedy" else column.dtype
        tables[name] = torch.full((count,), 1, dtype=dtype, device=column.device)
        tables[name][at.long()] = column.to(dtype)
    return tables | {"positions": c["positions"].int(), "at": at}


CASES: dict[str, tuple[Tail, dict[str, object]]] = {
    "greedy": (Tail.GREEDY, {}),
    "temperature": (Tail.TEMPERATURE, {"temperature": [0.7, 1.0, 0.01, 30.0]}),
    "some greedy": (Tail.TEMPERATURE, {"greedy": [True, False, False]}),
    "top-k": (Tail.TRUNCATION, {"top_k": [1, 5, 40]}),
    "top-k, top-p": (Tail.TRUNCATION, {"top_k": [30, 8], "top_p": [0.8, 0.3]}),
    "top-p": (Tail.TRUNCATION, {"top_p": [0.95, 0.5, 0.1, 1e-6]}),
    "min-p": (Tail.TRUNCATION, {"min_p": [0.1, 0.5, 1.0]}),
    "large top-k": (Tail.TRUNCATION, {"top_k": [60, 500], "top_p": [0.7, 1.0]}),
    "all in one batch": (
        Tail.TRUNCATION,
        {
            "greedy": [False, False, False, False, True],
            "top_k": [0, 7, 60],
            "top_p": [0.3, 1.0, 0.9, 0.6],
            "min_p": [0.0, 0.05],
            "temperature": [0.6, 1.3, 2.0],
        },
    ),
}


# Bits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", VECTORS["rows"], ids=lambda r: f"{r['seed']}-{r['position']}-{r['sample_index']}")
def test_vectors(row: dict[str, object], device: torch.device) -> None:
    one = (torch.tensor([row[name]], device=device) for name in ("seed", "position", "sample_index"))
    key = philox_triton.draw_keys(*one)
    ids = torch.tensor(VECTORS["ids"], dtype=torch.int32, device=device)
    assert [k & philox.WORD for k in key[0].tolist()] == row["key"]
    assert [b & philox.WORD for b in philox_triton.noise_bits(key, ids)[0].tolist()] == row["noise_bits"]
    c = columns(1, device, temperature=1.0)
    for name, column in (("seeds", "seed"), ("positions", "position"), ("sample_index", "sample_index")):
        c[name] = torch.tensor([row[column]], device=device)
    for vocab, token in row["tokens"].items():  # type: ignore[attr-defined]
        if int(vocab) > 1000 and not ON_GPU:
            continue
        logits = ((torch.arange(int(vocab)) * 7919 % 33) / 4 - 4)[None].to(device)
        assert kernel(logits, Tail.TEMPERATURE, c, None if ON_GPU else TINY)[0].item() == token


def test_bits_of_many_rows(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    seeds, positions = (torch.randint(-(2**63), 2**63 - 1, (300,), generator=generator) for _ in range(2))
    index = torch.arange(300)
    keys = philox.draw_keys(seeds, positions, index)
    triton_keys = philox_triton.draw_keys(seeds.to(device), positions.to(device), index.to(device))
    assert torch.equal(triton_keys.cpu(), keys)
    ids = torch.randint(0, 2**20, (3, 40), generator=generator, dtype=torch.int32)
    assert torch.equal(
        philox_triton.noise_bits(triton_keys[:3], ids.to(device)).cpu(), philox.noise_bits(keys[:3], ids)
    )


with interpreted():

    @triton.jit
    def _noise_kernel(bits, exact, hasty, NATIVE: tl.constexpr):  # noqa: N803
        i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        b = tl.load(bits + i).to(tl.uint32, bitcast=True)
        tl.store(exact + i, philox_triton.log_exponential(b, NATIVE))
        tl.store(hasty + i, philox_triton.noise_log2(b, NATIVE))


def test_noise_and_the_bound_of_the_hasty_one(device: torch.device) -> None:
    """The bound behind `margin`, over all magnitudes of the bits and both ends."""
    shifts = torch.arange(8192) % 33
    bits = torch.randint(0, 2**32, (8192,), generator=torch.Generator().manual_seed(1)) >> shifts
    bits[:4], bits[4:8] = torch.arange(4), 2**32 - 1 - torch.arange(4) * 200
    bits[8:16] = 2**20 + torch.arange(-4, 4)
    bits32 = (bits - ((bits >> 31) << 32)).to(torch.int32).to(device)
    exact, hasty = torch.empty(8192, device=device), torch.empty(8192, device=device)
    _noise_kernel[(8,)](bits32, exact, hasty, NATIVE=philox_triton.NATIVE)
    torch.testing.assert_close(exact, philox.log_exponential(bits32), atol=2e-6, rtol=3e-7)
    u = (bits.double() * 2**-32).float().clamp(2.0**-33, 1 - 2.0**-24).double()
    truth = (-torch.log1p(-u)).log2() + 0.5287663729448977
    error = hasty.cpu().double() - truth
    assert -philox_triton.HASTE < error.min().item() < -0.05
    assert error.max().item() < 0.002
    plain = bits < 2**31
    assert error[plain].abs().max().item() < 0.002


# Tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "tuning"), [*((case, "tiny") for case in CASES), ("all in one batch", "narrow"), ("top-p", "narrow")]
)
def test_tokens_are_the_references(case: str, tuning: str, device: torch.device) -> None:
    tail, values = CASES[case]
    logits, c = mixed_logits(6, 409).to(device), columns(6, device, **values)
    expected = reference(logits, tail, c)
    assert_same(kernel(logits, tail, c, TUNINGS[tuning]), expected)
    assert expected[1].tolist() == [ROW_FINE] * 6
    if tail is Tail.TRUNCATION:  # the truncation has a say: some rows' plain draw does not survive it
        assert expected[0].tolist() != reference(logits, Tail.TEMPERATURE, c)[0].tolist()


@pytest.mark.parametrize(
    "change", [{"top_k": [6]}, {"top_p": [0.85]}, {"min_p": [0.3]}, {"temperature": [0.75]}, {"sample_index": [1]}]
)
def test_the_comparison_sees_a_wrong_parameter(change: dict[str, object], device: torch.device) -> None:
    values = {"top_k": [9, 0], "top_p": [0.5], "min_p": [0.01]}
    logits = torch.randn(48, 257, generator=torch.Generator().manual_seed(5)).to(device)
    right = reference(logits, Tail.TRUNCATION, columns(48, device, **values))
    assert right[0].tolist() != reference(logits, Tail.TRUNCATION, columns(48, device, **(values | change)))[0].tolist()


@pytest.mark.parametrize("case", CASES)
def test_columns_in_tables_of_slots(case: str, device: torch.device) -> None:
    """As a graph reads them: where the rows' slots say."""
    tail, values = CASES[case]
    logits, c = mixed_logits(6, 409).to(device), columns(6, device, **values)
    expected = kernel(logits, tail, c, TINY)
    assert_same(kernel(logits, tail, by_slot(c, [7, 2, 9, 0, 4, 5], 11), TINY), expected)
    elsewhere = kernel(
        logits, tail, by_slot(c, [2, 7, 9, 0, 4, 5], 11) | {"at": by_slot(c, [7, 2, 9, 0, 4, 5], 11)["at"]}
    )
    assert (elsewhere[0].tolist() == expected[0].tolist()) == (tail is Tail.GREEDY)


@pytest.mark.parametrize("vocab", [11, 97, 409])
@pytest.mark.parametrize("values", [{"top_k": [11, 0]}, {"top_k": [2, 60], "top_p": [1.0, 0.9], "min_p": [0, 0.02]}])
def test_small_vocabularies_in_default_sizes(vocab: int, values: dict[str, object], device: torch.device) -> None:
    """Fewer groups than k: their maxima say nothing about the k-th highest."""
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(vocab)).to(device) * 2
    c = columns(8, device, **values)
    expected = reference(logits, Tail.TRUNCATION, c)
    assert_same(kernel(logits, Tail.TRUNCATION, c), expected)
    assert expected[0].tolist() != logits.argmax(-1).tolist()


@pytest.mark.parametrize("tail", Tail)
def test_broken_rows(tail: Tail, device: torch.device) -> None:
    logits = torch.randn(7, 150, generator=torch.Generator().manual_seed(3))
    logits[0, 149], logits[1, 3], logits[2] = NAN, INF, -INF
    logits[3, 5] = 3e38
    logits[4] = NAN
    logits = logits.to(device)
    c = columns(7, device, temperature=[0.7, 0.7, 0.7, 0.01], top_k=[0, 5], top_p=[0.9, 1.0, 0.5])
    expected = reference(logits, tail, c)
    overflown = ROW_FINE if tail is Tail.GREEDY else ROW_NOTHING_LEFT
    assert expected[1].tolist() == [1, 1, 1, overflown, 1, 0, 0]
    assert_same(kernel(logits, tail, c, TINY), expected)


@pytest.mark.parametrize("tail", Tail)
def test_stages_that_left_nothing(tail: Tail, device: torch.device) -> None:
    logits = torch.randn(4, 70, generator=torch.Generator().manual_seed(3)).to(device)
    logits[1:3] = -INF
    sound = torch.tensor([True, True, False, False], device=device)
    c = columns(4, device, top_p=0.9)
    expected = reference(logits, tail, c, sound)
    assert expected[1].tolist() == [ROW_FINE, ROW_NOTHING_LEFT, ROW_BAD_LOGITS, ROW_BAD_LOGITS]
    assert_same(kernel(logits, tail, c, TINY, sound), expected)


@pytest.mark.parametrize("tail", Tail)
def test_a_mask_is_applied_where_the_logits_are_first_read(tail: Tail, device: torch.device) -> None:
    """Tokens, failures and logits are those of the mask before the draw. What it removes counts, too, for whether a
    row's raw logits are sound."""
    wide = torch.full((9, 400), 99.0)
    wide[:, :301] = mixed_logits(9, 301)
    words = torch.randint(-(2**31), 2**31, (9, 10), generator=torch.Generator().manual_seed(5)).to(torch.int32)
    words[0], words[1], words[5] = -1, 0, 0
    words[5, 9] = 1 << 12  # one id
    wide[6, 300], wide[7, 3], wide[8, :301] = NAN, INF, -INF
    words[6:8, [0, 9]] = 0
    wide, words = wide.to(device), words.to(device)
    logits = wide[:, :301]
    c = columns(9, device, temperature=[0.7, 1.3], top_k=[0, 0, 5], top_p=[0.9, 1.0], greedy=[False] * 4 + [True])
    masked = bitmask.mask_bits_(logits.clone(), words)
    expected = reference(masked, tail, c, logits.amax(-1).isfinite())
    assert expected[1].tolist() == [0, ROW_NOTHING_LEFT, 0, 0, 0, 0, *[ROW_BAD_LOGITS] * 3]
    assert expected[0][5] == 300
    tokens, failed = torch.full((9,), -7, device=device), torch.full((9,), -7, dtype=torch.int32, device=device)
    sample(logits, tail, tokens, failed, mask=words, tuning=TUNINGS["narrow"], **c)
    assert_same((tokens, failed), expected)
    assert torch.equal(logits, torch.where(masked.isnan(), -INF, masked))  # torch may leave NaN
    assert (wide[:, 301:] == 99).all()


def test_a_row_alone_and_padded_rows_of_a_wider_tensor(device: torch.device) -> None:
    tail, values = CASES["all in one batch"]
    wide = torch.full((6, 512), 99.0, device=device)
    wide[:, :301] = mixed_logits(6, 301).to(device)
    c = columns(6, device, **values)
    whole = kernel(wide[:, :301], tail, c, TINY)
    assert_same(whole, reference(wide[:, :301], tail, c))
    for r in (0, 3, 5):
        alone = {name: column[r : r + 1].contiguous() for name, column in c.items()}
        assert kernel(wide[r : r + 1, :301], tail, alone, TINY)[0].item() == whole[0][r].item()


def test_half_precision_is_read_as_it_is(device: torch.device) -> None:
    logits = mixed_logits(6, 301).half().to(device)
    tail, values = CASES["all in one batch"]
    c = columns(6, device, **values)
    assert_same(kernel(logits, tail, c, TINY), reference(logits, tail, c))


def test_codes_are_the_engines() -> None:
    codes = (sampling_triton.FINE, sampling_triton.BAD_LOGITS, sampling_triton.NOTHING_LEFT)
    assert codes == (ROW_FINE, ROW_BAD_LOGITS, ROW_NOTHING_LEFT)


def test_no_rows(device: torch.device) -> None:
    out = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int32, device=device)
    sample(torch.empty(0, 50, device=device), Tail.TRUNCATION, *out, **columns(0, device))


# Full size ------------------------------------------------------------------------------------------------------------

VOCAB = 151936


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 256])
@pytest.mark.parametrize("case", CASES)
def test_full_size(case: str, rows: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    tail, values = CASES[case]
    if case == "large top-k":
        values = {"top_k": [300, 5000, 100000], "top_p": [0.7, 1.0]}
    logits, c = mixed_logits(rows, VOCAB).to(device, dtype), columns(rows, device, **values)
    assert_same(kernel(logits, tail, c), reference(logits, tail, c))


@pytest.mark.gpu
def test_many_draws_at_full_size() -> None:
    """Enough rows of a flat distribution to meet near ties and every way of `_finish`."""
    device = torch.device("cuda")
    for seed in range(4):
        logits = torch.randn(512, VOCAB, device=device, generator=torch.Generator("cuda").manual_seed(seed))
        c = columns(512, device, top_p=[0.95, 0.5, 0.9, 0.2], min_p=[0.0, 0.0, 0.02], top_k=[0, 0, 0, 0, 50])
        assert_same(kernel(logits, Tail.TRUNCATION, c), reference(logits, Tail.TRUNCATION, c))
        assert_same(kernel(logits, Tail.TEMPERATURE, c), reference(logits, Tail.TEMPERATURE, c))


@pytest.mark.gpu
@pytest.mark.parametrize("tail", Tail)
def test_in_a_graph_without_waiting(tail: Tail) -> None:
    """Captured once and replayed on other logits and parameters; nothing waits for the device."""
    device = torch.device("cuda")
    logits = mixed_logits(16, VOCAB).to(device)
    c = columns(16, device, top_k=50, top_p=0.95)
    tokens = torch.zeros(16, dtype=torch.int64, device=device)
    failed = torch.zeros(16, dtype=torch.int32, device=device)
    sample(logits, tail, tokens, failed, **c)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(logits, tail, tokens, failed, **c)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sample(logits, tail, tokens, failed, **c)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    other = columns(16, device, greedy=[True, False], top_k=[0, 1000, 20], top_p=[0.3, 1.0], min_p=[0.0, 0.2])
    for name, column in other.items():
        c[name].copy_(column)
    logits.copy_(mixed_logits(16, VOCAB).flip(0).to(device))
    logits[7, 9] = NAN
    graph.replay()
    assert_same((tokens, failed), reference(logits, tail, other))
