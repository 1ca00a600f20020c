"""A plugin file whose mock model does something else where a row of a step holds a certain token; and at the start,
where the folder's config.json says so."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nanoengine.api import API_VERSION, ForwardBatch, Model, ModelSpec, hookimpl
from nanoengine.core.execution.slots import SlotTables
from nanoengine.kernels import step_inputs
from nanoengine.testing.mock_model import MockModel, write_mock_checkpoint

HARMLESS = 97
FAULTS = range(HARMLESS, HARMLESS + 5)
RAISES, HANGS, DIES, RUNS_OUT, RAISES_EVERYWHERE = FAULTS
"""Tokens that are never drawn; only rank 1 minds the first four."""


class Shortage(NamedTuple):
    """On these ranks memory holds so many tokens in a part of each step. place: "writes", "first" (in front of the
    collective of the forward pass), "forward" (behind it), "logits", or "tail" (behind all collectives)."""

    ranks: tuple[int, ...] = ()
    place: str = ""
    limit: int = 0

    def check(self, rank: int, place: str, count: int) -> None:
        if rank in self.ranks and place == self.place and count > self.limit:
            raise MemoryError(f"no memory for {count} on rank {rank}")


def set_shortage(runner: Any, *shortage: Any) -> None:
    """For `Executor.call`."""
    runner.model.shortage = Shortage(*shortage)


class Faulty(MockModel):
    fault: str

    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> Any:
        cls.fault = hf.get("fault", "")
        return super().read_config(hf)

    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        if self.fault == "start" and ctx.tp.rank == 1:
            raise ValueError("no good start")
        self.shortage = Shortage()
        self._patch(SlotTables, "write", "writes", lambda tables, plan: plan.num_tokens)
        self._patch(step_inputs, "settle", "tail", lambda state, slots, *_, **__: len(slots))

    def _patch(self, owner: Any, name: str, place: str, count: Callable[..., int]) -> None:
        original = getattr(owner, name)

        def checked(*args: Any, **options: Any) -> Any:
            self.shortage.check(self.tp.rank, place, count(*args, **options))
            return original(*args, **options)

        if self.tp.size > 1:  # in a process of its own
            setattr(owner, name, checked)

    def forward(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        self.shortage.check(self.tp.rank, "first", len(input_ids))
        self.tp.all_reduce(input_ids.float())  # as a real model's ranks meet in each step
        self.shortage.check(self.tp.rank, "forward", len(input_ids))
        if bool((input_ids == RAISES_EVERYWHERE).any()):
            raise ArithmeticError(f"on rank {self.tp.rank} too")
        if self.tp.rank == 1:
            if bool((input_ids == RAISES).any()):
                raise ArithmeticError("one rank alone")
            if bool((input_ids == HANGS).any()):
                self.stuck_here()
            if bool((input_ids == RUNS_OUT).any()):
                input_ids.new_empty(1 << 46)
            if bool((input_ids == DIES).any()):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(input_ids, positions, batch)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits = super().compute_logits(hidden)
        self.shortage.check(self.tp.rank, "logits", len(hidden))
        logits[:, max(0, HARMLESS - self.tp.rank * logits.shape[1]) :] = float("-inf")
        return logits

    def stuck_here(self) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: None)  # as LLVM does when Triton compiles a first kernel
        time.sleep(1000)


def write_faulty(folder: Path, fault: str = "") -> Path:
    write_mock_checkpoint(folder, vocab_size=FAULTS.stop)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Faulty"], "fault": fault}))
    return folder


@hookimpl
def register_models() -> list[ModelSpec]:
    assert issubclass(Faulty, Model)
    return [ModelSpec(name="faulty", architectures=("Faulty",), target=f"{__name__}:Faulty", api=API_VERSION)]
