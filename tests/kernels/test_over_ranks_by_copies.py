"""Sums over ranks by copies: what a program of `inboxes_gluon` does, and in which order. Its Python runs on the CPU
with another `gl`; whether threads wait for each other only a GPU shows (`test_matmul`, and `tests/gpu`)."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from nanoengine.kernels import inboxes_triton
from nanoengine.kernels.inboxes_triton import PLACES

TEXT = Path(inboxes_triton.__file__).with_name("inboxes_gluon.py").read_text()
TEXT = TEXT[TEXT.index("@gluon.jit") : TEXT.index("def by_copies")].replace("@gluon.jit\n", "")
"""The kernel's functions."""

ROWS, WIDTH, SIZE, RANK, PROGRAMS, HALF = 3, 8, 3, 1, 5, 256
MUTANTS = {
    "always the same half": ("((turn & 1) * SIZE", "((turn & 0) * SIZE"),
    "turns of its own place only": ("mask=i < PLACES", "mask=i == place"),
    "a signal in front of the barrier": ("    barrier()  # every", "    pass  # every"),
    "copies read in front of the barrier": ("    barrier()\n    total", "    total"),
    "no wait": ("& -4) != 0", "& 0) != 0"),
    "a wait without an end of old signals": ("- turn) & -4) != 0", "- turn)) < 0"),
    "a wait for this turn alone": ("& -4) != 0", "& -1) != 0"),
    "0 is a turn": ("gl.where(turn == 0, 2, turn)", "turn"),
    "a place of another program": ("RANK * PLACES + place, turn", "RANK * PLACES + place + 1, turn"),
}


@dataclass
class Address:
    """A byte of a tensor of bytes."""

    memory: Tensor
    at: int = 0

    def __add__(self, more: Any) -> Address:
        return Address(self.memory, self.at + int(more))

    def to(self, kind: torch.dtype) -> Pointer:
        return Pointer(self.memory.view(kind), torch.tensor(self.at // kind.itemsize))


@dataclass
class Pointer:
    memory: Tensor
    at: Tensor

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.at + more)


@dataclass
class Fake:
    """What the kernel asks of `gl`, for one program. arrives: called at each look at a signal."""

    program: int
    arrives: Callable[[Tensor, int], None]
    events: list[str] = field(default_factory=list)

    def language(self) -> types.SimpleNamespace:
        same = {name: getattr(torch, name) for name in ("where", "zeros_like", "int32", "int64", "float32")}
        return types.SimpleNamespace(
            **same, load=self.load, store=self.store, atomic_xchg=self.signal, atomic_add=self.look,
            program_id=lambda axis: self.program if axis == 1 else 0,
            num_programs=lambda axis: PROGRAMS if axis == 1 else 1,
            static_range=range, pointer_type=lambda kind: kind, multiple_of=lambda pointer, _: pointer,
            arange=lambda first, end, layout: torch.arange(first, end), BlockedLayout=lambda *_: None,
        )  # fmt: skip

    def barrier(self) -> None:
        self.events.append("barrier")

    def load(self, pointer: Pointer, mask: Any = None, **_: Any) -> Tensor:
        self.events.append("load")
        return pointer.memory[pointer.at if mask is None else torch.where(mask, pointer.at, 0)]

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        self.events.append("turns" if pointer.memory.dtype == torch.int32 else "copies")
        pointer.memory[pointer.at[mask]] = value.expand(mask.shape)[mask]

    def signal(self, pointer: Pointer, value: Tensor, sem: str, scope: str) -> None:
        assert (sem, scope) == ("release", "sys")
        self.events.append("signal")
        pointer.memory[pointer.at] = value

    def look(self, pointer: Pointer, none: int, sem: str, scope: str) -> Tensor:
        assert (none, sem, scope) == (0, "acquire", "sys")
        self.events.append("look")
        assert self.events.count("look") < 20, "waits for ever"
        self.arrives(pointer.memory, int(pointer.at))
        return pointer.memory[pointer.at]


def wrapped(turn: int) -> int:
    return (turn + 2**31) % 2**32 - 2**31


def check(change: tuple[str, str] | None, before: int, old: int, further: int) -> None:
    """One program of rank 1 of three. before: the last turn. old: signals that were there are so many turns old.
    further: the others are so many turns ahead when they are seen."""
    text = TEXT.replace(*change) if change else TEXT
    now, program = wrapped(before + 1) or 2, 3
    generator = torch.Generator().manual_seed(1)
    own, theirs = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(SIZE, ROWS, WIDTH, generator=generator)
    data = [torch.zeros(2 * SIZE * HALF, dtype=torch.uint8) for _ in range(SIZE)]
    signals = [torch.full((SIZE * PLACES,), wrapped(now - old), dtype=torch.int32) for _ in range(SIZE)]
    turns, looks = torch.full((PLACES,), before, dtype=torch.int32), 0
    at, mask = torch.arange(ROWS)[:, None] * 16 + torch.arange(WIDTH), torch.arange(ROWS)[:, None] < ROWS - 1
    mask = mask.expand(ROWS, WIDTH)

    def part(of: int, sender: int, turn: int) -> Tensor:
        return data[of].view(2, SIZE, HALF)[turn & 1, sender].view(torch.bfloat16)

    for peer in (0, 2):
        part(RANK, peer, now).fill_(9.0)  # of a turn before
        part(RANK, peer, now + 1).fill_(7.0)  # and what comes for the next one

    def arrives(memory: Tensor, place: int) -> None:
        nonlocal looks
        looks += 1
        if looks % 3 == 0:
            peer = place // PLACES
            part(RANK, peer, now)[at] = theirs[peer].bfloat16()
            memory[place] = wrapped(now + further)

    fake = Fake(program, arrives)
    names: dict[str, Any] = {"gl": fake.language(), "barrier": fake.barrier}
    exec(compile(text, "kernel", "exec"), names)
    place, turn = names["next_turn"](Pointer(turns, torch.tensor(0)))
    total = names["over_ranks"](
        own, at, mask, torch.bfloat16, [Address(each) for each in data],
        [Address(each.view(torch.uint8)) for each in signals], Pointer(turns, torch.tensor(0)), place, turn, HALF,
        RANK, SIZE, PLACES, 256, 4,
    )  # fmt: skip
    want = theirs[0].bfloat16().float() + own.bfloat16().float() + theirs[2].bfloat16().float()
    assert torch.equal(total[:-1], want[:-1])
    assert (turns[program::PROGRAMS] == now).all()
    assert (turns == now).sum() == len(turns[program::PROGRAMS])
    for peer in (0, 2):
        assert torch.equal(part(peer, RANK, now)[at][:-1], own.bfloat16()[:-1])
        assert not part(peer, RANK, now)[at[-1]].any()
        assert (signals[peer] == now).nonzero().flatten().tolist() == [RANK * PLACES + program]
    order = [event for i, event in enumerate(fake.events) if i == 0 or fake.events[i - 1] != event]
    assert order == ["load", "copies", "barrier", "signal", "look", "barrier", "load", "turns"]


TURNS = [(6, 1, 0), (7, 2, 1), (2**31 - 1, 3, 1), (-2, 2, 3), (-1, 3, 0), (5, 2**31 - 3, 0), (5, 2**31 + 3, 1)]


@pytest.mark.parametrize(("before", "old", "further"), TURNS)
def test_a_program(before: int, old: int, further: int) -> None:
    check(None, before, old, further)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name: str) -> None:
    assert TEXT.count(MUTANTS[name][0]) == 1
    found = 0
    for case in TURNS:
        try:
            check(MUTANTS[name], *case)
        except AssertionError:
            found += 1
    assert found
