"""The tensor-parallel group of several processes, with torch.distributed: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.distributed.symmetric import SymmetricMemory

_log = logging.getLogger(__name__)

_NEVER = timedelta(days=365)  # no timeout here: the engine enforces it, and knows which rank is late
LOOPBACK = "127.0.0.1"


class CollectiveFailed(RuntimeError):
    """A collective failed, as it does on all ranks when one of them ends."""


def make_store(size: int) -> TCPStore:
    """The store of rank 0 for the rendezvous, on a free port that only this host can reach."""
    listener = socket.create_server((LOOPBACK, 0), backlog=max(16, size))
    port = listener.getsockname()[1]
    return TCPStore(
        LOOPBACK, port, size, True, timeout=_NEVER, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def join_store(port: int, size: int) -> TCPStore:
    return TCPStore(LOOPBACK, port, size, False, timeout=_NEVER)


class DistributedGroup(TensorParallelGroup):
    """One rank of `size`. Every rank makes one, and calls the same collectives in the same order."""

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        store: Any,
        entered: Callable[[], None] = lambda: None,
        shared_rows: int = 0,
        pushes: bool = True,
    ) -> None:
        """Connects to the other ranks.

        Args:
            store: from `make_store` or `join_store`.
            entered: called just before each collective and each forward pass. It may wait for the other ranks; if it
                raises, it does so on all of them, and the collective does not start.
            shared_rows: on GPUs, small sums and `highest` of up to so many keys use shared memory instead of NCCL; 0:
                everything uses NCCL.
            pushes: whether products of few rows are summed at their own end, by writes into the other ranks' memory;
                else by kernels that read it.
        """
        self.rank, self.size, self._device, self._entered = rank, size, device, entered
        _stay_on_this_host()
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=_NEVER,
            device_id=device if on_gpu else None,
        )
        self._symmetric = self._share_memory(shared_rows, pushes) if on_gpu and shared_rows else None

    def _share_memory(self, rows: int, pushes: bool) -> SymmetricMemory | None:
        """The shared memory; None if a rank's GPU cannot access the memory of the others, which is logged once."""
        assert dist.group.WORLD is not None
        shared, why = None, "another rank's GPU cannot"
        try:
            shared = SymmetricMemory(dist.group.WORLD, self._device, rows, self._entered, pushes=pushes)
        except Exception as error:  # noqa: BLE001 - drivers report this with many errors; NCCL works anyway
            why = f"{type(error).__name__}: {error}"
        if self.minimum(int(shared is not None)):
            return shared
        _log.warning("GPUs cannot access each other's memory, sums over ranks use NCCL: %s", why)
        return None

    def begin_forward(self) -> None:
        self._entered()  # the collectives of a graph do not call this group
        if self._symmetric is not None:
            self._symmetric.begin_forward()

    def partial_sum(self, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        return None if self._symmetric is None else self._symmetric.partial(rows, width, dtype)

    def all_reduce_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        added = None if self._symmetric is None else self._symmetric.all_reduce_add(x, residual)
        return (self.all_reduce(x), residual) if added is None else (added, None)

    def inboxes(self, like: Tensor) -> Callable[[], Any] | None:
        memory = self._symmetric
        if memory is None or not memory.fits_inboxes(like):
            return None

        def begin() -> Any:
            self._entered()
            return memory.inboxes

        return begin

    def all_reduce(self, x: Tensor) -> Tensor:
        added = None if self._symmetric is None else self._symmetric.all_reduce_add(x, None)
        if added is not None:
            return added
        with self._collective():
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if x.is_cuda:
            every = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
            with self._collective():
                dist.all_gather_into_tensor(every, x)
            return every.movedim(0, -2).flatten(-2)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with self._collective():
            dist.all_gather(parts, x)
        return torch.cat(parts, dim=-1)

    def highest(self, keys: Tensor) -> Tensor:
        if self._symmetric is not None:
            return self._symmetric.highest(keys)
        with self._collective():
            dist.all_reduce(keys, dist.ReduceOp.MAX)
        return keys

    def minimum(self, value: int) -> int:
        lowest = torch.tensor(value, dtype=torch.int64, device=self._device)
        with self._collective():
            dist.all_reduce(lowest, dist.ReduceOp.MIN)
        return int(lowest)

    @contextmanager
    def _collective(self) -> Iterator[None]:
        self._entered()
        try:
            yield
        except RuntimeError as error:
            raise CollectiveFailed(f"a collective of {self.size} ranks failed on rank {self.rank}: {error}") from error


def _stay_on_this_host() -> None:
    """Makes the ranks' sockets use the loopback interface, unless the user chose an interface."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if names:
            os.environ.setdefault(variable, names[0])
