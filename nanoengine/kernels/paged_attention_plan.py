"""How launches of paged decode are laid out (`paged_attention_decode_triton`): by host-known facts alone, so that a
captured launch serves every length."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_QUERIES = 16  # of a row in decode
_MAX_SPLITS = 64
_L2_BYTES = 24 << 20  # about half of a Hopper GPU's
_SCRATCH_BYTES = 64 << 20  # most that the parts of rows with several queries take
_INTERPRETED_MULTIPROCESSORS = 4  # so that tests on a CPU see split rows and whole ones


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How decode is laid out.

    Attributes:
        tile: keys an iteration. splits: the most programs a (row, KV head). min_tiles: the fewest tiles a split is
        worth. stages: tiles in flight, the one in use included. ahead: keys that each program asks for before it waits,
        to be in L2 soon. held: it also reads its first tile before; only where the newest keys come from qkv.
    """

    tile: int
    splits: int
    min_tiles: int
    warps: int
    stages: int
    ahead: int = 0
    held: bool = False


def keys_ahead(programs: int, key_bytes: int) -> int:
    """Keys that each program asks for before it waits: what all ask for shall find room in the L2 cache."""
    most = _L2_BYTES // (programs * key_bytes)
    return min(512, 1 << (most.bit_length() - 1)) if most >= 16 else 0


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """Parts of split rows: float32 [pairs * splits * group * head_size] and [pairs * splits * group], int32 tickets
    [pairs or more], zero between launches. A pair is a (row, KV head). Launches that share it must follow each other in
    one stream."""

    part: Tensor
    lse: Tensor
    tickets: Tensor

    @classmethod
    def make(cls, parts: int, pairs: int, group: int, head_size: int, device: torch.device) -> DecodeScratch:
        """For at most `parts` parts (pairs * splits of any one launch) and `pairs` tickets."""
        return cls(
            torch.empty(parts * group * head_size, dtype=torch.float32, device=device),
            torch.empty(parts * group, dtype=torch.float32, device=device),
            torch.zeros(pairs, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTokens:
    """What turns a row's qkv into its query and its newest key and value.

    Attributes:
        slots: int64 [B], where k and v go (block * block_size + offset); a negative one: nowhere. inv_freq: float32
        [head_size / 2], of the rotation at a row's length less one. q_weight, k_weight: [head_size] of the head-wise
        norms, both or none. eps: theirs.
    """

    slots: Tensor
    inv_freq: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    eps: float = 0.0

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """As the kernel takes them."""
        q_weight = self.inv_freq if self.q_weight is None else self.q_weight
        k_weight = self.inv_freq if self.k_weight is None else self.k_weight
        return self.slots, self.inv_freq, q_weight, k_weight, self.eps


def decode_config(
    rows: int, kv_heads: int, head_size: int, max_len: int, itemsize: int, multiprocessors: int
) -> DecodeConfig:
    """By host-known facts alone: batch, shapes and the longest context there may be."""
    pairs, tile_bytes = rows * kv_heads, padded_head(head_size) * itemsize
    # Measured at 128 x bf16: tiles of 128 keys read fastest, but three programs fill a multiprocessor; five with 64.
    waves = [pairs / (programs * multiprocessors) for programs in (3, 5)]
    filled = [each / math.ceil(each) for each in waves]
    several = itemsize == 2 and multiprocessors // 3 < pairs <= multiprocessors
    wide = several or (itemsize == 2 and pairs > multiprocessors and filled[0] >= filled[1])
    tile = max(16, min(128, (32768 if wide else 16384) // tile_bytes))
    # A short context is worth splitting while few programs run. A long one is, too, beside many short ones. Adding
    # parts up takes as long as some hundred keys (64 pairs of 384 keys, H200: 8.1 us whole, 11.1 us in two parts).
    # From steps of 8 rows of Qwen3-0.6B at 230, 384 and 538 keys (624, 690 and 768 us, one H200, 2026-11-29): a tile of
    # 128 keys takes 1.6 us a layer, adding two parts up 1.9. So there four tiles are two parts, and three are one.
    paired = several and 2 * pairs <= multiprocessors
    keys_each = max(tile, 64, 3 * tile if paired else (8 if several else 4) * pairs)
    # Programs that find nothing to do cost little, not nothing: no more of them than long contexts can be worth.
    most = max(1, 2 * multiprocessors // pairs, min(4, 8 * multiprocessors // pairs), min(8, max_len // 16384))
    if paired:
        most = multiprocessors // pairs  # that a multiprocessor holds only one program of
    splits = _power_of_2(min(most, -(-max_len // keys_each), _MAX_SPLITS))
    return DecodeConfig(
        tile=tile, splits=splits, min_tiles=keys_each // tile, warps=4, stages=3 if pairs > multiprocessors else 5,
        ahead=keys_ahead(pairs * splits, 2 * head_size * itemsize),
    )  # fmt: skip


def fused_config(
    rows: int, kv_heads: int, head_size: int, max_len: int, itemsize: int, multiprocessors: int
) -> DecodeConfig | None:
    """For attention that takes qkv; None where a kernel of its own for norm, rotation and store is faster.

    That kernel costs little, since this one starts beside it: what is gained is the first tile, read before qkv comes,
    and that it ends earlier. Microseconds a layer of Qwen3-0.6B in a chain of 28, 384 keys, fused and not (one H200,
    2026-11-29):

        rows         1     2     4     8    16    32    48    64    96   128
        fused     15.6  17.4  18.4  21.4  27.5  41.1  46.8  53.0  77.7  89.9
        not       17.1  18.7  21.1  21.1  28.3  42.4  49.1  55.5  77.9  90.1
    """
    pairs, tile_bytes = rows * kv_heads, padded_head(head_size) * itemsize
    wide = max(16, min(128, 32768 // tile_bytes))
    if 4 * pairs <= multiprocessors:  # a part for each multiprocessor
        splits = _power_of_2(min(multiprocessors // pairs, -(-max_len // wide), _MAX_SPLITS))
        ahead = keys_ahead(pairs * splits, 2 * head_size * itemsize)
        return DecodeConfig(tile=wide, splits=splits, min_tiles=1, warps=4, stages=3, ahead=ahead, held=True)
    if 8 * pairs < 7 * multiprocessors or pairs > 4 * multiprocessors:
        return None
    few, tile = pairs <= multiprocessors, wide if pairs <= 2 * multiprocessors else max(16, wide // 2)
    splits = _power_of_2(max(1, min(8, max_len // 16384)))
    ahead = keys_ahead(pairs * splits, 2 * head_size * itemsize) if few else 16
    return DecodeConfig(
        tile=tile, splits=splits, min_tiles=max(1, 4 * pairs // tile), warps=4, stages=5 if few else 3, ahead=ahead
    )


def beside_products(config: DecodeConfig, max_len: int) -> DecodeConfig:
    """For one row of four query heads a KV head, between products that take long: with less shared memory, so that
    programs of the product behind find room beside this kernel.

    One stage where every key is asked for in front; else copies of smaller tiles. Microseconds a layer of Qwen3-8B in a
    chain of 10, 448 keys (one H200, 2026-11-30), by products that hold weights in registers: not fused 109.8, as
    `fused_config` says 110.5, one stage 99.1, tiles of 64 keys in two stages 100.7; by `matvec_streamed_triton` 102.0,
    97.7, 96.9 and 97.5.
    """
    if max_len <= config.splits * config.ahead:
        return replace(config, stages=1)
    return replace(config, tile=max(16, config.tile // 2), stages=2)


@dataclass(frozen=True, slots=True)
class SeveralConfig:
    """How decode of several queries a row is laid out.

    Attributes:
        block_m: (query, head) pairs of a tile. keys: how the keys are read, as in decode of one query. registers: the
        most that a thread takes, so that as many programs share a multiprocessor as with one query; 0: any number.
    """

    block_m: int
    keys: DecodeConfig
    registers: int = 0

    def programs(self, kv_heads: int, group: int, queries: int) -> int:
        """How many programs a row has in each split: one for each KV head and tile of its queries."""
        return kv_heads * -(-queries // (self.block_m // group))


def several_config(
    rows: int, queries: int, group: int, kv_heads: int, head_size: int, max_len: int, itemsize: int,
    multiprocessors: int,
) -> SeveralConfig:  # fmt: skip
    """For rows of up to `queries` queries. A row's keys are read once for 128 (query, head) pairs at the most, so the
    layout is that of one query; larger tiles leave room for fewer keys in flight."""
    width, least = padded_head(head_size), max(16, 1 << (group - 1).bit_length())
    most = 32 if itemsize == 4 else 128 if width <= 128 else 64
    block_m = max(least, min(most, 1 << (queries * group - 1).bit_length()))
    tiles = -(-queries // (block_m // group))
    keys = decode_config(rows * tiles, kv_heads, head_size, max_len, itemsize, multiprocessors)
    if block_m > 32:
        tile = max(16, min(64, 16384 // (width * itemsize)))
        min_tiles = max(1, keys.min_tiles * keys.tile // tile)
        keys = replace(keys, tile=tile, min_tiles=min_tiles, stages=3, warps=8 if block_m > 64 else 4)
    part = rows * kv_heads * tiles * block_m * head_size * 4
    splits = _power_of_2(max(1, min(keys.splits, _SCRATCH_BYTES // part)))
    # Five and four programs a multiprocessor, without a spill in the loop (compiled for compute capability 9.0).
    registers = {16: 96, 32: 104}.get(block_m, 0) if itemsize == 2 and width <= 128 else 0
    return SeveralConfig(block_m, replace(keys, splits=splits), registers)


def graph_rows(rows: int) -> int:
    """The next number of rows for which decode graphs are captured, with as much padding as costs little."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    stride = 16 if rows <= 64 else 32 if rows <= 256 else 128
    return -(-rows // stride) * stride


def _power_of_2(most: int) -> int:
    return 1 << (most.bit_length() - 1)


def padded_head(head_size: int) -> int:
    """The columns a tile has for it: a power of two, and what a dot takes at least."""
    return max(16, 1 << (head_size - 1).bit_length())


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlanner:
    """Lays decode launches of one KV group out, and owns the scratch memory that they share.

    Attributes:
        max_rows: the most rows of a launch. longest: the most keys a query may see.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    itemsize: int
    longest: int
    multiprocessors: int
    max_rows: int
    scratch: DecodeScratch

    @classmethod
    def make(
        cls,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        max_rows: int,
        longest: int,
        device: torch.device,
    ) -> DecodePlanner:
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        else:
            multiprocessors = _INTERPRETED_MULTIPROCESSORS
        shape = (num_kv_heads, head_size, longest, dtype.itemsize, multiprocessors)
        splits = [
            max(config.splits for config in (decode_config(rows, *shape), fused_config(rows, *shape)) if config)
            for rows in range(1, max_rows + 1)
        ]
        parts = max(rows * num_kv_heads * each for rows, each in enumerate(splits, 1))
        group = num_heads // num_kv_heads
        most = several_config(max_rows, MAX_QUERIES, group, *shape)
        tickets = max_rows * most.programs(num_kv_heads, group, MAX_QUERIES)
        scratch = DecodeScratch.make(parts, tickets, group, head_size, device)
        return cls(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, itemsize=dtype.itemsize,
            longest=longest, multiprocessors=multiprocessors, max_rows=max_rows, scratch=scratch,
        )  # fmt: skip

    def config(self, rows: int) -> DecodeConfig:
        return decode_config(self._captured(rows), *self._shape)

    def fused(self, rows: int) -> DecodeConfig | None:
        """For `attend_decode` of qkv; None where that is no faster, or was not measured: more query heads per KV head
        make a longer kernel, and only one row of up to four was."""
        rows, group = self._captured(rows), self.num_heads // self.num_kv_heads
        config = fused_config(rows, *self._shape)
        if config is None or group <= 2:
            return config
        few = rows == 1 and group <= 4 and self.itemsize == 2 and config.held
        return beside_products(config, self.longest) if few else None

    def several(self, rows: int, queries: int) -> SeveralConfig:
        """For `attend_several`; of the scratch memory it takes the tickets. queries: at most `MAX_QUERIES`.

        Of the next power of two of rows: mixed steps with drafts run eagerly, and each layout is compiled by itself.
        """
        rows = 1 << (rows - 1).bit_length()
        return several_config(rows, queries, self.num_heads // self.num_kv_heads, *self._shape)

    def _captured(self, rows: int) -> int:
        """The next number of rows that has a graph of its own: steps that run eagerly have any, and each layout is
        compiled by itself, for the better part of a second."""
        return min(graph_rows(rows), self.max_rows)

    @property
    def _shape(self) -> tuple[int, int, int, int, int]:
        return self.num_kv_heads, self.head_size, self.longest, self.itemsize, self.multiprocessors
