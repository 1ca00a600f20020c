"""How `paged_attention_slices_gluon` and `paged_attention_code_slices_gluon` are laid out, by host-known facts alone.
`paged_attention.attend_decode_qkv` is their reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoengine.kernels.paged_attention_plan import graph_rows

HEAD, WARPS = 128, 4
EMPTY = -1  # a word of scratch memory that nothing was written to: a NaN that no arithmetic gives
_MOST_HEADS, _MOST_SPLITS = 8, 16
_LONGEST_WHOLE = 32767  # keys of a row of eight-bit codes; longer rows are split by the other kernel
_SHORT_TAIL = 1.7  # waves of programs: with fewer, and more than one, most multiprocessors wait for the others


@dataclass(frozen=True, slots=True)
class SlicesConfig:
    """splits: the most programs a (row, KV head). keys: that one holds in shared memory. least: the fewest tiles
    of 64 keys that a part is worth."""

    splits: int
    keys: int
    least: int


@dataclass(frozen=True, slots=True)
class SlicesScratch:
    """Parts of split rows, float32 sums and marks as words of int64, EMPTY between launches. Launches that share it
    must follow each other in one stream."""

    part: Tensor

    @classmethod
    def make(cls, parts: int, group: int, device: torch.device) -> SlicesScratch:
        """For at most `parts` parts of any one launch."""
        return cls(torch.full((parts * group * HEAD,), EMPTY, dtype=torch.int64, device=device))


def slices_config(rows: int, kv_heads: int, group: int, multiprocessors: int) -> SlicesConfig | None:
    """group: query heads for each KV head. None: another kernel is as fast, or it was not measured.

    Microseconds of norms, rotation, store and attention a layer, in a chain of layers of Qwen3-0.6B and of another with
    32 heads, 384 keys (one H200, 2026-11-30):

        rows, 16 heads        1      2      4      8     16     32     64    128    256
        tile by tile       4.08   6.28   7.23   8.96   12.1   19.5   28.3   55.2  101.6
        256 keys           3.12   5.59   5.64   7.53   11.9
        128 keys           3.16   5.96                 8.32   15.1   28.2   51.3   98.9
        64 keys            4.25   6.97                        19.1   28.8   53.8   97.6
        rows, 32 heads                           8                      64          256
        tile by tile                          8.31                    32.0        104.0
        these                                 9.34                    27.1         97.0

    Keys behind the first that were asked for in L2 made it slower.
    """
    pairs = rows * kv_heads
    if group > _MOST_HEADS or (group > 2 and 8 * pairs <= multiprocessors):
        return None
    if pairs <= multiprocessors:  # 256 keys leave room for a program of the product in front, and one of that behind
        splits = min(_MOST_SPLITS, 1 << ((multiprocessors // pairs).bit_length() - 1))
        return SlicesConfig(splits=splits, keys=256 if 2 * pairs <= multiprocessors else 128, least=4)
    waves = pairs / (3 * multiprocessors)  # three programs with 128 keys, or six with 64, fill a multiprocessor
    if group <= 2 and 1 < waves < _SHORT_TAIL:
        return None
    return SlicesConfig(splits=1, keys=128 if waves <= 4 else 64, least=4)


def code_slices_keys(kv_dtype: str, rows: int, kv_heads: int, longest: int, multiprocessors: int) -> int | None:
    """Keys that a program of `paged_attention_code_slices_gluon` holds; None: another kernel is as fast, or it was not
    measured. longest: the most keys of a row, which no programs share here."""
    pairs = rows * kv_heads
    if pairs <= 3 * multiprocessors or longest > _LONGEST_WHOLE:
        return None
    # Six programs with 128 keys fill a multiprocessor, or eight with 64 of float8.
    return 128 if pairs <= 6 * multiprocessors or kv_dtype == "int8" else 64


@dataclass(frozen=True, slots=True)
class SlicesPlanner:
    """Lays launches of one KV group out, and owns the scratch memory that they share."""

    kv_heads: int
    group: int
    multiprocessors: int
    max_rows: int
    scratch: SlicesScratch

    @classmethod
    def make(cls, *, num_heads: int, num_kv_heads: int, max_rows: int, device: torch.device) -> SlicesPlanner:
        count = torch.cuda.get_device_properties(device).multi_processor_count
        group = num_heads // num_kv_heads
        return cls(num_kv_heads, group, count, max_rows, SlicesScratch.make(count, group, device))

    def config(self, rows: int) -> SlicesConfig | None:
        return slices_config(min(graph_rows(rows), self.max_rows), self.kv_heads, self.group, self.multiprocessors)
