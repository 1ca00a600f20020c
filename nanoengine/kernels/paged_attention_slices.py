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
    of 64 keys that a part is worth. ahead: keys behind those that it asks for, to be in L2 soon."""

    splits: int
    keys: int
    least: int
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class SlicesScratch:
    """Parts of split rows, float32 sums and marks as words of int64, EMPTY between launches. Launches that share it
    must follow each other in one stream."""

    part: Tensor

    @classmethod
    def make(cls, parts: int, group: int, device: torch.device) -> SlicesScratch:
        """For at most `parts` parts of any one launch."""
        return cls(torch.full((parts * group * HEAD,), EMPTY, dtype=torch.int64, device=device))


def slices_config(rows: int, kv_heads: int, multiprocessors: int) -> SlicesConfig | None:
    """None: there is not a multiprocessor for each (row, KV head), or so many that a row should have more parts.

    Microseconds a layer of Qwen3-0.6B in a chain of 28, 130, 384 and 640 keys (one H200, 2026-11-30); norms, rotation
    and attention are all but 11.4, 12.0 and 15.8 of them:

        rows                       4                   8                  16
        tile by tile      17.7 18.8 21.5      18.6 21.0 24.2      25.1 27.7 31.5
        256 keys          15.5 17.4 20.3      17.2 19.6 22.7      22.1 26.3 29.7
        128 keys          16.2 17.5 20.4      17.4 19.9 23.0      21.6 24.0 29.9
    """
    pairs = rows * kv_heads
    if not multiprocessors // 8 < pairs <= multiprocessors:
        return None
    # So many leave room for a program of the product in front, and one of that behind.
    keys = 256 if 2 * pairs <= multiprocessors else 128
    return SlicesConfig(splits=1 << ((multiprocessors // pairs).bit_length() - 1), keys=keys, least=4)


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
