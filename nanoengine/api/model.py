"""The interface of models: what a model receives (`BuildContext`) and what it must provide (`Model`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from nanoengine.api.attention import (
    AttentionBackend,
    AttentionLayerSpec,
    HeadNorms,
    KVCacheView,
    KVSpec,
    Rotation,
)
from nanoengine.api.errors import ModelError, PluginError
from nanoengine.api.experts import Experts, ExpertsInfo, RunningStep
from nanoengine.api.layers import Layer, Linear
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.api.plugin_calls import name_of, place_and_fix
from nanoengine.api.weights import WeightMap
from nanoengine.kernels.ops import KernelChoice, Ops


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the core must know about any model. A model's own config is a subclass.

    Attributes:
        vocab_size: ids 0 .. vocab_size - 1. hidden_size: width of what `forward` returns.
        max_model_len: number of positions that the model supports.
        default_max_model_len: what an engine without `max_model_len` takes; None: all of them.
    """

    vocab_size: int
    hidden_size: int
    max_model_len: int
    default_max_model_len: int | None = None


class _Place:
    """Where the K and V of a layer are: its group's backend, and its index in the group. Layers that share K and V have
    one place.
    """

    def __init__(self) -> None:
        self.backend: AttentionBackend | None = None
        self.layer = -1


class Attention(nn.Module):
    """One attention layer of a model. The core binds it to its group's backend before the first step.

    `stored`: the layer whose K and V it reads, if `spec.shares` names one. `kv_dtype`, `kernels`: as in
    `KVSpec`.
    """

    def __init__(
        self,
        spec: AttentionLayerSpec,
        dtype: torch.dtype,
        name: str = "",
        stored: Attention | None = None,
        kv_dtype: str = "auto",
        kernels: KernelChoice | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.name = spec, name
        self.value_size = spec.value_size or spec.head_size
        self._uneven = self.value_size != spec.head_size
        self._padded = replace(spec, head_size=max(spec.head_size, self.value_size), value_size=None)
        self.kv_spec = KVSpec(
            num_kv_heads=spec.num_kv_heads,
            head_size=self._padded.head_size,
            dtype=str(dtype).removeprefix("torch."),
            window=spec.window,
            causal=spec.causal,
            kv_dtype=kv_dtype,
            kernels=kernels,
        )
        self._place: _Place = _Place() if stored is None else stored._place

    def bind(self, backend: AttentionBackend, layer: int) -> None:
        """Set the backend of the layer's KV group, and the layer's index in the group."""
        self._place.backend, self._place.layer = backend, layer

    def unbind(self) -> None:
        """Drop the backend and its memory on the device."""
        self._place.backend = None

    def attend_qkv(self, qkv: Tensor, rotation: Rotation, norms: HeadNorms | None = None) -> Tensor | None:
        """Norms, rotation, store and attention in one call: [T, (H + 2 Hkv) * D] -> [T, H, D]. None: the backend does
        not do this step so, and nothing was stored."""
        place = self._place
        assert place.backend is not None, "attention layer used before it was bound"
        if self._uneven or self.spec.shares is not None:
            return None
        out = place.backend.attend_qkv(place.layer, self.spec, qkv, rotation, norms)
        if out is None:
            return None
        heads = qkv.view(len(qkv), -1, self.spec.head_size)[:, : self.spec.num_heads]
        return self._checked("attend_qkv", heads, out)

    def kv_cache(self) -> KVCacheView | None:
        """Where a kernel may store this step's K and V itself, before `attend`. None: use `forward`.

        Always None where the layer stores no K and V, or where their widths differ.
        """
        place = self._place
        assert place.backend is not None, "attention layer used before it was bound"
        return place.backend.kv_cache(place.layer) if self.spec.shares is None and not self._uneven else None

    def attend(self, q: Tensor) -> Tensor:
        """Attention over K and V that are already stored: [T, H, D] -> [T, H, value_size]."""
        place = self._place
        assert place.backend is not None, "attention layer used before it was bound"
        if self._uneven:
            q = self._widened(q)
        out = self._checked("attend", q, place.backend.attend(place.layer, self._padded, q))
        return out[..., : self.value_size] if self._uneven else out

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store K and V, and compute the attention: q [T, H, D], k [T, Hkv, D], v [T, Hkv, value_size] ->
        [T, H, value_size].

        Raises `ModelError` if the layer shares the K and V of another.
        """
        place = self._place
        assert place.backend is not None, "attention layer used before it was bound"
        if self.spec.shares is not None:
            raise ModelError(f"{self.name} reads the K and V of {self.spec.shares} and stores none: call attend(q)")
        if self._uneven:
            q, k, v = self._widened(q), self._widened(k), self._widened(v)
        out = self._checked("forward", q, place.backend.forward(place.layer, self._padded, q, k, v))
        return out[..., : self.value_size] if self._uneven else out

    def _widened(self, x: Tensor) -> Tensor:
        """x with zeros behind each head, as wide as the cache."""
        return torch.nn.functional.pad(x, (0, self.kv_spec.head_size - x.shape[-1]))

    def _checked(self, method: str, q: Tensor, out: object) -> Tensor:
        """Returns `out`, which the backend returned, if it has q's shape, dtype and device. Raises `PluginError`."""
        if isinstance(out, Tensor) and (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device):
            return out
        got = f"a {type(out).__name__}"
        if isinstance(out, Tensor):
            got = f"{out.dtype} {tuple(out.shape)} on {out.device}"
        cls, wanted = type(self._place.backend), f"{q.dtype} {tuple(q.shape)} on {q.device} like the queries"
        raise PluginError(
            f"{name_of(cls)}.{method} returned {got}, not {wanted}{place_and_fix(None, getattr(cls, method))}"
        )


Parallel = Literal["column", "row", "replicated"]


class BuildContext(Protocol):
    """Makes the layers of a model. The name of a layer is its dotted path in the model: the loader, taps, messages and
    what chooses a layer's method go by it.

    Attributes:
        tp: the tensor-parallel group. dtype, device: of the parameters.
        ops: the operations that layers call: plain torch, or fused kernels.
        max_model_len: the most tokens that a request of this engine may have; at most the config's.
        step: the step that runs, for layers that must not see its padding.
    """

    tp: TensorParallelGroup
    dtype: torch.dtype
    device: torch.device
    ops: Ops
    max_model_len: int
    step: RunningStep

    def linear(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        parallel: Parallel = "replicated",
        parts: Sequence[tuple[str, int]] | None = None,
        head_size: int | None = None,
        reduce: bool = True,
    ) -> Linear:
        """A linear layer, [T, in/tp?] -> [T, out/tp?].

        Args:
            name: dotted path of the layer in the model. No other layer may have it.
            parallel: "column" splits the outputs over ranks, "row" the inputs (and sums), "replicated" neither.
            parts: fused outputs with their global sizes, e.g. [("q", 576), ("k", 192), ("v", 192)]. "column" splits
                each of them separately.
            head_size: what is split, outputs or inputs, is split into whole heads of this size. Parts of a column layer
                with fewer heads than ranks are replicated.
            reduce: False: a row layer does not sum, each rank returns its own part of the sum.
        """
        ...

    def embedding(self, name: str, num_embeddings: int, dim: int) -> Layer:
        """A vocabulary-parallel embedding, int [T] -> [T, dim]."""
        ...

    def lm_head(
        self, name: str, dim: int, vocab_size: int, *, bias: bool = False, tied: nn.Module | None = None
    ) -> Layer:
        """Vocabulary-parallel output layer, [R, dim] -> [R, V/tp], padding columns -inf.

        `tied`: the embedding whose weight it shares.
        """
        ...

    def experts(self, name: str, info: ExpertsInfo) -> Experts:
        """The experts of a layer. Its stacked weights are `{name}.gate_up_proj` and `{name}.down_proj`.

        Ranks have a part of the width of each expert, or whole experts (`enable_expert_parallel`).
        """
        ...

    def attention(self, name: str, spec: AttentionLayerSpec) -> Attention:
        """An attention layer. The heads in `spec` are those of this rank.

        Raises `ModelError` for a spec that cannot be, or that `shares` no earlier layer's K and V of the same kind.
        """
        ...


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """What a model may know about the batch, in addition to ids and positions.

    Attributes:
        num_tokens: T, the tokens of this step.
        wanted: int [L], ascending; the tokens whose hidden states are read. `Model.forward` may return those alone.
            None: all are.
    """

    num_tokens: int
    wanted: Tensor | None = None


class Model(nn.Module, ABC):
    """Base class of models. Class attribute `weights`: how checkpoint names map to parameters."""

    weights: ClassVar[WeightMap] = WeightMap()

    @classmethod
    @abstractmethod
    def read_config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """config.json -> the model's own frozen config. Hugging Face field names are used only here.

        Raises `ModelError` for a field that is missing, or that has an unknown or unsupported value.
        """

    @abstractmethod
    def __init__(self, config: Any, ctx: BuildContext) -> None:
        super().__init__()

    @classmethod
    def weight_map(cls, config: Any) -> WeightMap:
        """The map of names. Default: `weights`. Override it if it depends on the config (tied embeddings)."""
        return cls.weights

    @abstractmethod
    def forward(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        """input_ids int [T], positions int64 [T] -> hidden states [T, hidden_size]."""

    @abstractmethod
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden_size] of the rows that need logits -> logits [R, V/tp]; padding columns -inf."""
