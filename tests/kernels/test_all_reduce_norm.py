"""Sums over ranks with their norm against torch. One process plays one rank after the other: what the others write is
written beforehand, as if they had begun the sum already."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from nanoengine.kernels import all_reduce as reference
from nanoengine.kernels.all_reduce_norm_triton import Inboxes, all_reduce_norm
from nanoengine.kernels.all_reduce_triton import MAX_PROGRAMS, Peers
from nanoengine.kernels.matvec_large_triton import LargeTile, large
from nanoengine.kernels.matvec_streamed_triton import StreamedTile, streamed
from nanoengine.kernels.matvec_triton import GemvTile, gemv, product_parts

EPS = 1e-5
HALF = 4096
"""Bytes of a rank's part of an inbox."""


def words_of(values: Tensor, turn: int) -> Tensor:
    return (values.float().view(torch.int32).long() & 0xFFFFFFFF) | (turn << 32)


class Ranks:
    """Ranks of one process, with all their memory."""

    def __init__(self, size: int, sent: bool, device: torch.device, turn: int = 0) -> None:
        self.size, self.sent = size, sent
        self.data = [torch.zeros(2, size, HALF // 8, dtype=torch.int64, device=device) for _ in range(size)]
        self.signals = [torch.full((size, MAX_PROGRAMS), turn, dtype=torch.int32, device=device) for _ in range(size)]
        self.turns = [torch.full((MAX_PROGRAMS,), turn, dtype=torch.int32, device=device) for _ in range(size)]

    def inboxes(self, rank: int) -> Inboxes:
        places = [
            torch.tensor([t.data_ptr() for t in of], device=self.turns[0].device) for of in (self.data, self.signals)
        ]
        return Inboxes(Peers(rank, self.size, *places, self.turns[rank]), HALF)

    def part(self, rank: int, sender: int, turn: int, like: Tensor) -> Tensor:
        """Where a rank finds what another sends."""
        kind = torch.int64 if self.sent else like.dtype
        return self.data[rank][turn & 1, sender].view(kind)[: like.numel()].view(like.shape)

    def as_sent(self, product: Tensor, turn: int) -> Tensor:
        return words_of(product, turn) if self.sent else product

    def arrived(self, rank: int, products: list[Tensor], turn: int) -> None:
        """The others have come."""
        for sender in range(self.size):
            if sender != rank:
                self.part(rank, sender, turn, products[sender]).copy_(self.as_sent(products[sender], turn))
                self.signals[rank][sender].fill_(turn)


def following(turn: int) -> int:
    wrapped = (turn + 1 + 2**31) % 2**32 - 2**31
    return wrapped or 2


@pytest.mark.parametrize(("size", "rows", "width", "count"), [(2, 1, 100, 1), (2, 3, 128, 2), (3, 2, 64, 1)])
@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("turn", [0, 8, 2**31 - 1, -2])
def test_sum_and_norm(rand, assert_close, dtype, device, size, rows, width, count, sent, turn) -> None:
    """Turns behind `turn`; of 2**31 - 1 it wraps around, and 0 is left out."""
    ranks, parts = Ranks(size, sent, device, turn), [rand(count, rows, width) for _ in range(size)]
    if count > 1 or sent:
        parts = [each.float() for each in parts]
    products = [each.float().sum(0).to(torch.float32 if sent else dtype) for each in parts]
    residual, weight = rand(rows, width), rand(width).float()
    total, normed = reference.all_reduce_norm([each.unsqueeze(0) for each in products], residual, weight, EPS)
    for rank in range(size):
        now = turn
        for _ in range(2):  # the second sum uses the other half
            now = following(now)
            ranks.arrived(rank, products, now)
            out, y = (torch.full_like(residual, float("nan")) for _ in range(2))
            all_reduce_norm(
                ranks.inboxes(rank), parts[rank], residual, weight, EPS, sent=sent, out=out, normed=y
            )  # fmt: skip
            assert torch.equal(out, total)
            assert_close(y, normed)
            assert (ranks.turns[rank] == now).all()
            for other in range(size):
                if other != rank and not sent:
                    assert torch.equal(ranks.part(other, rank, now, products[rank]), products[rank])
                    assert (ranks.signals[other][rank, :rows] == now).all()


@pytest.mark.parametrize("late", ["copies", "words", "one word", "the other half"])
def test_it_waits_for_the_others(device, late) -> None:
    """Of a rank that has not come, or has sent all but one value, or did so two sums ago, nothing is added."""
    if device.type == "cuda":
        pytest.skip("the interpreter's launch can be watched, a GPU's cannot without a second stream")
    sent, turn = late != "copies", 5
    ranks, ones = Ranks(2, sent, device, turn - 1), torch.ones(1, 1, 32)
    out, zeros = torch.zeros(1, 32), torch.zeros(1, 32)
    ranks.arrived(0, [ones[0], ones[0]], turn)
    theirs = ranks.part(0, 1, turn, ones[0])
    if late == "copies":
        ranks.signals[0].fill_(turn - 1)
    elif late == "one word":
        theirs[0, 17] = 0
    elif late == "words":
        theirs.copy_(words_of(ones[0], turn - 2))
    else:
        ranks.part(0, 1, turn + 1, ones[0]).copy_(theirs)
        theirs.zero_()

    def run() -> None:
        all_reduce_norm(ranks.inboxes(0), ones, zeros, ones[0, 0], EPS, sent=sent, out=out, normed=zeros.clone())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert not out.any()
    ranks.arrived(0, [ones[0], ones[0]], turn)
    thread.join(60)
    assert not thread.is_alive()
    assert (out == 2).all()


@pytest.mark.parametrize("sent", [True, False])
def test_what_is_normalised_is_the_rounded_sum(rand, device, sent, dtype) -> None:
    """As a norm behind the sum reads it: of the sum before its rounding a quarter of the values would differ."""
    ranks, parts = Ranks(2, sent, device), [rand(1, 1, 500) for _ in range(2)]
    ranks.arrived(0, [each[0] for each in parts], 1)
    out, y, weight, residual = rand(1, 500), rand(1, 500), rand(500), rand(1, 500)
    all_reduce_norm(ranks.inboxes(0), parts[0], residual, weight, EPS, sent=sent, out=out, normed=y)
    wide = out.float()
    expected = wide * torch.rsqrt(wide.square().mean() + EPS) * weight.float()
    assert (y != expected.to(dtype)).float().mean() < (0.4 if dtype == torch.float32 else 0.02)


def test_what_does_not_fit_is_refused(device) -> None:
    parts = torch.zeros(1, 1, HALF // 8 + 1, device=device)
    for sent, given in ((True, parts), (False, torch.zeros(1, MAX_PROGRAMS + 1, 4, device=device))):
        out = torch.empty_like(given[0])
        with pytest.raises(AssertionError):
            all_reduce_norm(
                Ranks(2, sent, device).inboxes(0), given, out, given[0, 0], EPS, sent=sent, out=out, normed=out
            )


@pytest.mark.parametrize("rows", [1, 2, "streamed"])
def test_a_product_that_sends_itself(rand, assert_close, dtype, device, rows) -> None:
    """Its words are what it wrote itself, in the half of the sum that follows, and that sum only waits."""
    streams, rows = rows == "streamed", 1 if rows == "streamed" else rows
    ranks = Ranks(2, True, device, 6)
    x, weight = [rand(rows, 48) for _ in range(2)], [rand(40, 48) for _ in range(2)]
    residual, norm, parts = rand(rows, 40), rand(40), []
    for rank in range(2):
        part = torch.empty(1, rows, 40, device=device)
        if streams:
            tile = StreamedTile(rows=2, stages=3, warps=4, programs=5)
            streamed(x[rank], weight[rank], out=part[0], tile=tile, send=ranks.inboxes(rank))
        else:
            gemv(x[rank], weight[rank], None, out=part[0], tile=GemvTile(4, 2), send=ranks.inboxes(rank))
        assert_close(part[0], x[rank].float() @ weight[rank].float().T, 1e-5)
        assert torch.equal(ranks.part(1 - rank, rank, 7, part[0]), words_of(part[0], 7))
        assert (ranks.turns[rank] == 6).all()  # the sum counts
        parts.append(part)
    total, normed = reference.all_reduce_norm(parts, residual, norm, EPS)
    for rank in range(2):
        out, y = torch.empty_like(total), torch.empty_like(total)
        all_reduce_norm(ranks.inboxes(rank), parts[rank], residual, norm, EPS, sent=True, out=out, normed=y)
        assert torch.equal(out, total)
        assert_close(y, normed)


def test_which_products_are_sent_or_in_parts(rand, assert_close, device) -> None:
    """Sent: those of one or two large rows without tensor cores. What begins is called once."""
    ranks, begun = Ranks(2, True, device), []  # kernels know addresses only: it must stay
    inboxes = ranks.inboxes(0)

    def begin() -> Inboxes:
        begun.append(1)
        return inboxes

    sent = product_parts(rand(1, 2080).float(), rand(32, 2080).float(), begin)
    assert sent is not None
    assert sent.dtype == torch.float32
    assert len(begun) == 1
    assert product_parts(rand(3, 64), rand(32, 64), begin) is None
    assert product_parts(rand(1, 64), rand(32, 64)) is None
    assert len(begun) == 1
    x, weight = rand(3, 512), rand(128, 512)
    parts = large(x, weight, tile=LargeTile(64, 128, warps=4, stages=3, splits=2), in_parts=True)
    assert parts.shape == (2, 3, 128)
    assert_close(parts.sum(0), x.float() @ weight.float().T, 1e-3)


@pytest.mark.parametrize("gate", [None, "silu"])
def test_a_norm_that_is_known_is_taken_once_and_only_for_its_sum(rand, device, gate) -> None:
    from nanoengine.kernels.ops import TritonOps

    ops, x, weight, product = TritonOps(), rand(3, 64), rand(64), rand(32, 64)
    given = {"x": x, "residual": None, "norm_weight": weight, "eps": EPS, "weight": product, "gate": gate}
    plain, known = ops.norm_linear(**given)[0], torch.full_like(x, 0.25)
    for other in ({"x": x.clone()}, {"residual": x}, {"norm_weight": weight.clone()}):
        expected = ops.norm_linear(**{**given, **other})[0]
        ops.keep_normed(x, weight, known)
        assert torch.equal(ops.norm_linear(**{**given, **other})[0], expected)
        assert torch.equal(ops.norm_linear(**given)[0], plain)  # it was dropped
    ops.keep_normed(x, weight, known)
    y, total = ops.norm_linear(**given)
    assert total is x
    wide = known.float() @ product.float().T
    expected = torch.nn.functional.silu(wide[:, :16]) * wide[:, 16:] if gate else wide
    assert (y.float() - expected).norm() <= 2e-3 * expected.norm()
