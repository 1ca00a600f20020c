"""Sums over ranks against torch. One process plays one rank after the other: the others' signals are set beforehand,
as if they had come to the meeting already."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from nanoengine.kernels import all_reduce as reference
from nanoengine.kernels.all_reduce_triton import MAX_PROGRAMS, Peers, all_reduce_add, highest


def peers_of(rank: int, buffers: list[Tensor], turn: int = 0) -> Peers:
    """What `rank` sees when all others have come to the meeting behind number `turn`."""
    device, size = buffers[0].device, len(buffers)
    signals = [torch.full((size, MAX_PROGRAMS), turn + 1, dtype=torch.int32, device=device) for _ in buffers]
    peers = Peers(
        rank=rank,
        size=size,
        data=torch.tensor([b.data_ptr() for b in buffers], device=device),
        signals=torch.tensor([s.data_ptr() for s in signals], device=device),
        turns=torch.full((MAX_PROGRAMS,), turn, dtype=torch.int32, device=device),
    )
    kept.append((buffers, signals))
    return peers


kept: list[object] = []  # the kernels know addresses only


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 1000), (5, 512)])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("with_residual", [True, False])
def test_sum(rand, rows, width, size, with_residual) -> None:
    offset = 2048
    buffers = [rand(offset + rows * width) for _ in range(size)]
    partials = [b[offset:].view(rows, width) for b in buffers]
    residual = rand(rows, width) if with_residual else None
    expected = reference.all_reduce_add(partials, residual)
    for rank in range(size):
        out = all_reduce_add(peers_of(rank, buffers), offset, partials[rank], residual)
        assert torch.equal(out, expected)


def test_more_tiles_than_programs(rand) -> None:
    buffers = [rand(3 * 2048 + 5) for _ in range(2)]
    partials = [b.view(1, -1) for b in buffers]
    from nanoengine.kernels import all_reduce_triton

    before, all_reduce_triton.MAX_PROGRAMS = all_reduce_triton.MAX_PROGRAMS, 2
    try:
        peers = peers_of(0, buffers)
        out = all_reduce_add(peers, 0, partials[0], None)
    finally:
        all_reduce_triton.MAX_PROGRAMS = before
    assert torch.equal(out, reference.all_reduce_add(partials, None))


@pytest.mark.parametrize("turn", [0, 7, 2**31 - 1])
def test_highest_key_and_its_meeting(device, turn) -> None:
    half = 8
    scores = [torch.tensor([1.5, -2.0, 3.0, float("-inf"), -0.0]), torch.tensor([1.5, -1.0, float("inf"), -5.0, 0.0])]
    ids = [torch.tensor([4, 1, 2, 0, 3]), torch.tensor([10, 11, 12, 13, 14])]
    keys = [
        reference.pack_keys(s.to(device), i.to(device), torch.zeros(5, device=device))
        for s, i in zip(scores, ids, strict=True)
    ]
    expected = reference.highest(keys)
    for rank in range(2):
        buffers = [torch.zeros(2, half, dtype=torch.int64, device=device) for _ in range(2)]
        at = (turn + 1) & 1
        buffers[1 - rank][at, :5] = keys[1 - rank]
        wrapped = turn + 1 if turn < 2**31 - 1 else -(2**31)
        peers = peers_of(rank, buffers)
        peers.turns.fill_(turn)
        kept[-1][1][rank].fill_(wrapped)  # type: ignore[index]
        out = highest(peers, keys[rank], half)
        assert torch.equal(out, expected)
        assert peers.turns[0].item() == wrapped
        assert torch.equal(buffers[rank][at, :5], keys[rank])
    tokens, failed = reference.answer(expected)
    assert tokens.tolist() == [4, 11, 0, 13, 3]  # ties go to the lowest id, also of -0.0 and 0.0
    assert failed.tolist() == [0, 0, 2, 0, 0]
    assert (expected < reference.BAD_KEY).all()


@pytest.mark.parametrize("ours", [0, 1])
def test_it_waits_for_the_others(device, ours) -> None:
    """A rank that has not come: the kernel must not go on. Seen from a signal of the meeting before."""
    import threading

    buffers = [torch.ones(64, device=device) for _ in range(2)]
    peers = peers_of(ours, buffers)
    signal = kept[-1][1][ours]  # type: ignore[index]
    signal.zero_()
    if device.type == "cuda":
        pytest.skip("the interpreter's launch can be watched, a GPU's cannot without a second stream")
    done: list[Tensor] = []
    thread = threading.Thread(
        target=lambda: done.append(all_reduce_add(peers, 0, buffers[ours].view(1, -1), None)), daemon=True
    )
    thread.start()
    thread.join(0.3)
    assert not done
    signal.fill_(1)
    thread.join(60)
    assert len(done) == 1
    assert (done[0] == 2).all()
