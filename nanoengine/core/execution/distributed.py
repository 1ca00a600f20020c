"""The tensor-parallel group of several processes, by torch.distributed: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

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

from nanoengine.core.execution.parallel import TensorParallelGroup

_NEVER = timedelta(days=365)  # who waits too long is told by the engine, which knows which rank is late
LOOPBACK = "127.0.0.1"


class CollectiveFailed(RuntimeError):
    """A collective broke, as it does on all ranks when one of them ends."""


def make_store(size: int) -> TCPStore:
    """Rank 0's rendezvous, on a free port that only this host can reach."""
    listener = socket.create_server((LOOPBACK, 0), backlog=max(16, size))
    port = listener.getsockname()[1]
    return TCPStore(
        LOOPBACK, port, size, True, timeout=_NEVER, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def join_store(port: int, size: int) -> TCPStore:
    return TCPStore(LOOPBACK, port, size, False, timeout=_NEVER)


class DistributedGroup(TensorParallelGroup):
    """One rank of `size`; every rank makes one, and calls the same collectives in the same order."""

    def __init__(
        self, rank: int, size: int, device: torch.device, store: Any, entered: Callable[[], None] = lambda: None
    ) -> None:
        """`store`: of `make_store` or `join_store`. `entered` is called as each collective starts."""
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

    def all_reduce(self, x: Tensor) -> Tensor:
        with self._collective():
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with self._collective():
            dist.all_gather(parts, x)
        return torch.cat(parts, dim=-1)

    def highest(self, keys: Tensor) -> Tensor:
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
    """The ranks' sockets bind to loopback, unless the user chose an interface."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if names:
            os.environ.setdefault(variable, names[0])
