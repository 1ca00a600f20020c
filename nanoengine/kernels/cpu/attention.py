"""Attention of rows of one token each over a paged cache, in C, from the output of the qkv projection."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nanoengine.kernels.cpu.library import LANES, Library

LARGEST_HEAD = 256


class _Call(ctypes.Structure):
    """`attend_t` of layers.c."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "q_norm", "k_norm", "k", "v", "tables", "lens",
                                               "slots", "sinks", "out")],
        *[(name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "size", "block_size", "table_width",
                                              "rotated", "window", "interleaved")],
        *[(name, ctypes.c_float) for name in ("eps", "scale", "cap")],
    )  # fmt: skip


class DecodeAttention:
    """The attention of one step's rows in all layers: `begin` once in a step, then `attend` for each layer."""

    def __init__(self, library: Library) -> None:
        self._c, self._call = library, _Call()
        self._held: tuple[Tensor, ...] = ()
        self._tables: dict[tuple[int, int, bool, float], tuple[Tensor, Tensor, Tensor]] = {}

    def begin(self, block_tables: Tensor, seq_lens: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Tables int32 [B, blocks], lengths with the new token int32 [B], its slot and position int64 [B]."""
        self._held = (block_tables, seq_lens, slots, positions)
        self._tables.clear()
        call = self._call
        call.tables, call.table_width = block_tables.data_ptr(), block_tables.stride(0)
        call.lens, call.slots = seq_lens.data_ptr(), slots.data_ptr()

    def attend(
        self,
        qkv: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        inv_freq: Tensor,
        interleaved: bool = False,
        magnitude: float = 1.0,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 0.0,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Stores K and V of the new tokens, and attends, as `paged_attention.attend_decode_qkv` does.

        Args:
            qkv: float32 [B, (heads + 2 kv_heads) * size], contiguous; size a multiple of 16, up to `LARGEST_HEAD`.
            k_cache, v_cache: float32 [blocks, kv_heads, block size, size], contiguous, written in place.
            inv_freq: float32 [rotated / 2]. q_weight, k_weight: [size] of norms of each head, with `eps`.
            sinks: [heads].

        Returns:
            float32 [B, heads, size].
        """
        rows, (_, kv_heads, block_size, size) = len(qkv), k_cache.shape
        heads = qkv.shape[1] // size - 2 * kv_heads
        out = torch.empty(rows, heads, size)
        cos, sin = self._rotation(inv_freq, interleaved, magnitude)
        wide = [None if each is None else each.float().contiguous() for each in (q_weight, k_weight, sinks)]
        q_norm, k_norm, sink = wide  # alive until the call has ended
        call = self._call
        call.qkv, call.k, call.v, call.out = qkv.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr()
        call.cos, call.sin, call.rotated, call.interleaved = cos.data_ptr(), sin.data_ptr(), cos.shape[1], interleaved
        call.q_norm = None if q_norm is None else q_norm.data_ptr()
        call.k_norm = None if k_norm is None else k_norm.data_ptr()
        call.sinks = None if sink is None else sink.data_ptr()
        call.rows, call.heads, call.kv_heads, call.size, call.block_size = rows, heads, kv_heads, size, block_size
        call.eps, call.scale, call.window, call.cap = eps, scale, window or 0, soft_cap or 0.0
        self._c.attend(ctypes.addressof(call), rows)
        return out

    def _rotation(self, inv_freq: Tensor, interleaved: bool, magnitude: float) -> tuple[Tensor, Tensor]:
        """cos and sin of the step's rows, float32 [B, rotated]: sin is negative for the first of each pair."""
        key = (inv_freq.data_ptr(), len(inv_freq), interleaved, magnitude)
        found = self._tables.get(key)
        if found is None:
            angles = self._held[3].float().unsqueeze(-1) * inv_freq
            cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
            pairs = torch.stack if interleaved else torch.cat
            # with what they are made of: else a tensor that comes after it may have its address
            found = pairs((cos, cos), dim=-1).flatten(1), pairs((-sin, sin), dim=-1).flatten(1), inv_freq
            self._tables[key] = found
        return found[:2]


def takes(size: int, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for heads of this size and dtype."""
    return size % LANES == 0 and size <= LARGEST_HEAD and dtype is torch.float32
