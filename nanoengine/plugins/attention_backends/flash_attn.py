"""Attention with flash-attn, version 2: paged decode with its KV-cache call, prefill with its ragged one.

The KV-cache call wants as many queries in each row, so rows with drafts are prefill rows: the ragged call reads their
lengths on the device, and upper bounds of them on the host.
"""

from __future__ import annotations

import importlib
from types import ModuleType

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
    KVSpec,
    StepInputs,
)

_MIN_COMPUTE_CAPABILITY = (8, 0)


class FlashAttn(AttentionBackend):
    """The flash-attn backend. K and V of a layer are [num_blocks, block_size, kv_heads, head_size], as in the package.

    Values of other requests after a row's end are not cleared: version 2 of the package sets the scores of such keys to
    -inf and uses zeros as their values, so even NaN has no effect. Later versions of the package do not do this.
    """

    capabilities = AttentionCapabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({"bfloat16", "float16"}),
        head_sizes=frozenset(range(8, 257, 8)),
        block_multiple=256,
        graphs=GraphSupport.DECODE,
        features=frozenset(
            {
                AttentionFeature.SLIDING_WINDOW,
                AttentionFeature.SOFT_CAP,
                AttentionFeature.NON_CAUSAL,
                AttentionFeature.SHARED_KV,
            }
        ),
    )

    @classmethod
    def unsupported(cls, need: AttentionNeed) -> list[str]:
        reasons = super().unsupported(need)
        try:
            package = importlib.import_module("flash_attn")
        except Exception as error:  # noqa: BLE001 - a broken package may raise anything
            return [*reasons, f"flash_attn cannot be imported: {type(error).__name__}: {error}"]
        missing = [name for name in ("flash_attn_with_kvcache", "flash_attn_varlen_func") if not hasattr(package, name)]
        if missing:
            version = getattr(package, "__version__", "of unknown version")
            reasons.append(f"flash_attn {version} has no {' and no '.join(missing)}; version 2.6 or later is needed")
        if need.device == "cuda" and torch.cuda.is_available():
            found = torch.cuda.get_device_capability()
            if found < _MIN_COMPUTE_CAPABILITY:
                reasons.append(f"needs compute capability 8.0 or higher; this GPU has {found[0]}.{found[1]}")
        return reasons

    @classmethod
    def kv_block_bytes(cls, spec: KVSpec, block_size: int) -> int:
        itemsize: int = getattr(torch, spec.dtype).itemsize
        return 2 * block_size * spec.num_kv_heads * spec.head_size * itemsize

    def __init__(self, spec: KVSpec, limits: BatchLimits, device: torch.device) -> None:
        self._package: ModuleType = importlib.import_module("flash_attn")
        self.spec, self.limits, self.device = spec, limits, device
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        # For the rows after the decode rows: where their queries and keys begin, counted from the first of these rows.
        self._query_starts = torch.zeros(limits.max_rows + 1, dtype=torch.int32, device=device)
        self._key_starts = torch.zeros(limits.max_rows + 1, dtype=torch.int32, device=device)
        self._kv = torch.empty(0)
        self._inputs: StepInputs | None = None

    def allocate(self, num_layers: int, num_blocks: int) -> None:
        spec = self.spec
        shape = (num_layers, 2, num_blocks, self.limits.block_size, spec.num_kv_heads, spec.head_size)
        self._kv = torch.zeros(shape, dtype=self.dtype, device=self.device)

    def release(self) -> None:
        self._kv = torch.empty(0)

    def fill(self, inputs: StepInputs) -> None:
        self._inputs = inputs
        first, rows = inputs.num_decode_rows, len(inputs.seq_lens) - inputs.num_decode_rows
        if rows:
            torch.sub(inputs.query_start_loc[first:], first, out=self._query_starts[: rows + 1])
            torch.cumsum(inputs.seq_lens[first:], 0, dtype=torch.int32, out=self._key_starts[1 : rows + 1])

    def forward(self, layer: int, spec: AttentionLayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inputs = self._inputs
        assert inputs is not None, "forward was called before fill"
        k_cache, v_cache = self._kv[layer].unbind()
        k_cache.flatten(0, 1).index_copy_(0, inputs.slot_mapping, k)
        v_cache.flatten(0, 1).index_copy_(0, inputs.slot_mapping, v)
        return self.attend(layer, spec, q)

    def attend(self, layer: int, spec: AttentionLayerSpec, q: Tensor) -> Tensor:
        inputs = self._inputs
        assert inputs is not None, "attend was called before fill"
        k_cache, v_cache = self._kv[layer].unbind()
        rows, used = inputs.num_decode_rows, sum(inputs.query_lens_host)
        parts = []
        if rows:
            parts.append(self._decode(spec, q[:rows], k_cache, v_cache, inputs))
        if rows < len(inputs.seq_lens):
            parts.append(self._prefill(spec, q[rows:used], k_cache, v_cache, inputs))
        if used < len(q):  # padding after the last row
            parts.append(torch.zeros_like(q[used:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(
        self, spec: AttentionLayerSpec, q: Tensor, k_cache: Tensor, v_cache: Tensor, inputs: StepInputs
    ) -> Tensor:
        """The result for decode rows, which have one query each: [rows, heads, head_size]."""
        rows = len(q)
        out: Tensor = self._package.flash_attn_with_kvcache(
            q.unsqueeze(1),
            k_cache,
            v_cache,
            cache_seqlens=inputs.seq_lens[:rows],
            block_table=inputs.block_tables[:rows],
            softmax_scale=spec.scale,
            causal=True,
            window_size=_window(spec),
            softcap=spec.soft_cap or 0.0,
        )
        return out.squeeze(1)

    def _prefill(
        self, spec: AttentionLayerSpec, q: Tensor, k_cache: Tensor, v_cache: Tensor, inputs: StepInputs
    ) -> Tensor:
        """The result for the rows after the decode rows: [their tokens, heads, head_size]."""
        first, rows = inputs.num_decode_rows, len(inputs.seq_lens) - inputs.num_decode_rows
        out: Tensor = self._package.flash_attn_varlen_func(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=self._query_starts[: rows + 1],
            cu_seqlens_k=self._key_starts[: rows + 1],
            max_seqlen_q=max(inputs.query_lens_host[first:]),
            max_seqlen_k=max(inputs.seq_lens_host[first:]),
            softmax_scale=spec.scale,
            causal=spec.causal,
            window_size=_window(spec),
            softcap=spec.soft_cap or 0.0,
            block_table=inputs.block_tables[first:],
        )
        return out


def _window(spec: AttentionLayerSpec) -> tuple[int, int]:
    """The window as the package counts it, without the query itself: (tokens to the left, tokens to the right)."""
    return (-1, -1) if spec.window is None else (spec.window - 1, 0 if spec.causal else spec.window - 1)
