"""Builds a model: the `BuildContext` it asks for layers, and what comes out of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from nanoengine.api.attention import AttentionLayerSpec, KVSpec
from nanoengine.api.checks import check_attention, check_config, check_weight_map
from nanoengine.api.errors import ModelError, nearest, shown
from nanoengine.api.experts import Experts, ExpertsInfo, ExpertsMethod, RunningStep
from nanoengine.api.layers import ChooseMethod, Layer, LayerInfo, Linear, LinearMethod, WeightLayer
from nanoengine.api.model import Attention, Model, ModelConfig, Parallel
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.api.plugin_calls import is_ours, name_of, place_and_fix, plugin_call
from nanoengine.api.weights import WeightMap
from nanoengine.kernels.ops import Ops
from nanoengine.layers.embedding import ParallelLMHead, VocabParallelEmbedding, vocabulary_info
from nanoengine.layers.experts import ParallelExperts, experts_info
from nanoengine.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear, linear_info
from nanoengine.setup.start.clock import Quantised
from nanoengine.setup.start.quantization import packed_format
from nanoengine.setup.start.weight_rules import Rules

LayerType = TypeVar("LayerType", bound=nn.Module)
MethodType = TypeVar("MethodType", LinearMethod, ExpertsMethod)


class Builder:
    """The `BuildContext` of the engine. It records layers by name, in the order in which they are made.

    choose: returns the method of a linear layer, embedding, output layer or experts. None: no layer has its own.
    expert_parallel: ranks have whole experts. kv_dtype: how K and V are stored.
    """

    def __init__(
        self,
        tp: TensorParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops | None = None,
        *,
        max_model_len: int = 0,
        weights: WeightMap | None = None,
        choose: ChooseMethod | None = None,
        expert_parallel: bool = False,
        kv_dtype: str = "auto",
    ) -> None:
        self.tp = tp
        self.ops = ops or Ops()
        self.dtype = dtype
        self.device = device
        self.max_model_len = max_model_len
        self.step = RunningStep()
        self.layers: dict[str, nn.Module] = {}
        self._expert_parallel, self._kv_dtype = expert_parallel, kv_dtype
        self._rules, self._choose = Rules(weights or WeightMap()), choose
        self.foreign_methods: list[type] = []

    @property
    def attention_layers(self) -> list[Attention]:
        return [layer for layer in self.layers.values() if isinstance(layer, Attention)]

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
        known = {"column": ColumnParallelLinear, "row": RowParallelLinear, "replicated": ReplicatedLinear}
        if parallel not in known:
            raise ModelError(f"{name}: there is no parallel={shown(parallel)}; {nearest(str(parallel), known)}")
        if not reduce and parallel != "row":
            raise ModelError(f"{name}: reduce=False is for parallel='row', where ranks hold parts of a sum")
        sources = self._sources(name, [part for part, _ in parts or ()])
        options: dict[str, Any] = {"bias": bias, "parts": parts or (), "place": self, "sources": sources}
        options |= {} if parallel == "replicated" else {"head_size": head_size}
        options |= {"reduce": reduce} if parallel == "row" else {}
        try:
            info = linear_info(name, in_features, out_features, parts or (), parallel, sources)
            layer: Linear = known[parallel](
                name, in_features, out_features, method=self._method(info, LinearMethod), **options
            )
        except ModelError as error:
            if str(error).startswith(f"{name}: "):  # of a method, which has the layer
                raise
            raise ModelError(f"{name}: {error}") from error
        return self._named(name, layer)

    def embedding(self, name: str, num_embeddings: int, dim: int) -> Layer:
        sources = self._sources(name)
        method = self._method(vocabulary_info(name, "embedding", dim, num_embeddings, sources), LinearMethod)
        if method is not None and type(method).rows is LinearMethod.rows:
            raise ModelError(f"{name}: {name_of(type(method))} has no rows(), which an embedding needs")
        options: dict[str, Any] = {"method": method, "sources": sources}
        return self._named(name, VocabParallelEmbedding(num_embeddings, dim, place=self, name=name, **options))

    def lm_head(
        self, name: str, dim: int, vocab_size: int, *, bias: bool = False, tied: nn.Module | None = None
    ) -> Layer:
        if tied is not None and not isinstance(tied, WeightLayer):
            raise ModelError(f"{name}: can be tied to an embedding made by this context, not to {type(tied).__name__}")
        sources = self._sources(name)
        about = vocabulary_info(name, "head", dim, vocab_size, sources)
        method = None if tied is not None else self._method(about, LinearMethod)
        options: dict[str, Any] = {"bias": bias, "tied": tied, "method": method, "sources": sources}
        return self._named(name, ParallelLMHead(dim, vocab_size, place=self, name=name, **options))

    def experts(self, name: str, info: ExpertsInfo) -> Experts:
        sources = self._sources(f"{name}.gate_up_proj", ("gate", "up")) + self._sources(f"{name}.down_proj")
        about = experts_info(name, info, self.tp.size, whole=self._expert_parallel, sources=sources)
        method = self._method(about, ExpertsMethod)
        return self._named(name, ParallelExperts(about, info, place=self, method=method))

    def attention(self, name: str, spec: AttentionLayerSpec) -> Attention:
        check_attention(name, spec)
        stored = None if spec.shares is None else self._stored(name, spec.shares)
        made = Attention(spec, self.dtype, name, stored, self._kv_dtype, self.ops.kernels)
        if stored is not None and stored.kv_spec != made.kv_spec:
            raise ModelError(f"{name} cannot share the K and V of {spec.shares}: {made.kv_spec} and {stored.kv_spec}")
        return self._named(name, made)

    def _stored(self, name: str, shares: object) -> Attention:
        """The layer that stores the K and V that `name` reads. Raises `ModelError`."""
        storing = {each.name: each for each in self.attention_layers if each.spec.shares is None}
        if shares not in storing:
            known = nearest(str(shares), storing) if storing else "there is none before it"
            raise ModelError(
                f"{name}: shares={shown(shares)} is no earlier attention layer that stores K and V; {known}"
            )
        return storing[str(shares)]

    def _method(self, info: LayerInfo, kind: type[MethodType]) -> MethodType | None:
        """None: the plain one. Raises `ModelError` for a method of another kind of layer."""
        method = self._choose(info) if self._choose else None
        if method is None:
            return None
        if not isinstance(method, kind):
            raise ModelError(f"{info.name}: {name_of(type(method))} is not a nanoengine.api.{kind.__name__}")
        if not is_ours(type(method)):
            self.foreign_methods.append(type(method))
        return method

    def _named(self, name: str, layer: LayerType) -> LayerType:
        if self.layers.setdefault(name, layer) is not layer:
            raise ModelError(
                f"two layers have the name {name!r}: the context's methods take each layer's own path in the model, "
                "with its index where there are several"
            )
        return layer

    def _sources(self, name: str, parts: Sequence[str] = ()) -> tuple[str, ...]:
        """Modules of the checkpoint that fill a layer."""
        found = [self._rules.sources(f"{name}.weight", part)[0] for part in parts or ("",)]
        return tuple(each.removesuffix(".weight") for each in found)


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model without weights yet, its config, its attention layers in order, and the step that its layers see."""

    model: Model
    config: ModelConfig
    attention_layers: tuple[Attention, ...]
    step: RunningStep


def build_model(
    model_cls: type[Model],
    hf_config: Mapping[str, Any],
    *,
    tp: TensorParallelGroup,
    dtype: torch.dtype,
    device: torch.device | str,
    ops: Ops | None = None,
    max_model_len: int | None = None,
    choose: ChooseMethod | None = None,
    expert_parallel: bool = False,
    kv_dtype: str = "auto",
) -> BuiltModel:
    """Reads the config and makes the layers. `device="meta"` gives shapes and attention needs without memory.

    Args:
        max_model_len: that of the engine; None: that of the model.
        choose: returns the method of a linear layer, embedding, output layer or experts; None: all are plain.
        expert_parallel: ranks have whole experts, not a part of the width of each.
        kv_dtype: how K and V are stored, as in `KVSpec`.

    Raises `ModelError` for a config that is not supported, for heads that cannot be divided over the ranks, for layers
    whose names are not their paths in the model, and for any other error in the model's `read_config`, `weight_map` or
    `__init__`; the last names the class.
    """
    name = name_of(model_cls)
    if choose is None:
        packed_format(hf_config)
    with plugin_call(f"{name}.read_config failed", model_cls, ModelError):
        config = model_cls.read_config(hf_config)
        check_config(config, model_cls)
    with plugin_call(f"{name}.weight_map failed", model_cls, ModelError):
        weights = model_cls.weight_map(config)
        check_weight_map(weights, model_cls)
    longest = min(max_model_len or config.default_max_model_len or config.max_model_len, config.max_model_len)
    try:
        builder = Builder(
            tp, dtype, torch.device(device), ops,
            max_model_len=longest, weights=weights, choose=choose, expert_parallel=expert_parallel,
            kv_dtype=kv_dtype,
        )  # fmt: skip
        with (
            weights_freed_on_error(builder.layers.values()),
            plugin_call(f"{name}.__init__ failed", model_cls, ModelError, others=builder.foreign_methods),
        ):
            model = model_cls(config, builder).eval()
        name_layers(model, builder.layers)
    except ModelError as error:  # of a layer that cannot be made as the model requires
        if name in str(error):
            raise
        raise ModelError(f"{error} (in {name}{place_and_fix(error, model_cls)})") from error
    if not builder.attention_layers:
        raise ModelError(
            f"{name} made no attention layer; a model makes each by ctx.attention(name, spec), for the KV cache is "
            f"theirs{place_and_fix(None, model_cls.__init__)}"
        )
    return BuiltModel(model, config, tuple(builder.attention_layers), builder.step)


def name_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Checks that each of `layers`, by name, is in the model under its name, and names the layers that have none.

    What is wrapped is below its name. Raises `ModelError` naming the layer.
    """
    paths = defaultdict[int, list[str]](list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[id(module)].append(path)
        if isinstance(module, WeightLayer) and not module.name:
            module.name = path
    above = Counter(name.rsplit(".", count)[0] for name in layers for count in range(1, name.count(".") + 1))
    for name, layer in layers.items():
        found = paths[id(layer)]
        if not found:
            raise ModelError(
                f"the layer {name!r} is no module of the model, so it would stay without weights: make it an attribute "
                "of a module or an element of an nn.ModuleList, or do not make it"
            )
        if name not in found and (above[name] or not any(path.startswith(f"{name}.") for path in found)):
            raise ModelError(
                f"the layer {name!r} is {found[0]!r} in the model: give the context that name, by which it is loaded"
            )


@contextmanager
def weights_freed_on_error(modules: Iterable[nn.Module]) -> Iterator[None]:
    """If its body fails, it frees the memory of the parameters of `modules`.

    An error that is kept also keeps what the closures in its traceback refer to: a generator expression in a model's
    `__init__` refers to the model or to its context.
    """
    try:
        yield
    except BaseException:
        for parameter in (each for module in modules for each in module.parameters()):
            parameter.data = parameter.data.new_empty(0)
        raise


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def quantised_layers(model: nn.Module) -> tuple[Quantised, ...]:
    """What layers with weights of matrices store, by their methods' labels; (): all are plain."""
    found, seen = defaultdict[str, list[int]](list), set[int]()
    for layer in model.modules():
        method = getattr(layer, "method", None)
        held = [each for each in layer.parameters(recurse=False) if id(each) not in seen]
        seen |= set(map(id, held))  # those of an output layer may be an embedding's
        if isinstance(layer, WeightLayer) and isinstance(method, LinearMethod | ExpertsMethod) and held:
            found[method.label].append(sum(each.numel() * each.element_size() for each in held))
    made = [Quantised(label, len(each), sum(each)) for label, each in sorted(found.items())]
    return tuple(made) if any(each.label for each in made) else ()


def weight_bytes(model_cls: type[Model], hf_config: Mapping[str, Any], **options: Any) -> int:
    """What a rank's parameters take, found without taking it. options: those of `build_model`."""
    return parameter_bytes(build_model(model_cls, hf_config, **{**options, "device": "meta"}).model)


def kv_groups(attention_layers: Sequence[Attention]) -> tuple[tuple[KVSpec, tuple[Attention, ...]], ...]:
    """Layers with equal KV needs, together; groups and their layers in order of appearance.

    Layers that read the K and V of another one have no place of their own, and are in no group.
    """
    groups: dict[KVSpec, list[Attention]] = {}
    for layer in attention_layers:
        if layer.spec.shares is not None:
            continue
        groups.setdefault(layer.kv_spec, []).append(layer)
    return tuple((spec, tuple(layers)) for spec, layers in groups.items())
