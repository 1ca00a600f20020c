"""Paged attention in plain torch: any device, dtype and head size, ragged and mixed batches.

KV layout: [layers, 2, blocks, KV heads, block size, head size], and scales without the last dimension where K and V are
stored in eight bits. The rows of a step are divided into *pieces* (see
`pieces`). For each layer and piece, whole blocks are gathered into a scratch buffer [rows, KV heads, tokens, head
size], and the attention is computed with a mask that all layers share. With head-major blocks, the gathered values of a
head are contiguous, as batched products need: decode on a CPU is 15% faster than with token-major blocks.

Because whole blocks are gathered, values after a row's end are in its products, with a weight of 0 or a score of -inf.
This has no effect only if they are finite: 0 * inf is NaN. So `fill` clears a block if a step writes its beginning but
not all of it, and an index after the row's last block repeats that block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoengine.api import (
    AttentionBackend,
    AttentionCapabilities,
    AttentionFeature,
    AttentionLayerSpec,
    BatchLimits,
    HeadNorms,
    KVSpec,
    Rotation,
    StepInputs,
)
from nanoengine.api.sources import cache_root
from nanoengine.kernels.cpu import Library, load
from nanoengine.kernels.cpu.attention import DecodeAttention, takes
from nanoengine.kernels.kv_quant import KV_DTYPES, dequantise_heads, quantise_heads, stored_bytes
from nanoengine.plugins.attention_backends.pieces import Group, Rows, plan_pieces

_SCRATCH_BYTES = 16 << 20  # for gathered K and V: small enough for a CPU's last-level cache
_BAND_ELEMENTS = 1 << 22
_MAX_QUERIES = 128  # queries of a long row that are computed at a time
_MANY_ROWS = 8  # from so many single queries, two batched products are faster than the fused kernel on a CPU
_BLOCKED = float("-inf")


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Queries [first, last) of each row of a piece, and its first `keys` gathered tokens."""

    first: int
    last: int
    keys: int
    mask: Tensor  # [rows or 1, 1, last - first, keys]; 0, or -inf for keys that a query must not use


@dataclass(frozen=True, slots=True)
class _LayerViews:
    """Views of one layer's cache, made once.

    Rows are [blocks * KV heads * block size, head size], blocks are [blocks * KV heads, block size * head size], scales
    are [blocks, KV heads, block size] where K and V are stored in eight bits.
    """

    k_rows: Tensor
    v_rows: Tensor
    k_blocks: Tensor
    v_blocks: Tensor
    k_scales: Tensor
    v_scales: Tensor


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows that are computed together in one step.

    Attributes:
        rows, queries, keys: sizes of the padded batch.
        index: int32 [rows * KV heads * blocks]; what to gather, in units of one block of one head.
        chunks: one, except for a long row.
        start: the queries are the tokens [start, start + rows * queries), if `tokens` is None.
        tokens: int64 [rows * queries]; the token of each query; padding repeats the row's last one.
        real: int64 [N]; indices of the queries that are not padding; None: all.
        written: int64 [N]; the tokens of these queries.
    """

    rows: int
    queries: int
    keys: int
    index: Tensor
    chunks: tuple[_Chunk, ...]
    start: int = 0
    tokens: Tensor | None = None
    real: Tensor | None = None
    written: Tensor | None = None


class TorchPaged(AttentionBackend):
    """The reference backend. It runs everywhere, and the other backends must give the same results."""

    capabilities = AttentionCapabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        features=frozenset(AttentionFeature),
        decode_queries=16,
        kv_dtypes=frozenset(KV_DTYPES),
    )

    @classmethod
    def kv_block_bytes(cls, spec: KVSpec, block_size: int) -> int:
        return 2 * block_size * spec.num_kv_heads * stored_bytes(spec.kv_dtype, spec.dtype, spec.head_size)

    def __init__(self, spec: KVSpec, limits: BatchLimits, device: torch.device) -> None:
        self.spec, self.limits, self.device = spec, limits, device
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.stored = KV_DTYPES.get(spec.kv_dtype, self.dtype)
        longest = limits.max_blocks * limits.block_size
        token_bytes = 2 * spec.num_kv_heads * spec.head_size * self.dtype.itemsize  # in the scratch buffer
        self.max_gather = max(longest, _SCRATCH_BYTES // token_bytes)  # most tokens of a piece
        heads, table = spec.num_kv_heads, limits.max_rows * limits.max_blocks
        self._scratch = torch.empty(2, self.max_gather * heads * spec.head_size, dtype=self.dtype, device=device)
        self._index = torch.empty(table * heads, dtype=torch.int32, device=device)
        self._decode_mask = torch.empty(table * limits.block_size, dtype=self.dtype, device=device)
        self._slots = torch.empty(limits.max_tokens, heads, dtype=torch.int64, device=device)
        self._heads = torch.arange(heads, dtype=torch.int32, device=device)
        self._keys = torch.arange(longest, device=device)
        self.chunk_queries = max(16, min(_MAX_QUERIES, _BAND_ELEMENTS // longest))
        self._band = self._make_band(longest)
        self._kv, self._scales = torch.empty(0), torch.empty(0)
        self._layers: list[_LayerViews] = []
        self._pieces: list[_Piece] = []
        self._step_slots = self._slots[:0].view(-1)
        self._inputs: StepInputs | None = None
        self._decode: DecodeAttention | None = None
        self._planned = False
        if device.type == "cpu" and takes(spec.head_size, self.stored):
            library = load(cache_root())
            self._decode = DecodeAttention(library) if isinstance(library, Library) else None

    def _make_band(self, longest: int) -> Tensor:
        """A mask that contains the mask of any chunk of any row as a rectangle: [queries, longest + queries + block].

        Row i is query i of a chunk; column c is the key that is c - longest positions after the chunk's first query.
        """
        columns = longest + self.chunk_queries + self.limits.block_size
        ahead = torch.arange(columns, device=self.device) - longest
        ahead = ahead - torch.arange(self.chunk_queries, device=self.device).unsqueeze(-1)
        return self._mask(ahead, torch.empty(ahead.shape, dtype=self.dtype, device=self.device))

    def _mask(self, ahead: Tensor, out: Tensor, most: Tensor | int = 0) -> Tensor:
        """0 if a query may use a key that is `ahead` positions after it, else -inf. `most`: how far it may look."""
        blocked = ahead > most
        if self.spec.window is not None:
            blocked |= ahead.abs() >= self.spec.window
        return out.zero_().masked_fill_(blocked, _BLOCKED)

    def allocate(self, num_layers: int, num_blocks: int) -> None:
        spec = self.spec
        shape = (num_layers, 2, num_blocks, spec.num_kv_heads, self.limits.block_size, spec.head_size)
        # Codes are moved as bytes: some operations do not know float8.
        self._kv = _zeros(shape, self.dtype if self.stored is self.dtype else torch.uint8, self.device)
        scales = shape[:-1] if self._quantised else (num_layers, 2)  # else they are not used
        self._scales = _zeros(scales, torch.float32, self.device)
        block = self.limits.block_size * spec.head_size
        self._layers = [
            _LayerViews(
                k_rows=k.view(-1, spec.head_size), v_rows=v.view(-1, spec.head_size),
                k_blocks=k.view(-1, block), v_blocks=v.view(-1, block), k_scales=k_scales, v_scales=v_scales,
            )
            for (k, v), (k_scales, v_scales) in zip(self._kv, self._scales, strict=True)
        ]  # fmt: skip

    @property
    def _quantised(self) -> bool:
        return self.spec.kv_dtype in KV_DTYPES

    def release(self) -> None:
        self._kv, self._scales, self._layers = torch.empty(0), torch.empty(0), []

    def fill(self, inputs: StepInputs) -> None:
        self._clear_tails(inputs)
        self._inputs, self._planned = inputs, False
        if self._decode is None:
            self._plan(inputs)
        else:  # whose steps need no pieces
            self._decode.begin(inputs.block_tables, inputs.seq_lens, inputs.slot_mapping, inputs.positions)

    def _plan(self, inputs: StepInputs) -> None:
        """Where the step's tokens go, and its pieces: once in a step."""
        self._planned = True
        size, heads = self.limits.block_size, self.spec.num_kv_heads
        slots = inputs.slot_mapping.unsqueeze(-1)  # token-major -> head-major
        assert len(slots) <= self.limits.max_tokens, (len(slots), self.limits)
        self._step_slots = self._slots[: len(slots)].view(-1)
        block = slots.div(size, rounding_mode="floor")
        torch.add((block * heads + self._heads) * size, slots.remainder(size), out=self._slots[: len(slots)])
        rows = Rows.of(inputs)
        groups = plan_pieces(rows, size, self.max_gather)
        self._pieces, index_used, mask_used = [], 0, 0
        for group in groups:
            index = self._fill_index(inputs, group, index_used)
            index_used += len(index)
            if group.queries == 1:
                self._pieces.append(self._decode_piece(inputs, rows, group, index, mask_used))
                mask_used += len(group.rows) * group.blocks * size
            elif len(group.rows) == 1 and group.exact:
                self._pieces.append(self._long_piece(rows, group, index))
            else:
                self._pieces.append(self._padded_piece(inputs, rows, group, index))

    def _clear_tails(self, inputs: StepInputs) -> None:
        """Fills each row's last block with zeros if this step is the first to write to it, so old values are gone."""
        size = self.limits.block_size
        ends = inputs.seq_lens - 1
        last = inputs.block_tables.gather(1, _block_of(ends, size).unsqueeze(1)).squeeze(1)
        fresh = ends.remainder(size) < inputs.query_start_loc.diff()
        # On a GPU the dummy block is cleared for the other rows: selecting rows would wait for the device.
        blocks = last[fresh] if self.device.type == "cpu" else last.masked_fill(~fresh, 0)
        self._kv.index_fill_(2, blocks.long(), 0)
        if self._quantised:
            self._scales.index_fill_(2, blocks.long(), 0)

    def _fill_index(self, inputs: StepInputs, group: Group, used: int) -> Tensor:
        """The index to gather, int32 [rows * KV heads * blocks], in a static buffer. The last block is repeated."""
        heads = self.spec.num_kv_heads
        last = _block_of(_take(inputs.seq_lens, group.rows) - 1, self.limits.block_size)
        columns = torch.minimum(self._keys[: group.blocks], last.unsqueeze(1))
        tables = _take(inputs.block_tables, group.rows).gather(1, columns)
        out = self._index[used : used + len(group.rows) * heads * group.blocks]
        view = out.view(len(group.rows), heads, group.blocks)
        torch.add(tables.unsqueeze(1) * heads, self._heads.view(1, -1, 1), out=view)
        return out

    def _decode_piece(self, inputs: StepInputs, rows: Rows, group: Group, index: Tensor, used: int) -> _Piece:
        """The piece for rows with one query each."""
        count, keys = len(group.rows), group.blocks * self.limits.block_size
        firsts = [rows.starts[row] for row in group.rows]
        contiguous = firsts == list(range(firsts[0], firsts[0] + count))
        tokens = None if contiguous else _upload(firsts, self.device)
        positions = inputs.positions[firsts[0] : firsts[0] + count] if tokens is None else inputs.positions[tokens]
        mask = self._decode_mask[used : used + count * keys].view(count, keys)
        self._mask(self._keys[:keys] - positions.unsqueeze(-1), mask)
        chunk = _Chunk(0, 1, keys, mask.view(count, 1, 1, keys))
        return _Piece(count, 1, keys, index, (chunk,), start=firsts[0], tokens=tokens, written=tokens)

    def _long_piece(self, rows: Rows, group: Group, index: Tensor) -> _Piece:
        """The piece for one long row whose lengths the host knows exactly.

        Its masks are views, and its queries are divided into chunks, so that few keys are computed in vain.
        """
        row, size, chunks = group.rows[0], self.limits.block_size, []
        before = rows.seq_lens[row] - group.queries  # tokens computed by earlier steps
        longest = len(self._keys)
        if not self.spec.causal:
            chunks = [
                self._open_chunk(first, before, group, rows.seq_lens[row])
                for first in range(0, group.queries, self.chunk_queries)
            ]
            return _Piece(1, group.queries, group.blocks * size, index, tuple(chunks), start=rows.starts[row])
        for first in range(0, group.queries, self.chunk_queries):
            last = min(first + self.chunk_queries, group.queries)
            keys = min(-(-(before + last) // size), group.blocks) * size
            left = longest - before - first
            mask = self._band[: last - first, left : left + keys]
            if self.device.type != "cpu":
                mask = mask.contiguous()  # GPU kernels need aligned rows
            chunks.append(_Chunk(first, last, keys, mask.view(1, 1, last - first, keys)))
        return _Piece(1, group.queries, group.blocks * size, index, tuple(chunks), start=rows.starts[row])

    def _open_chunk(self, first: int, before: int, group: Group, length: int) -> _Chunk:
        """Queries from `first` on of a long row of `length` tokens, which may look ahead to its end."""
        last, keys = min(first + self.chunk_queries, group.queries), group.blocks * self.limits.block_size
        at = torch.arange(before + first, before + last, device=self.device).unsqueeze(-1)
        mask = torch.empty(last - first, keys, dtype=self.dtype, device=self.device)
        self._mask(self._keys[:keys] - at, mask, length - 1 - at)
        return _Chunk(first, last, keys, mask.view(1, 1, last - first, keys))

    def _padded_piece(self, inputs: StepInputs, rows: Rows, group: Group, index: Tensor) -> _Piece:
        """The piece for short rows. Padding repeats a row's last query, so no row of the mask is -inf everywhere."""
        queries, keys = group.queries, group.blocks * self.limits.block_size
        tokens: list[int] = []
        real: list[int] = []  # indices in `tokens`
        written: list[int] = []
        for row in group.rows:
            first, count = rows.starts[row], rows.query_lens[row]
            real += range(len(tokens), len(tokens) + count)
            written += range(first, first + count)
            tokens += [*range(first, first + count), *[first + count - 1] * (queries - count)]
        at = _upload(tokens, self.device)
        positions = inputs.positions[at].unsqueeze(-1)
        ahead, most = (
            self._keys[:keys] - positions,
            0 if self.spec.causal else self._to_the_end(inputs, group) - positions,
        )
        mask = self._mask(ahead, torch.empty(ahead.shape, dtype=self.dtype, device=self.device), most)
        chunk = _Chunk(0, queries, keys, mask.view(len(group.rows), 1, queries, keys))
        return _Piece(
            len(group.rows),
            queries,
            keys,
            index,
            (chunk,),
            tokens=at,
            real=_upload(real, self.device) if len(real) < len(tokens) else None,
            written=_upload(written, self.device),
        )

    def _to_the_end(self, inputs: StepInputs, group: Group) -> Tensor:
        """The last position of the row of each query of a padded piece, [rows * queries, 1]."""
        return (_take(inputs.seq_lens, group.rows) - 1).repeat_interleave(group.queries).unsqueeze(-1)

    def attend_qkv(
        self, layer: int, spec: AttentionLayerSpec, qkv: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor | None:
        """By the kernel in C, where it could be built: steps of single tokens on a CPU, in float32."""
        inputs, kernel = self._inputs, self._decode
        if kernel is None or inputs is None or inputs.num_decode_rows != len(qkv) or inputs.decode_query_len != 1:
            return None
        if spec.extras:  # a subclass's features are in its `attend`
            return None
        k_cache, v_cache = self._kv[layer]
        return kernel.attend(
            qkv, k_cache, v_cache, inv_freq=rotation.inv_freq, interleaved=rotation.interleaved,
            magnitude=rotation.magnitude, q_weight=norms.q if norms else None, k_weight=norms.k if norms else None,
            eps=norms.eps if norms else 0.0, scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap,
            sinks=spec.sinks,
        )  # fmt: skip

    def forward(self, layer: int, spec: AttentionLayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self._planned:
            assert self._inputs is not None, "fill comes first"
            self._plan(self._inputs)
        cache = self._layers[layer]
        self._store(cache.k_rows, cache.k_scales, k)
        self._store(cache.v_rows, cache.v_scales, v)
        return self.attend(layer, spec, q)

    def _store(self, rows: Tensor, scales: Tensor, new: Tensor) -> None:
        new = new.reshape(-1, rows.shape[1])
        if self._quantised:
            codes, scale = quantise_heads(new, self.spec.kv_dtype)
            new = codes.view(torch.uint8)
            scales.view(-1).index_copy_(0, self._step_slots, scale)
        rows.index_copy_(0, self._step_slots, new)

    def attend(self, layer: int, spec: AttentionLayerSpec, q: Tensor) -> Tensor:
        if not self._planned:
            assert self._inputs is not None, "fill comes first"
            self._plan(self._inputs)
        if self._covers(len(q)):
            return self._attend_piece(layer, spec, self._pieces[0], q)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        done = 0
        for piece in self._pieces:
            result = self._attend_piece(layer, spec, piece, q)
            if piece.written is None:
                out[piece.start : piece.start + len(result)] = result
            else:
                out.index_copy_(0, piece.written, result)
            done += len(result)
        if done < len(q):  # padding after the last row
            out[done:].zero_()
        return out

    def _covers(self, num_tokens: int) -> bool:
        """Whether there is one piece with all tokens of the step in order, so that its result is the output."""
        first = self._pieces[0] if len(self._pieces) == 1 else None
        return first is not None and first.written is None and first.rows * first.queries == num_tokens

    def _attend_piece(self, layer: int, spec: AttentionLayerSpec, piece: _Piece, q: Tensor) -> Tensor:
        """The output for the piece's tokens without padding, [N, H, D]."""
        count, (heads, width) = piece.rows * piece.queries, q.shape[1:]
        keys, values = self._gather(layer, piece)
        span = slice(piece.start, piece.start + count)
        mine = q[span] if piece.tokens is None else q.index_select(0, piece.tokens)
        mine = mine.reshape(piece.rows, piece.queries, heads, width)
        parts = [
            _attend(mine[:, c.first : c.last], keys[:, :, : c.keys], values[:, :, : c.keys], c.mask, spec)
            for c in piece.chunks
        ]
        result = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).reshape(count, heads, width)
        return result if piece.real is None else result.index_select(0, piece.real)

    def _gather(self, layer: int, piece: _Piece) -> tuple[Tensor, Tensor]:
        """K and V of the piece's rows, each [rows, KV heads, keys, head size], in the scratch buffer."""
        cache = self._layers[layer]
        shape = (piece.rows, self.spec.num_kv_heads, piece.keys, self.spec.head_size)
        keys, values = self._scratch[:, : math.prod(shape)].unbind()
        self._take(cache.k_blocks, cache.k_scales, piece.index, keys.view(len(piece.index), -1))
        self._take(cache.v_blocks, cache.v_scales, piece.index, values.view(len(piece.index), -1))
        return keys.view(shape), values.view(shape)

    def _take(self, blocks: Tensor, scales: Tensor, index: Tensor, out: Tensor) -> None:
        """Copies whole blocks of heads to `out`, [blocks, block size * head size]."""
        if not self._quantised:
            torch.index_select(blocks, 0, index, out=out)
            return
        size = self.limits.block_size
        codes = blocks.index_select(0, index).view(self.stored).view(len(index), size, -1)
        scale = scales.view(-1, size).index_select(0, index)
        out.view(codes.shape).copy_(dequantise_heads(codes, scale, out.dtype))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU, the system allocates the memory page by page when it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def _block_of(positions: Tensor, block_size: int) -> Tensor:
    """The index of the block, in its row, that has each position; int64."""
    return positions.long().div(block_size, rounding_mode="floor")


def _take(table: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Rows of a table: a view if they are consecutive, else a copy."""
    if rows == tuple(range(rows[0], rows[0] + len(rows))):
        return table[rows[0] : rows[0] + len(rows)]
    return table.index_select(0, _upload(rows, table.device))


def _upload(values: Sequence[int], device: torch.device) -> Tensor:
    """The values as an int64 tensor on `device`, without waiting for the device."""
    if device.type == "cpu":
        return torch.tensor(values)
    return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: AttentionLayerSpec) -> Tensor:
    """Attention: q [n, queries, H, D], k and v [n, Hkv, keys, D], mask [n or 1, 1, queries, keys] -> shape of q."""
    batched_decode = q.shape[1] == 1 and len(q) >= _MANY_ROWS and q.dtype == torch.float32
    if spec.soft_cap is None and spec.sinks is None and not batched_decode:
        grouped = spec.num_heads != spec.num_kv_heads
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, scale=spec.scale, enable_gqa=grouped
        )
        return mixed.transpose(1, 2)
    return _attend_plainly(q, k, v, mask, spec)


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: AttentionLayerSpec) -> Tensor:
    """As `_attend`, by two batched products in float32: for a soft cap or sinks, and faster for many single float32
    queries."""
    n, queries, heads, width = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    # [n * Hkv, queries * group, D]: queries that share a KV head become rows of one product
    folded = q.view(n, queries, kv_heads, group, width).transpose(1, 2).reshape(n * kv_heads, -1, width).float()
    flat_k, flat_v = (x.reshape(n * kv_heads, keys, width).float() for x in (k, v))
    scores = torch.bmm(folded, flat_k.transpose(1, 2)).mul_(spec.scale)
    if spec.soft_cap is not None:
        scores.div_(spec.soft_cap).tanh_().mul_(spec.soft_cap)
    scores.view(n, kv_heads, queries, group, keys).add_(mask.unsqueeze(-2))
    mixed = torch.bmm(torch.softmax(scores, dim=-1), flat_v)
    if spec.sinks is not None:  # what the keys keep of a softmax in which the sink takes part
        total = torch.logsumexp(scores, dim=-1).view(n, kv_heads, queries, group)
        kept = torch.sigmoid(total - spec.sinks.float().view(1, kv_heads, 1, group))
        mixed *= kept.view(n * kv_heads, -1, 1)
    mixed = mixed.to(q.dtype)
    return mixed.view(n, kv_heads, queries, group, width).transpose(1, 2).reshape(q.shape)
