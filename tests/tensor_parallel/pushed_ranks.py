"""A rank of `test_pushed_sums`: a process whose memory the other one maps, as GPUs do; kernels are interpreted."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

WIDTH, INPUTS, EPS = 48, 32, 1e-6
HALF = 4096
ROWS = (1, 5, 1, 2, 3, 6, 6, 1, 2)  # of one or two the product sends itself, others are copied


def values(rank: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input and weight of a rank's product, and the residual stream of all ranks."""
    ours, same = torch.Generator().manual_seed(100 * number + rank + 1), torch.Generator().manual_seed(100 * number)
    x = torch.randn(ROWS[number], INPUTS, generator=ours)
    return x, torch.randn(WIDTH, INPUTS, generator=ours), torch.randn(ROWS[number], WIDTH, generator=same)


def norm_weight() -> Tensor:
    return torch.linspace(0.5, 1.5, WIDTH)


def main(rank: int, folder: Path) -> None:
    from nanoengine.distributed.pushed_sum import PushedSums
    from nanoengine.kernels.all_reduce_norm_triton import Inboxes
    from nanoengine.kernels.all_reduce_triton import MAX_PROGRAMS, Peers
    from nanoengine.kernels.ops import TritonOps

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def shared(name: str, size: int) -> Tensor:
        """Addresses of each rank's memory of that name, as this one sees it."""
        files = [str(folder / f"{name}{rank}") for rank in range(2)]
        kept.extend(torch.from_file(file, shared=True, size=size, dtype=torch.uint8) for file in files)
        return torch.tensor([each.data_ptr() for each in kept[-2:]])

    kept: list[Tensor] = []
    signals, turns = shared("signals", 2 * MAX_PROGRAMS * 4), torch.zeros(MAX_PROGRAMS, dtype=torch.int32)
    words, copies = (
        Inboxes(Peers(rank, 2, shared(name, 4 * HALF), signals, turns), HALF) for name in ("words", "copies")
    )
    dist.barrier()
    entered: list[int] = []
    sums, ops, found = PushedSums(words, copies, lambda: entered.append(1)), TritonOps(), []
    for number, rows in enumerate(ROWS):
        x, weight, residual = values(rank, number)
        pushed = sums.of(residual)
        assert pushed is not None
        parts = ops.linear_parts(x, weight, None, pushed.begin)
        assert len(entered) == number + (rows <= 2), "a product that sends itself begins the sum"
        found.append(pushed.end(parts, norm_weight(), EPS))
        assert len(entered) == number + 1
    torch.save(found, folder / f"found{rank}")
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
