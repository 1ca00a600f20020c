"""Attention with our own Triton kernels: paged decode with split contexts, ragged paged prefill.

Kernels read everything about a step from its static buffers on the device. So `fill` computes nothing and waits for
nothing, and a captured launch can be used for any later step of the same shape. The grid of a launch depends only on
the numbers of rows and tokens and on `BatchLimits`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanoengine.api import (
    AttentionBackend,
    AttentionCapabilities,
    AttentionFeature,
    AttentionLayerSpec,
    AttentionNeed,
    BatchLimits,
    GraphSupport,
    HeadNorms,
    KVCacheView,
    KVSpec,
    Rotation,
    StepInputs,
)
from nanoengine.kernels.choice import BY_DEFAULT
from nanoengine.kernels.gluon import multiprocessors, runs_gluon
from nanoengine.kernels.kv_quant import KV_DTYPES, stored_bytes

if TYPE_CHECKING:
    from nanoengine.kernels.paged_attention_slices import SlicesPlanner
    from nanoengine.kernels.paged_attention_triton import DecodePlanner, NewTokens

_MIN_COMPUTE_CAPABILITY = (8, 0)  # asynchronous copies; bf16 in tensor cores
_FP8_COMPUTE_CAPABILITY = (8, 9)
_DECODE_QUERIES = 16  # more are prefill rows, whose keys are not split over programs
_MAX_HEAD_SIZE = 256  # because a query's accumulator is in registers


class TritonPaged(AttentionBackend):
    """The Triton backend. On a CPU it runs in Triton's interpreter (TRITON_INTERPRET=1), only for tests."""

    capabilities = AttentionCapabilities(
        devices=frozenset({"cuda", "cpu"}),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        graphs=GraphSupport.ALWAYS,
        features=frozenset(AttentionFeature),
        decode_queries=_DECODE_QUERIES,
        kv_dtypes=frozenset(KV_DTYPES),
    )

    @classmethod
    def unsupported(cls, need: AttentionNeed) -> list[str]:
        reasons = super().unsupported(need)
        if max(need.head_sizes, default=0) > _MAX_HEAD_SIZE:
            reasons.append(f"head size {max(need.head_sizes)} is larger than {_MAX_HEAD_SIZE}")
        try:
            import nanoengine.kernels.paged_attention_triton  # noqa: F401 - checks that it can be imported
        except Exception as error:  # noqa: BLE001 - a broken package may raise anything
            reasons.append(f"its kernels cannot be imported: {type(error).__name__}: {error}")
        if need.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            reasons.append("needs an NVIDIA GPU (tests run it on a CPU with TRITON_INTERPRET=1)")
        if need.device == "cuda" and torch.cuda.is_available():
            found = torch.cuda.get_device_capability()
            if need.kv_dtype == "fp8" and found < _FP8_COMPUTE_CAPABILITY:
                reasons.append(f"needs compute capability 8.9 or higher for fp8; this GPU has {found[0]}.{found[1]}")
            if found < _MIN_COMPUTE_CAPABILITY:
                reasons.append(f"needs compute capability 8.0 or higher; this GPU has {found[0]}.{found[1]}")
        return reasons

    @classmethod
    def kv_block_bytes(cls, spec: KVSpec, block_size: int) -> int:
        return 2 * block_size * spec.num_kv_heads * stored_bytes(spec.kv_dtype, spec.dtype, spec.head_size)

    def __init__(self, spec: KVSpec, limits: BatchLimits, device: torch.device) -> None:
        from nanoengine.kernels import paged_attention_triton, rope_triton

        self._kernels, self._rope = paged_attention_triton, rope_triton
        self.spec, self.limits, self.device = spec, limits, device
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self._planners: dict[int, DecodePlanner] = {}  # by number of query heads
        self._kv = torch.empty(0)
        self._scales: Tensor | None = None
        self._inputs: StepInputs | None = None
        self._most_queries = 1  # of a decode row of any step so far
        kernels = spec.kernels or BY_DEFAULT
        self._by_codes = kernels.has("attention_codes")
        by_warps = kernels.has("attention_prefill_gluon")
        self._counter = torch.zeros(1, dtype=torch.int32, device=device) if by_warps else None
        self._by_slices, self._beside_slices = (
            kernels.has(name) for name in ("attention_slices", "attention_slices_beside")
        )
        self._by_code_slices = kernels.has("attention_code_slices")
        self._slices_planners: dict[int, SlicesPlanner] = {}  # by number of query heads

    def _longest(self) -> int:
        """The largest number of keys that a query of this group attends to."""
        return min(self.limits.max_model_len, self.spec.window or self.limits.max_model_len)

    def _planner(self, num_heads: int) -> DecodePlanner:
        """The planner for layers with so many query heads. Made at the first step, because `spec` has only KV heads."""
        if num_heads not in self._planners:
            self._planners[num_heads] = self._kernels.DecodePlanner.make(
                num_heads=num_heads, num_kv_heads=self.spec.num_kv_heads, head_size=self.spec.head_size,
                dtype=self.dtype, max_rows=self.limits.max_rows, longest=self._longest(), device=self.device,
            )  # fmt: skip
        return self._planners[num_heads]

    def allocate(self, num_layers: int, num_blocks: int) -> None:
        spec = self.spec
        shape = (num_layers, 2, num_blocks, spec.num_kv_heads, self.limits.block_size, spec.head_size)
        stored = KV_DTYPES.get(spec.kv_dtype, self.dtype)
        self._kv = torch.zeros(shape, dtype=stored, device=self.device)
        if spec.kv_dtype in KV_DTYPES:
            self._scales = torch.zeros(shape[:-1], dtype=torch.float32, device=self.device)

    def release(self) -> None:
        self._kv, self._scales = torch.empty(0), None

    def _scales_of(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Of K and of V; None: they are stored in the model's dtype."""
        return None if self._scales is None else (self._scales[layer, 0], self._scales[layer, 1])

    def fill(self, inputs: StepInputs) -> None:
        self._inputs = inputs

    def kv_cache(self, layer: int) -> KVCacheView | None:
        """The head-major cache as a token-major view; None: it has codes, which only `store` writes."""
        if self._scales is not None:
            return None
        assert self._inputs is not None, "kv_cache was called before fill"
        keys, values = self._kv[layer].unbind()
        return KVCacheView(keys.transpose(1, 2), values.transpose(1, 2), self._inputs.slot_mapping)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """The first half of `forward`: stores K and V of all rows in the cache."""
        assert self._inputs is not None, "store was called before fill"
        self._kernels.store_kv(
            k, v, self._kv[layer, 0], self._kv[layer, 1], self._inputs.slot_mapping, self._scales_of(layer)
        )

    def attend(self, layer: int, spec: AttentionLayerSpec, q: Tensor) -> Tensor:
        """The second half of `forward`: the attention of every row over the stored K and V."""
        inputs = self._inputs
        assert inputs is not None, "attend was called before fill"
        k_cache, v_cache = self._kv[layer, 0], self._kv[layer, 1]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        total, queries = len(inputs.seq_lens), inputs.decode_query_len
        rows = inputs.num_decode_rows if queries == 1 or spec.causal else 0
        prefills = rows < total or len(q) > total * queries
        if rows:  # what it sets to zero must not stand between the two launches that run beside each other
            self._planner(spec.num_heads)
            if self._beside_slices and self._has_slices(spec):
                self._slices_planner(spec.num_heads)
        if prefills:
            self._kernels.attend_prefill(
                q, k_cache, v_cache, out, inputs.block_tables[rows:], inputs.seq_lens[rows:],
                inputs.query_start_loc[rows:], scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap,
                sinks=spec.sinks, causal=spec.causal, scales=self._scales_of(layer), counter=self._counter,
                decode_behind=rows > 0,
            )  # fmt: skip
        if rows:
            self._decode(layer, spec, q, out, rows, pad_tokens=0 if prefills else len(q), beside=prefills)
        return out

    def _decode(
        self, layer: int, spec: AttentionLayerSpec, q: Tensor, out: Tensor, rows: int, *, pad_tokens: int, beside: bool
    ) -> None:
        """The attention of the first `rows` rows, into `out`. pad_tokens: tokens behind the last row of a step that has
        only such rows come out as zeros, up to this one. beside: behind the prefill of other rows, limited by latency
        and arithmetic where decode is by memory: they run at the same time."""
        inputs, planner = self._inputs, self._planner(spec.num_heads)
        assert inputs is not None
        tables, seq_lens = inputs.block_tables[:rows], inputs.seq_lens[:rows]
        single = inputs.decode_query_len == 1
        if single and beside and self._beside_slices and self._attend_slices(layer, spec, q[:rows], out[:rows], None):
            return
        if single:
            self._kernels.attend_decode(
                q[:rows], self._kv[layer, 0], self._kv[layer, 1], out[:rows], tables, seq_lens, scale=spec.scale,
                window=spec.window, soft_cap=spec.soft_cap, config=planner.config(rows), scratch=planner.scratch,
                sinks=spec.sinks, scales=self._scales_of(layer), by_codes=self._by_codes,
                beside=beside,
            )  # fmt: skip
        else:
            queries = inputs.decode_query_len
            # Tiles that hold the most drafts: steps with fewer, which may be eager, find their kernel compiled.
            self._most_queries = max(self._most_queries, queries)
            self._kernels.attend_several(
                q, self._kv[layer, 0], self._kv[layer, 1], out, tables, seq_lens, inputs.query_start_loc[: rows + 1],
                queries=queries, scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap,
                config=planner.several(rows, self._most_queries), tickets=planner.scratch.tickets,
                pad_tokens=pad_tokens, sinks=spec.sinks, scales=self._scales_of(layer),
            )  # fmt: skip

    def attend_qkv(
        self, layer: int, spec: AttentionLayerSpec, qkv: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor | None:
        """For steps of single tokens only, and for numbers of rows at which one kernel is faster than two. Where the
        cache has codes, other steps have one kernel that puts them there and another that attends."""
        inputs = self._inputs
        assert inputs is not None, "fill comes first"
        if spec.extras:  # a subclass's features are in its `attend`
            return None
        coded, rows, plain = self._scales is not None, len(qkv), not rotation.interleaved and rotation.magnitude == 1
        plain = plain and inputs.decode_query_len == 1 and rows == inputs.num_decode_rows
        new, out = None, None
        if plain and 2 * len(rotation.inv_freq) == spec.head_size:
            new = self._kernels.NewTokens(
                slots=inputs.slot_mapping, inv_freq=rotation.inv_freq, q_weight=norms.q if norms else None,
                k_weight=norms.k if norms else None, eps=norms.eps if norms else 0.0,
            )  # fmt: skip
        if new is not None:
            out = self._attend_codes(layer, spec, qkv, new) if coded else self._attend_new(layer, spec, qkv, new)
        if out is None and coded:
            return self.attend(layer, spec, self._stored(layer, qkv, rotation, norms))
        return out

    def _attend_new(self, layer: int, spec: AttentionLayerSpec, qkv: Tensor, new: NewTokens) -> Tensor | None:
        """`attend_qkv` of a cache in the model's dtype."""
        inputs, rows = self._inputs, len(qkv)
        assert inputs is not None
        out = torch.empty(rows, spec.num_heads, spec.head_size, dtype=qkv.dtype, device=qkv.device)
        if self._by_slices and self._attend_slices(layer, spec, qkv, out, new):
            return out
        planner = self._planner(spec.num_heads)
        config = planner.fused(rows)
        if config is None:
            return None
        self._kernels.attend_decode(
            qkv, self._kv[layer, 0], self._kv[layer, 1], out, inputs.block_tables, inputs.seq_lens,
            scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap, config=config, scratch=planner.scratch,
            sinks=spec.sinks, new=new,
        )  # fmt: skip
        return out

    def _attend_codes(self, layer: int, spec: AttentionLayerSpec, qkv: Tensor, new: NewTokens) -> Tensor | None:
        """`attend_qkv` of a cache of codes; None: there is no such kernel for this machine, this layer or this number
        of rows."""
        name, slower = "paged_attention_code_slices_gluon", "K and V in eight bits are read by a slower kernel"
        plain, scales = spec.window is None and spec.soft_cap is None and spec.sinks is None, self._scales_of(layer)
        if not (self._by_code_slices and plain and runs_gluon(self.device, slower, name)):
            return None
        from nanoengine.kernels import paged_attention_code_slices_gluon as by_gluon
        from nanoengine.kernels.paged_attention_slices import code_slices_keys

        inputs, (k_cache, v_cache), rows = self._inputs, self._kv[layer], len(qkv)
        assert inputs is not None and scales is not None
        processors, kv = multiprocessors(self.device), self.spec
        keys = code_slices_keys(kv.kv_dtype, rows, kv.num_kv_heads, self._longest(), processors)
        if keys is None or not by_gluon.takes(qkv, k_cache, spec.num_heads // spec.num_kv_heads, keys):
            return None
        out = torch.empty(rows, spec.num_heads, spec.head_size, dtype=qkv.dtype, device=qkv.device)
        by_gluon.attend_code_slices(
            qkv, k_cache, v_cache, scales, out, inputs.block_tables, inputs.seq_lens, new, scale=spec.scale, keys=keys
        )
        return out

    def _attend_slices(
        self, layer: int, spec: AttentionLayerSpec, qkv: Tensor, out: Tensor, new: NewTokens | None
    ) -> bool:
        """The attention of the first rows, into `out`. new: None: of q, beside prefill. False: there is no such kernel
        for this machine, this layer or this number of rows."""
        if not self._has_slices(spec):
            return False
        from nanoengine.kernels import paged_attention_slices_gluon as by_gluon

        inputs, (k_cache, v_cache), rows = self._inputs, self._kv[layer], len(out)
        assert inputs is not None
        planner = self._slices_planner(spec.num_heads)
        config = planner.config(rows)
        if config is None or not by_gluon.takes(qkv, k_cache, spec.num_heads // spec.num_kv_heads):
            return False
        if new is None and (config.splits > 1 or qkv.stride()[1:] != (spec.head_size, 1)):
            return False
        by_gluon.attend_slices(
            qkv, k_cache, v_cache, out, inputs.block_tables[:rows], inputs.seq_lens[:rows], new, scale=spec.scale,
            config=config, scratch=planner.scratch,
        )  # fmt: skip
        return True

    def _has_slices(self, spec: AttentionLayerSpec) -> bool:
        plain = spec.window is None and spec.soft_cap is None and spec.sinks is None and self._scales is None
        slower = "attention of decode rows runs on another kernel"
        return plain and runs_gluon(self.device, slower, "paged_attention_slices_gluon")

    def _slices_planner(self, num_heads: int) -> SlicesPlanner:
        """As `_planner`."""
        if num_heads not in self._slices_planners:
            from nanoengine.kernels.paged_attention_slices import SlicesPlanner

            self._slices_planners[num_heads] = SlicesPlanner.make(
                num_heads=num_heads, num_kv_heads=self.spec.num_kv_heads, max_rows=self.limits.max_rows,
                device=self.device,
            )  # fmt: skip
        return self._slices_planners[num_heads]

    def _stored(self, layer: int, qkv: Tensor, rotation: Rotation, norms: HeadNorms | None) -> Tensor:
        """Normalises, rotates and stores, as codes. Returns q."""
        inputs, scales = self._inputs, self._scales_of(layer)
        assert inputs is not None and scales is not None
        keys, values = self._kv[layer].transpose(2, 3).unbind()
        return self._rope.qk_norm_rope_store(
            qkv, inputs.positions, rotation.inv_freq, keys, values, inputs.slot_mapping,
            q_weight=norms.q if norms else None, k_weight=norms.k if norms else None, eps=norms.eps if norms else 0.0,
            magnitude=rotation.magnitude, interleaved=rotation.interleaved,
            scales=(scales[0].transpose(1, 2), scales[1].transpose(1, 2)),
        )  # fmt: skip

    def forward(self, layer: int, spec: AttentionLayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.store(layer, k, v)
        return self.attend(layer, spec, q)
