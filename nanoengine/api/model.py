"""The interface of models: what a model receives (`BuildContext`) and what it must provide (`Model`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from nanoengine.api.errors import PluginError
from nanoengine.api.layers import Layer, Linear
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.api.plugin_calls import name_of, place_and_fix
from nanoengine.api.weights import WeightMap
from nanoengine.kernels.ops import Ops


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


class Attention(nn.Module):
    """One attention layer of a model. The core binds it to its group's backend before the first step."""

    def __init__(self, spec: AttentionLayerSpec, dtype: torch.dtype, name: str = "") -> None:
        super().__init__()
        self.spec, self.name = spec, name
        self.kv_spec = KVSpec(
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            dtype=str(dtype).removeprefix("torch."),
            window=spec.window,
        )
        self._backend: AttentionBackend | None = None
        self._layer = -1

    def bind(self, backend: AttentionBackend, layer: int) -> None:
        """Set the backend of the layer's KV group, and the layer's index in the group."""
        self._backend, self._layer = backend, layer

    def unbind(self) -> None:
        """Drop the backend and its memory on the device."""
        self._backend = None

    def attend_qkv(self, qkv: Tensor, rotation: Rotation, norms: HeadNorms | None = None) -> Tensor | None:
        """Norms, rotation, store and attention in one call: [T, (H + 2 Hkv) * D] -> [T, H, D]. None: the backend does
        not do this step so, and nothing was stored."""
        assert self._backend is not None, "attention layer used before it was bound"
        out = self._backend.attend_qkv(self._layer, self.spec, qkv, rotation, norms)
        if out is None:
            return None
        heads = qkv.view(len(qkv), -1, self.spec.head_size)[:, : self.spec.num_heads]
        return self._checked("attend_qkv", heads, out)

    def kv_cache(self) -> KVCacheView | None:
        """Where a kernel may store this step's K and V itself, before `attend`. None: use `forward`."""
        assert self._backend is not None, "attention layer used before it was bound"
        return self._backend.kv_cache(self._layer)

    def attend(self, q: Tensor) -> Tensor:
        """Attention over K and V that are already stored: [T, H, D] -> [T, H, D]."""
        assert self._backend is not None, "attention layer used before it was bound"
        return self._checked("attend", q, self._backend.attend(self._layer, self.spec, q))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store K and V, and compute the attention: q [T, H, D], k and v [T, Hkv, D] -> [T, H, D]."""
        assert self._backend is not None, "attention layer used before it was bound"
        return self._checked("forward", q, self._backend.forward(self._layer, self.spec, q, k, v))

    def _checked(self, method: str, q: Tensor, out: object) -> Tensor:
        """Returns `out`, which the backend returned, if it has q's shape, dtype and device. Raises `PluginError`."""
        if isinstance(out, Tensor) and (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device):
            return out
        got = f"a {type(out).__name__}"
        if isinstance(out, Tensor):
            got = f"{out.dtype} {tuple(out.shape)} on {out.device}"
        cls, wanted = type(self._backend), f"{q.dtype} {tuple(q.shape)} on {q.device} like the queries"
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
    """

    tp: TensorParallelGroup
    dtype: torch.dtype
    device: torch.device
    ops: Ops
    max_model_len: int

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

    def attention(self, name: str, spec: AttentionLayerSpec) -> Attention:
        """An attention layer. The heads in `spec` are those of this rank."""
        ...


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """What a model may know about the batch, in addition to ids and positions.

    Attributes:
        num_tokens: T, the tokens of this step.
    """

    num_tokens: int


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
