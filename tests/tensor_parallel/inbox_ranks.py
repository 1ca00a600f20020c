"""A rank of `test_inboxes`: a process whose memory the other one maps, as GPUs do; kernels are interpreted."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

WIDTH, INPUTS, SUMS = 48, 32, 9
HALF = 4096


def values(rank: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input and weight of a rank's product, and the residual stream of all ranks."""
    ours, same = torch.Generator().manual_seed(100 * number + rank + 1), torch.Generator().manual_seed(100 * number)
    x = torch.randn(1, INPUTS, generator=ours)
    return x, torch.randn(WIDTH, INPUTS, generator=ours), torch.randn(1, WIDTH, generator=same)


def main(rank: int, folder: Path) -> None:
    from nanoengine.kernels.inboxes_triton import PLACES, Inboxes
    from nanoengine.kernels.matvec_streamed_triton import StreamedTile, streamed
    from nanoengine.kernels.matvec_triton import GemvTile, gemv

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def shared(name: str, size: int) -> Tensor:
        """Addresses of each rank's memory of that name, as this one sees it."""
        files = [str(folder / f"{name}{rank}") for rank in range(2)]
        kept.extend(torch.from_file(file, shared=True, size=size, dtype=torch.uint8) for file in files)
        return torch.tensor([each.data_ptr() for each in kept[-2:]])

    kept: list[Tensor] = []
    words = shared("words", 4 * HALF)
    inboxes = Inboxes(rank, 2, words, words, words, torch.zeros(PLACES, dtype=torch.int32), (HALF, HALF))
    dist.barrier()
    found = []
    for number in range(SUMS):
        x, weight, residual = values(rank, number)
        if number % 3 == 1:  # the number of programs changes from sum to sum
            tile = StreamedTile(rows=2, stages=3, warps=4, programs=5)
            found.append(streamed(x, weight, tile=tile, add=residual, inboxes=inboxes))
        else:
            found.append(gemv(x, weight, None, tile=GemvTile(4 << number % 3, 2), add=residual, inboxes=inboxes)[0])
    torch.save(found, folder / f"found{rank}")
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
