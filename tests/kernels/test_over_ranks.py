"""Products of one row that end with their sum over ranks, against torch. One process plays one rank after the other:
what the others send is written beforehand. Those by copies, in Gluon, are in `test_matmul`."""

from __future__ import annotations

import itertools
import sys
import threading
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import uninterpreted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from nanoengine.kernels import all_reduce as reference
from nanoengine.kernels import inboxes_triton, matvec_streamed_triton, matvec_triton
from nanoengine.kernels.inboxes_triton import PLACES, Inboxes
from nanoengine.kernels.matvec_streamed_triton import StreamedTile, streamed
from nanoengine.kernels.matvec_triton import GemvTile, gemv, matvec_over_ranks

HALF = 4096
"""Bytes of a rank's part of an inbox."""
KERNELS = {
    "held": partial(gemv, bias=None, tile=GemvTile(4, 2)),
    "streamed": partial(streamed, tile=StreamedTile(rows=2, stages=3, warps=4, programs=5)),
}


def words_of(values: Tensor, turn: int) -> Tensor:
    return (values.float().view(torch.int32).long() & 0xFFFFFFFF) | (turn << 32)


class Ranks:
    """Ranks of one process, with all their memory."""

    def __init__(self, size: int, device: torch.device, turn: int = 0) -> None:
        self.size = size
        self.words = [torch.zeros(2, size, HALF // 8, dtype=torch.int64, device=device) for _ in range(size)]
        self.turns = [torch.full((PLACES,), turn, dtype=torch.int32, device=device) for _ in range(size)]
        self.addresses = torch.tensor([each.data_ptr() for each in self.words], device=device)

    def inboxes(self, rank: int) -> Inboxes:
        none = self.addresses
        return Inboxes(rank, self.size, self.addresses, none, none, self.turns[rank], (HALF, HALF))

    def part(self, rank: int, sender: int, turn: int, width: int) -> Tensor:
        """Where a rank finds what another sends."""
        return self.words[rank][turn & 1, sender, :width]

    def arrived(self, rank: int, products: list[Tensor], turn: int) -> None:
        """The others have sent."""
        for sender in range(self.size):
            if sender != rank:
                self.part(rank, sender, turn, products[sender].numel()).copy_(words_of(products[sender][0], turn))


def following(turn: int) -> int:
    wrapped = (turn + 1 + 2**31) % 2**32 - 2**31
    return wrapped or 2


def product_of(kernel: str, x: Tensor, weight: Tensor) -> Tensor:
    """This rank's alone, as the kernel sums it: float32."""
    y = torch.empty(1, len(weight), dtype=torch.float32, device=x.device)
    KERNELS[kernel](x, weight, out=y)
    return y


@pytest.mark.half
@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("turn", [0, 8, 2**31 - 1, -2])
def test_sum(rand, assert_close, device, dtype, kernel, size, turn) -> None:
    """Turns behind `turn`; of 2**31 - 1 it wraps around, and 0 is left out. The second sum uses the other half."""
    ranks, add = Ranks(size, device, turn), rand(1, 42)
    given = [(rand(1, 48), rand(42, 48)) for _ in range(size)]
    products = [product_of(kernel, x, weight) for x, weight in given]
    expected = reference.all_reduce_add(products, add).to(dtype)
    for rank, (x, weight) in enumerate(given):
        now = turn
        for _ in range(2):
            now = following(now)
            ranks.arrived(rank, products, now)
            out = torch.full_like(add, float("nan"))
            KERNELS[kernel](x, weight, add=add, out=out, inboxes=ranks.inboxes(rank))
            assert torch.equal(out, expected)
            assert (ranks.turns[rank] == now).all()
            for other in range(size):
                if other != rank:
                    assert torch.equal(ranks.part(other, rank, now, 42), words_of(products[rank][0], now))
    exact = sum(x.float() @ weight.float().T for x, weight in given) + add.float()
    assert_close(expected, exact)


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("late", ["all", "one word", "the other half"])
def test_it_waits_for_the_others(device, kernel, late) -> None:
    """Of a rank that sent two sums ago, or all but one value, or into the other half, nothing is added."""
    if device.type == "cuda":
        pytest.skip("the interpreter's launch can be watched, a GPU's cannot without a second stream")
    turn, ranks = 5, Ranks(2, device, 4)
    x, weight, ones = torch.ones(1, 4), torch.ones(32, 4), torch.ones(1, 32)
    out = torch.zeros(1, 32)
    ranks.arrived(0, [ones, ones], turn)
    theirs = ranks.part(0, 1, turn, 32)
    if late == "one word":
        theirs[17] = 0
    elif late == "all":
        theirs.copy_(words_of(ones[0], turn - 2))
    else:
        ranks.part(0, 1, turn + 1, 32).copy_(theirs)
        theirs.zero_()

    def run() -> None:
        KERNELS[kernel](x, weight, add=ones, out=out, inboxes=ranks.inboxes(0))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    assert not out[0, 17]
    ranks.arrived(0, [ones, ones], turn)
    thread.join(60)
    assert not thread.is_alive()
    assert (out == 6).all()


def test_which_products_are_summed_here(rand, device, monkeypatch) -> None:
    """Those of one row without tensor cores, with a place for each program. What begins is called once."""
    ranks, begun = Ranks(2, device), []  # kernels know addresses only: it must stay
    inboxes = ranks.inboxes(0)

    def begin() -> Inboxes:
        begun.append(1)
        return inboxes

    x, weight, add = rand(1, 2080).float(), rand(32, 2080).float(), rand(1, 32).float()
    ranks.arrived(0, [add, add], 1)
    assert matvec_over_ranks(x, weight, add, begin) is not None
    assert len(begun) == 1
    assert matvec_over_ranks(rand(2, 2080).float(), weight, rand(2, 32).float(), begin) is None
    monkeypatch.setattr("nanoengine.kernels.matvec_triton.PLACES", 1)
    assert matvec_over_ranks(x, weight, add, begin) is None
    assert len(begun) == 1


@pytest.mark.parametrize(
    ("outputs", "k", "streams", "kernel"),
    [
        (4096, 2048, True, "gemv"),  # attention's output of one of two ranks of Qwen3-8B, and down
        (4096, 6144, True, "streamed"),
        (4096, 6144, False, None),  # 4,096 programs
        (5120, 4096, True, "streamed"),  # of Qwen3-32B
        (5120, 12800, True, "streamed"),
        (8192, 4096, True, "streamed"),  # of Llama-3-70B
        (8192, 14336, True, "streamed"),
    ],
)
def test_large_weights_are_streamed(device, monkeypatch, outputs, k, streams, kernel) -> None:
    """By the tiles of real layers: what counts is a place for each program of the kernel that is launched."""
    used: list[str] = []
    for name in ("gemv", "streamed"):
        made = (torch.zeros(1, outputs),) if name == "gemv" else torch.zeros(1, outputs)
        monkeypatch.setattr(
            f"nanoengine.kernels.matvec_triton.{name}",
            lambda *_, name=name, made=made, **__: (used.append(name), made)[1],
        )

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    given = (empty(1, k), empty(outputs, k), empty(1, outputs))
    found = matvec_over_ranks(*given, lambda: Ranks(2, device).inboxes(0), streams=streams)
    assert (found is not None, used) == (kernel is not None, [kernel] if kernel else [])


def test_a_place_for_each_program_of_a_ring(device, monkeypatch) -> None:
    monkeypatch.setattr("nanoengine.kernels.matvec_triton.streamed", lambda *_, **__: "streamed")
    given = [torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((1, 6144), (4096, 6144), (1, 4096))]
    for places, taken in ((512, True), (511, False)):
        monkeypatch.setattr("nanoengine.kernels.matvec_triton.PLACES", places)
        found = matvec_over_ranks(*given, lambda: Ranks(2, device).inboxes(0), streams=True)
        assert (found is not None) is taken, places


MUTANTS = {
    "always the same half": ("((turn & 1) * SIZE", "((turn & 0) * SIZE"),
    "turns of its own place only": ("mask=i < PLACES", "mask=i == tl.program_id(0)"),
    "0 is a turn": ("tl.where(turn == 0, 2, turn)", "turn"),
    "no turn goes with a value": ("| (turn.to(tl.int64) << 32)", ""),
    "another rank's place": ("turn, RANK, capacity, SIZE) + at, words", "turn, peer, capacity, SIZE) + at, words"),
}
PATIENT = ("while tl.max(", "if tl.max(")
"""All has come: so what waits for ever would only hide what is wrong."""


def check(kernel: str, device: torch.device, turn: int) -> None:
    """Of three ranks; in the other half there is something else of this turn."""
    ranks, now = Ranks(3, device, turn), following(turn)
    x, weight, add = (torch.ones(*shape, device=device) for shape in ((1, 8), (42, 8), (1, 42)))
    ranks.arrived(1, [torch.full((1, 42), float(i)) for i in (3, 0, 5)], now)
    for sender in (0, 2):
        ranks.part(1, sender, now + 1, 42).copy_(words_of(torch.full((42,), 9.0), now))
    out = torch.zeros(1, 42, device=device)
    KERNELS[kernel](x, weight, add=add, out=out, inboxes=ranks.inboxes(1))
    assert (out == 17).all()
    assert (ranks.turns[1] == now).all()
    for other in (0, 2):
        assert torch.equal(ranks.part(other, 1, now, 42), words_of(torch.full((42,), 8.0), now))


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("name", ["none", *MUTANTS])
def test_mutants_are_found(device, monkeypatch, tmp_path, kernel, name) -> None:
    if device.type == "cuda":
        pytest.skip("changed for the interpreter, which waits in a loop of tensors")
    monkeypatch.setitem(sys.modules, "mutant", ModuleType("mutant"))  # which a data class asks for
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    made = uninterpreted.mutant(inboxes_triton, {"patient": PATIENT}, "patient", tmp_path / "first")
    if name != "none":
        made = uninterpreted.mutant(made, MUTANTS, name, tmp_path / "second")
    for module, part in itertools.product((matvec_triton, matvec_streamed_triton), ("next_turn", "over_ranks")):
        monkeypatch.setattr(module, part, getattr(made, part))
    found = 0
    for turn in (5, 6, -1):
        try:
            check(kernel, device, turn)
        except AssertionError:
            found += 1
    assert (found > 0) == (name != "none")


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_a_step_may_be_withdrawn_when_all_memory_is_there(rand, device, monkeypatch, kernel) -> None:
    """What begins waits for the other ranks, and may raise on all of them: then nothing has been sent. Behind it
    nothing may fail on one rank alone, as an allocation would."""
    ranks, made = Ranks(2, device), list[str]()

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "empty" in str(func) or "zeros" in str(func):
                made.append("memory")
            return func(*args, **(kwargs or {}))

    def begin() -> Inboxes:
        made.append("begin")
        if made.count("begin") == 1:
            raise MemoryError
        return inboxes

    inboxes, tile = ranks.inboxes(0), StreamedTile(rows=2, stages=3, warps=4, programs=5)
    monkeypatch.setattr(matvec_triton, "streamed_tile_of", lambda *_, **__: tile if kernel == "streamed" else None)
    x, weight, add = rand(1, 2080).float(), rand(32, 2080).float(), rand(1, 32).float()
    with pytest.raises(MemoryError):
        matvec_over_ranks(x, weight, add, begin, streams=True)
    assert not ranks.turns[0].any()
    assert not ranks.words[1].any()
    module, name = (matvec_triton, "_gemv_kernel") if kernel == "held" else (matvec_streamed_triton, "_streamed_kernel")
    monkeypatch.setattr(module, name, {(32 if kernel == "held" else 4,): lambda *_, **__: made.append("launch")})
    with Allocations():
        matvec_over_ranks(x, weight, add, begin, streams=True)
    assert made == ["begin", "memory", "begin", "launch"]
