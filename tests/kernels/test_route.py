"""Routers in Triton and in torch: which experts a token goes to, and what they weigh."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from nanoengine.kernels import experts as reference
from nanoengine.kernels import route_triton
from nanoengine.kernels.experts import RealTokens, Routing
from nanoengine.kernels.ops import TritonOps
from nanoengine.kernels.rms_norm import add_rms_norm

ROUTES = [reference.route, route_triton.route]
ROUTINGS = {
    "softmax": Routing(top_k=3),
    "renormalised": Routing(top_k=2, renormalise=True),
    "of the top": Routing(top_k=4, scoring="softmax_of_top"),
    "all experts": Routing(top_k=8, scoring="softmax_of_top"),
    "sigmoid": Routing(top_k=5, scoring="sigmoid", renormalise=True, scale=2.5),
    "groups by their best": Routing(top_k=3, groups=4, top_groups=2, scale=16.0),
    "groups by two": Routing(
        top_k=4, scoring="sigmoid", groups=4, top_groups=2, group_best=2, renormalise=True, scale=2.5
    ),
}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("with_correction", [False, True])
@pytest.mark.parametrize("experts", [8, 20, 32])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_agrees(device, routing, experts, with_correction) -> None:
    """With few different logits, so that most rows have ties, and with rows of NaN and infinities."""
    random = torch.Generator().manual_seed(experts)
    logits = torch.randint(-3, 4, (9, experts), generator=random).float()
    logits[5], logits[6, 1], logits[7, 2], logits[8] = NAN, NAN, -INF, -INF
    correction = torch.randint(-2, 3, (experts,), generator=random).float() / 4 if with_correction else None
    args = [None if each is None else each.to(device) for each in (logits, correction)]
    ids, weights = route_triton.route(args[0], routing, args[1])
    expected_ids, expected = reference.route(args[0], routing, args[1])
    assert ids.dtype == torch.int32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, equal_nan=True)
    assert weights[:5].isfinite().all()


@pytest.mark.parametrize("route", ROUTES)
def test_a_tie_goes_to_the_lower_index(device, route) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0], [7.0] * 6, [-1.0, -1.0, -1.0, 0.0, -1.0, 0.0]])
    for scoring in ("softmax", "sigmoid", "softmax_of_top"):
        ids, _ = route(logits.to(device), Routing(top_k=4, scoring=scoring))
        assert ids.tolist() == [[1, 3, 2, 4], [0, 1, 2, 3], [3, 5, 0, 1]]
    ids, _ = route(logits[1:2].to(device), Routing(top_k=3, groups=3, top_groups=2))
    assert ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("route", ROUTES)
def test_scores_that_underflow_are_told_apart_by_their_logits(device, route) -> None:
    """Far below the highest all softmax scores are 0, and equal."""
    logits = torch.tensor([[200.0, 1.0, 3.0, 2.0]], device=device)
    ids, weights = route(logits, Routing(top_k=3))
    assert ids.tolist() == [[0, 2, 3]]
    assert weights.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_a_tokens_experts_differ_whatever_its_logits_are(device, route, routing) -> None:
    logits = torch.tensor([[NAN] * 8, [-INF] * 8, [INF] * 8, [NAN, INF, -INF, 0.0, NAN, NAN, 1.0, -INF]], device=device)
    ids, _ = route(logits, routing)
    for row in ids.tolist():
        assert len(set(row)) == routing.top_k
        assert set(row) <= set(range(8))


@pytest.mark.parametrize("route", ROUTES)
def test_a_correction_chooses_and_does_not_weigh(device, route) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=device)
    correction = torch.tensor([0.0, 0.0, 0.0, 9.0], device=device)
    ids, weights = route(logits, Routing(top_k=2, scoring="sigmoid"), correction)
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(weights, logits[:, [3, 0]].sigmoid())


@pytest.mark.parametrize("route", ROUTES)
def test_padding_goes_nowhere(device, route) -> None:
    """Also where its logits are NaN; by its place in the cache, of which there may be more than tokens."""
    logits = torch.arange(20.0, device=device).view(5, 4) % 7
    logits[1], logits[4] = NAN, NAN
    places = torch.tensor([16, 0, 31, 64, 15, 99, 3], device=device)
    ids, weights = route(logits, Routing(top_k=2), None, RealTokens(places, 16))
    alone, shares = route(logits[[0, 2, 3]], Routing(top_k=2))
    assert torch.equal(ids[[0, 2, 3]], alone)
    assert torch.equal(weights[[0, 2, 3]], shares)
    assert ids[[1, 4]].tolist() == [[4, 4], [4, 4]]
    assert weights[[1, 4]].tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("route", ROUTES)
def test_no_token(device, route) -> None:
    ids, weights = route(torch.empty(0, 8, device=device), Routing(top_k=3))
    assert ids.shape == weights.shape == (0, 3)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("with_residual", "with_bias"), [(False, False), (True, True)])
def test_a_norm_in_front_of_the_router(rand, assert_close, rows, with_residual, with_bias) -> None:
    """Experts that do not fill a program, a width that is no power of two, strided rows."""
    hidden, experts = 72, 19
    wide = rand(rows, 2 * hidden)
    x, residual = wide[:, :hidden], wide[:, hidden:] if with_residual else None
    weight, norm_weight, bias = rand(experts, hidden), rand(hidden), rand(experts) if with_bias else None
    before = wide.clone()
    normed, total, logits = route_triton.norm_router(x, residual, norm_weight, 1e-6, weight, bias)
    assert torch.equal(wide, before)
    expected, stream = add_rms_norm(x, residual, norm_weight, 1e-6)
    assert torch.equal(total, stream)
    assert_close(normed, expected)
    assert logits.dtype == torch.float32
    assert_close(logits, reference.router_logits(normed, weight, bias))


@pytest.mark.parametrize("rows", [1, 2, 9, 33, 70])
@pytest.mark.parametrize("with_bias", [False, True])
def test_logits_are_not_rounded(rand, rows, with_bias) -> None:
    """By whichever kernel; sums of products that 16 bits do not hold."""
    x, weight, bias = rand(rows, 40), rand(12, 40), rand(12) if with_bias else None
    logits = TritonOps().router(x, weight, bias)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference.router_logits(x, weight, bias), rtol=2e-6, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [128, 256])
def test_agrees_large(device, experts) -> None:
    logits = torch.randn(4096, experts, device=device)
    correction = torch.randn(experts, device=device)
    for routing in (
        Routing(top_k=8, renormalise=True),
        Routing(top_k=8, scoring="sigmoid", groups=8, top_groups=4, group_best=2, renormalise=True, scale=2.5),
    ):
        ids, weights = route_triton.route(logits, routing, correction)
        expected_ids, expected = reference.route(logits, routing, correction)
        same = (ids == expected_ids).all(1)
        assert same.float().mean() > 0.999  # another rounding of two scores may order them otherwise
        torch.testing.assert_close(weights[same], expected[same], rtol=1e-5, atol=1e-7)
