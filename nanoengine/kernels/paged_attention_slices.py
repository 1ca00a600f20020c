"""How `paged_attention_slices_gluon` is laid out, by host-known facts alone. `paged_attention.attend_decode_qkv` is its
reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoengine.kernels.paged_attention_plan import graph_rows

HEAD, WARPS = 128, 4
EMPTY = -1  # a word of scratch memory that nothing was written to: a NaN that no arithmetic gives
_TILE = 16 * WARPS


@dataclass(frozen=True, slots=True)
class SlicesConfig:
    """splits: the most programs a (row, KV head). keys: that one holds in shared memory. least: the fewest tiles
    of 64 keys that a part is worth."""

    splits: int
    keys: int
    least: int


@dataclass(frozen=True, slots=True)
class SlicesScratch:
    """Parts of split rows, float32 as int32, EMPTY between launches. Launches that share it must follow each other in
    one stream."""

    part: Tensor
    marks: Tensor

    @classmethod
    def make(cls, parts: int, group: int, device: torch.device) -> SlicesScratch:
        """For at most `parts` parts of any one launch."""
        return cls(
            torch.full((parts * group * HEAD,), EMPTY, dtype=torch.int32, device=device),
            torch.full((parts * group,), EMPTY, dtype=torch.int32, device=device),
        )


def slices_config(rows: int, kv_heads: int, multiprocessors: int) -> SlicesConfig | None:
    """None: there is not a multiprocessor for each (row, KV head), or so many that a row should have more parts."""
    pairs = rows * kv_heads
    if not multiprocessors // 8 < pairs <= multiprocessors:
        return None
    # 256 keys leave room for a program of the product in front, and one of that behind.
    return SlicesConfig(splits=1 << ((multiprocessors // pairs).bit_length() - 1), keys=256, least=4)


@dataclass(frozen=True, slots=True)
class SlicesPlanner:
    """Lays launches of one KV group out, and owns the scratch memory that they share."""

    kv_heads: int
    multiprocessors: int
    max_rows: int
    scratch: SlicesScratch

    @classmethod
    def make(cls, *, num_heads: int, num_kv_heads: int, max_rows: int, device: torch.device) -> SlicesPlanner:
        count = torch.cuda.get_device_properties(device).multi_processor_count
        scratch = SlicesScratch.make(count, num_heads // num_kv_heads, device)
        return cls(num_kv_heads, count, max_rows, scratch)

    def config(self, rows: int) -> SlicesConfig | None:
        return slices_config(min(graph_rows(rows), self.max_rows), self.kv_heads, self.multiprocessors)
