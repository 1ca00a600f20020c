"""The interface of attention backends: what a backend declares, receives and does. Torch only in annotations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from nanoengine.api.errors import nearest, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nanoengine.kernels.ops import KernelChoice


class GraphSupport(IntEnum):
    """Which batches of the backend may be captured in a CUDA graph.

    NEVER: none. DECODE: query length 1. ALWAYS: any padded batch, `fill` included. Then `fill` is captured instead of
    being called in each step, so it may use shapes and tensors, but not `query_lens_host` and `seq_lens_host`.
    """

    NEVER = 0
    DECODE = 1
    ALWAYS = 2


class AttentionFeature(StrEnum):
    """What a layer may need in addition to plain causal attention. The set is open: a feature is a text, and a plugin
    has its own ones, named `"package.feature"`.
    """

    SLIDING_WINDOW = "sliding window"
    SOFT_CAP = "logit soft cap"
    SINKS = "attention sinks"
    NON_CAUSAL = "non-causal attention"
    SHARED_KV = "shared KV"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """What the layers of one KV group have in common. `num_kv_heads` is per rank; `dtype` is a torch dtype's name.

    `head_size`: of K and V; a narrower one of the two is padded with zeros. `window`, `causal`: as in
    `AttentionLayerSpec`. `kv_dtype`: how K and V are stored: "auto" is `dtype`; "fp8" and "int8" have a scale for each
    head of each token (`nanoengine.kernels.kv_quant`). `kernels`: what `engine.kernels` turns on and off.
    """

    num_kv_heads: int
    head_size: int
    dtype: str
    window: int | None = None
    causal: bool = True
    kv_dtype: str = "auto"
    kernels: KernelChoice | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayerSpec:
    """One attention layer. Heads are per rank; scores are `q @ k * scale`, capped if `soft_cap` is set.

    Attributes:
        num_heads, num_kv_heads: of queries, of keys and values. head_size: width of a query and of a key.
        window: a query at position p attends to positions > p - window; if not causal, also only to positions
            < p + window. None: to all.
        sinks: float [num_heads], a score of each head that takes part in the softmax and has no value; neither scaled
            nor capped. It is usually a parameter of the model.
        causal: False: a query attends to all tokens of its request that this step or an earlier one computes. Then each
            prompt is computed in one step, without the prefix cache, and a request generates one token.
        value_size: width of a value; None: head_size. A backend always gets equal widths: the layer pads the narrower
            ones with zeros.
        shares: name of an earlier layer whose K and V the layer reads. It stores none: the model calls `attend`.
        extras: features of plugins that the layer needs, `"package.feature"`, and what the backend must know of each.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = field(default=None, compare=False)
    causal: bool = True
    value_size: int | None = None
    shares: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def features(self) -> frozenset[str]:
        """What the layer needs of a backend in addition to plain causal attention."""
        asked = {
            AttentionFeature.SLIDING_WINDOW: self.window is not None,
            AttentionFeature.SOFT_CAP: self.soft_cap is not None,
            AttentionFeature.SINKS: self.sinks is not None,
            AttentionFeature.NON_CAUSAL: not self.causal,
            AttentionFeature.SHARED_KV: self.shares is not None,
        }
        return frozenset(feature for feature, needed in asked.items() if needed) | self.extras.keys()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCapabilities:
    """What a backend can do. `None` means "any".

    Attributes:
        devices: torch device types, e.g. {"cpu", "cuda"}.
        dtypes: torch dtype names, e.g. {"float32"}.
        head_sizes: supported ones.
        block_multiple: KV block sizes must be multiples of it.
        graphs: which batches may be captured in a CUDA graph.
        features: what it supports in addition to plain causal attention: `AttentionFeature`s, and `"package.feature"`
            of plugins.
        decode_queries: the most tokens that a decode row may have: one and its drafts. Rows of more are prefill rows to
            the backend.
        kv_dtypes: how it can store K and V other than in the layers' dtype: `KVSpec.kv_dtype`.
    """

    devices: frozenset[str]
    dtypes: frozenset[str] | None = None
    head_sizes: frozenset[int] | None = None
    block_multiple: int = 1
    graphs: GraphSupport = GraphSupport.NEVER
    features: frozenset[str] = frozenset()
    decode_queries: int = 1
    kv_dtypes: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionNeed:
    """What the engine needs from a backend. `block_size` is None if the engine may choose it.

    `kv_dtype`: as in `KVSpec`. `wanted_by`: the names of the layers that need each of the `features`, for messages.
    """

    device: str
    dtype: str
    head_sizes: frozenset[int]
    block_size: int | None = None
    features: frozenset[str] = frozenset()
    wanted_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kv_dtype: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Upper bounds of every step, for buffers that are made once."""

    max_rows: int
    max_tokens: int
    max_model_len: int
    block_size: int

    @property
    def max_blocks(self) -> int:
        """Number of columns of a block table."""
        return -(-self.max_model_len // self.block_size)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One KV group's view of a step, on the device: views of static buffers, valid until the next step.

    B rows (decode rows first), T tokens.

    Attributes:
        block_tables: int32 [B, max_blocks]; entries after a row's last block are 0.
        seq_lens: int32 [B]; tokens in each row's context, including those of this step.
        query_start_loc: int32 [B + 1] (cu_seqlens of the queries).
        slot_mapping: int64 [T]; block * block_size + offset where each token's K and V go.
        positions: int64 [T].
        num_decode_rows: the first so many rows have at most `decode_query_len` tokens each, and one at least; in a CUDA
            graph padding has none. It is 1 unless the backend's `decode_queries` are more.
        query_lens_host: query lengths, B ints.
        seq_lens_host: upper bounds of `seq_lens`, B ints: the host does not wait for the exact ones.
    """

    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    slot_mapping: Tensor
    positions: Tensor
    num_decode_rows: int
    query_lens_host: tuple[int, ...]
    seq_lens_host: tuple[int, ...]
    decode_query_len: int = 1


@dataclass(frozen=True, slots=True)
class KVCacheView:
    """Where K and V of this step's tokens are stored for one layer.

    Attributes:
        k, v: [blocks, block_size, num_kv_heads, head_size]; any strides, but the last dimension is contiguous.
        slot_mapping: int64 [T], as in `StepInputs`.
    """

    k: Tensor
    v: Tensor
    slot_mapping: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Rotary position embedding of q and k: pair i of a head is rotated by position * inv_freq[i] radians.

    Attributes:
        inv_freq: float32 [rotary_dim / 2]. If rotary_dim is less than the head size, the other elements are not
            rotated.
        interleaved: a pair is elements 2i and 2i + 1; otherwise elements i and i + rotary_dim / 2.
        magnitude: factor of the rotated elements (YaRN's attention factor).
    """

    inv_freq: Tensor
    interleaved: bool = False
    magnitude: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorms:
    """RMS norms of each head of q and k, before the rotation.

    Attributes:
        q, k: weights, [head_size]. eps: of both norms.
    """

    q: Tensor
    k: Tensor
    eps: float


class AttentionBackend(ABC):
    """Base class of attention backends. There is one instance per KV group.

    It owns the KV layout, its metadata and the kernels; the core owns the number of blocks. `fill` runs once per step
    and does not wait for the device. It runs outside CUDA graphs, except with `GraphSupport.ALWAYS`. `forward` runs
    once per layer. One step may have decode and prefill rows.
    """

    capabilities: ClassVar[AttentionCapabilities]

    @classmethod
    def unsupported(cls, need: AttentionNeed) -> list[str]:
        """Reasons why the backend does not support `need`; empty if it does. The default compares `capabilities`."""
        return default_reasons(cls.capabilities, need)

    @classmethod
    @abstractmethod
    def kv_block_bytes(cls, spec: KVSpec, block_size: int) -> int:
        """Bytes of one KV block of one layer, K and V together."""

    @abstractmethod
    def __init__(self, spec: KVSpec, limits: BatchLimits, device: torch.device) -> None:
        """Make the metadata buffers once, at full size."""

    @abstractmethod
    def allocate(self, num_layers: int, num_blocks: int) -> None:
        """Allocate the zeroed KV cache of the group. Block 0 is the dummy block: padding writes there."""

    @abstractmethod
    def fill(self, inputs: StepInputs) -> None:
        """Copy the step's metadata into static buffers."""

    @abstractmethod
    def forward(self, layer: int, spec: AttentionLayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store K and V of *all* rows, then compute the attention of every row.

        Blocks are not cleared before another request uses them. After a row's end, and in the dummy block, there are
        values of other requests, which may be NaN or infinite. They must not affect the result: a weight of 0 or an
        added mask is not enough, because 0 * NaN is NaN.

        Args:
            layer: index in the group.
            q: [T, num_heads, head_size]; k, v: [T, num_kv_heads, head_size].

        Returns:
            [T, num_heads, head_size], of q's dtype.
        """

    def kv_cache(self, layer: int) -> KVCacheView | None:
        """Where kernels may store K and V themselves; `attend` is called after that. None: only `forward` stores."""
        return None

    def attend(self, layer: int, spec: AttentionLayerSpec, q: Tensor) -> Tensor:
        """Like `forward`, without storing K and V: the layer at `layer` has stored those of this step.

        Called only if `kv_cache` returns a view, or `AttentionFeature.SHARED_KV` is declared; then also for layers that
        share the K and V of `layer`, with their own `spec`.
        """
        raise NotImplementedError(f"{type(self).__name__} has kv_cache() or declares SHARED_KV, but has no attend()")

    def attend_qkv(
        self, layer: int, spec: AttentionLayerSpec, qkv: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor | None:
        """The whole of a step's attention, from the output of the qkv projection: normalise each head of q and k (if
        `norms`), rotate both, store K and V of *all* rows, and compute the attention of every row.

        Optional; it is called first, in every step. None: it does not do this step, this rotation or these norms, and
        has stored nothing. Then `kv_cache` and `attend`, or `forward`, are called instead. Norms and rotation are
        computed in float32, and the result of each is rounded to qkv's dtype.

        Args:
            qkv: [T, (num_heads + 2 num_kv_heads) * head_size]: all q heads, all k heads, all v heads.

        Returns:
            [T, num_heads, head_size], of qkv's dtype, or None.
        """
        return None

    def release(self) -> None:
        """Free the KV cache. The default does nothing: dropping the instance is enough."""
        return None


def default_reasons(cap: AttentionCapabilities, need: AttentionNeed) -> list[str]:
    """The reasons, as texts, why `cap` does not cover `need`; empty if it does."""
    reasons = []
    if need.device not in cap.devices:
        reasons.append(f"runs on {', '.join(sorted(cap.devices))}, not on {need.device}")
    if cap.dtypes is not None and need.dtype not in cap.dtypes:
        reasons.append(f"supports {', '.join(sorted(cap.dtypes))}, not {need.dtype}")
    if cap.head_sizes is not None and not need.head_sizes <= cap.head_sizes:
        odd = sorted(need.head_sizes - cap.head_sizes)
        reasons.append(f"head sizes {odd} are not among {sorted(cap.head_sizes)}")
    if need.block_size is not None and need.block_size % cap.block_multiple:
        reasons.append(f"block_size {need.block_size} is not a multiple of {cap.block_multiple}")
    if need.kv_dtype != "auto" and need.kv_dtype not in cap.kv_dtypes:
        stored = f", or as {' or '.join(sorted(cap.kv_dtypes))}" if cap.kv_dtypes else ""
        reasons.append(f"stores K and V in the model's dtype{stored}, not as {need.kv_dtype}")
    reasons += [f"does not support {_wanted(feature, need)}" for feature in sorted(need.features - cap.features)]
    return reasons


def _wanted(feature: str, need: AttentionNeed) -> str:
    """The feature, and the layers that need it: "attention sinks (for layers.0.attn and 23 more)"."""
    first, *more = need.wanted_by.get(feature, ("",))
    layers = f"{first} and {len(more)} more" if more else first
    return f"{feature} (for {layers})" if layers else str(feature)


def wrong_feature(name: object, *, built_in: bool = True) -> str:
    """What is wrong with the name of an attention feature; "" if nothing is. `built_in`: nanoengine's own may be named.

    Those of plugins are `"package.feature"`, so that two plugins never mean different things by one name.
    """
    known = [str(each) for each in AttentionFeature]
    if isinstance(name, str) and (all(part.strip() for part in name.split(".")) and "." in name):
        return ""
    if isinstance(name, str) and name in known:
        return "" if built_in else f"{name!r} is asked for by a field of AttentionLayerSpec, not by extras"
    hint = f"{nearest(name, known)}; " if isinstance(name, str) and built_in else ""
    return f"{shown(name)} is no attention feature: {hint}one of a plugin is named 'package.feature'"
