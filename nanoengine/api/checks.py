"""Checks that what a model's methods return is what `nanoengine.api.Model` requires.

Checks of each step compare types, shapes and dtypes only; they do not wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanoengine.api.attention import AttentionBackend, AttentionLayerSpec, wrong_feature
from nanoengine.api.errors import ModelError, shown
from nanoengine.api.model import ForwardBatch, Model, ModelConfig
from nanoengine.api.parallel import TensorParallelGroup, padded_length
from nanoengine.api.plugin_calls import is_ours, name_of, place_and_fix, plugin_step
from nanoengine.api.weights import WeightMap, WeightRule

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_config(config: object, model: type[Any]) -> None:
    """Check what `read_config` returned. Raises `ModelError`."""
    if not isinstance(config, ModelConfig):
        text = f"{name_of(model)}.read_config returned {shown(config)}, not a nanoengine.api.ModelConfig"
        raise ModelError(text + place_and_fix(None, model.read_config))
    for name in ("vocab_size", "hidden_size", "max_model_len"):
        value = getattr(config, name)
        if not _is_count(value):
            text = (
                f"{name_of(model)}.read_config returned {name}={shown(value)}, which must be an integer of at least 1"
            )
            raise ModelError(text + place_and_fix(None, model.read_config))
    usual = config.default_max_model_len
    if usual is not None and not (_is_count(usual) and usual <= config.max_model_len):
        text = (
            f"{name_of(model)}.read_config returned default_max_model_len={shown(usual)}, which must be None or from 1"
        )
        raise ModelError(f"{text} to max_model_len, {config.max_model_len}{place_and_fix(None, model.read_config)}")


def check_weight_map(found: object, model: type[Any]) -> None:
    """Check what `weight_map` returned. Raises `ModelError`."""
    if not isinstance(found, WeightMap):
        text = f"{name_of(model)}.weight_map returned {shown(found)}, not a nanoengine.api.WeightMap"
        raise ModelError(text + place_and_fix(None, model.weight_map))
    kinds = {
        "fuse": Mapping,
        "rename": Mapping,
        "ties": Mapping,
        "rules": Mapping,
        "skip": tuple,
        "skip_prefixes": tuple,
    }
    for name, kind in kinds.items():
        value = getattr(found, name)
        if not isinstance(value, kind):
            text = f"{name_of(model)}: WeightMap.{name} must be a {kind.__name__.lower()}, not {shown(value)}"
            raise ModelError(text + place_and_fix(None, model.weight_map))
    for pattern, rule in found.rules.items():
        if not isinstance(pattern, str) or not isinstance(rule, WeightRule | str):
            text = (
                f"{name_of(model)}: WeightMap.rules: {shown(pattern)} must be a WeightRule or a name, not {shown(rule)}"
            )
            raise ModelError(text + place_and_fix(None, model.weight_map))


def check_attention(name: str, spec: object) -> None:
    """Check the spec with which a model makes the attention layer `name`. Raises `ModelError`."""
    if not isinstance(spec, AttentionLayerSpec):
        raise ModelError(f"{name}: {shown(spec)} is not a nanoengine.api.AttentionLayerSpec")
    for field in ("num_heads", "num_kv_heads", "head_size"):
        if not _is_count(getattr(spec, field)):
            raise ModelError(f"{name}: {field} must be an integer of at least 1, not {shown(getattr(spec, field))}")
    if spec.num_heads % spec.num_kv_heads:
        raise ModelError(f"{name}: {spec.num_heads} heads cannot be divided equally over {spec.num_kv_heads} KV heads")
    for field in ("window", "value_size"):
        value = getattr(spec, field)
        if value is not None and not _is_count(value):
            raise ModelError(f"{name}: {field} must be None or an integer of at least 1, not {shown(value)}")
    check_sinks(name, spec)
    if not isinstance(spec.causal, bool):
        raise ModelError(f"{name}: causal must be True or False, not {shown(spec.causal)}")
    if not isinstance(spec.extras, Mapping):
        raise ModelError(f"{name}: extras must be a mapping of features, not {shown(spec.extras)}")
    for feature in spec.extras:
        wrong = wrong_feature(feature, built_in=False)
        if wrong:
            raise ModelError(f"{name}: extras: {wrong}")
    if not _is_number(spec.scale) or (
        spec.soft_cap is not None and not (_is_number(spec.soft_cap) and spec.soft_cap > 0)
    ):
        raise ModelError(
            f"{name}: scale must be a finite number and soft_cap None or one above 0, not {shown(spec.scale)} and "
            f"{shown(spec.soft_cap)}"
        )


def check_sinks(name: str, spec: AttentionLayerSpec) -> None:
    """Check that the sinks are None or one floating-point number for each head. Raises `ModelError`."""
    sinks: object = spec.sinks
    if sinks is None:
        return
    if not isinstance(sinks, Tensor) or sinks.shape != (spec.num_heads,) or not sinks.is_floating_point():
        got = f"{sinks.dtype} {tuple(sinks.shape)}" if isinstance(sinks, Tensor) else shown(sinks)
        raise ModelError(f"{name}: sinks must be a float Tensor of [num_heads] = ({spec.num_heads},), not {got}")
    if not sinks.is_contiguous():
        raise ModelError(f"{name}: sinks must be contiguous")


def foreign_methods(model: nn.Module) -> tuple[type, ...]:
    """The classes of the methods of a model's layers that are of plugins: their code runs where the model's does."""
    methods = (type(each) for each in (getattr(layer, "method", None) for layer in model.modules()) if each is not None)
    return tuple(each for each in dict.fromkeys(methods) if not is_ours(each))


class CheckedModel:
    """A model as the runner calls it: results are checked, and errors of the model's code name the model."""

    def __init__(
        self, model: Model, config: ModelConfig, tp: TensorParallelGroup, backend: type[AttentionBackend]
    ) -> None:
        self._model, self._config, self._ranks = model, config, tp.size
        self._class, self._others = type(model), (backend, *foreign_methods(model))
        self._name = name_of(self._class)
        self._logits_width = padded_length(config.vocab_size, tp.size)

    def __call__(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        """int [T], int64 [T] -> hidden states [T, hidden size], or those of `batch.wanted`: [L, hidden size].

        Raises `ModelError` for a result that is not that.
        """
        with plugin_step(f"{self._name}.forward", self._class, *self._others):
            hidden: object = self._model(input_ids, positions, batch)
        shape, wanted = (batch.num_tokens, self._config.hidden_size), batch.wanted
        if isinstance(hidden, Tensor) and hidden.is_floating_point():
            if hidden.shape == shape:
                return hidden if wanted is None else hidden.index_select(0, wanted)
            if wanted is not None and hidden.shape == (len(wanted), shape[1]):
                return hidden
        raise self._wrong("forward", hidden, f"a float Tensor of [T, hidden size] = {shape}")

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden size] -> logits [R, V/tp], of one of `LOGITS_DTYPES`; one rank may have more columns.

        Raises `ModelError` for a result that is not that.
        """
        with plugin_step(f"{self._name}.compute_logits", self._class, *self._others):
            logits: object = self._model.compute_logits(hidden)
        rows, width = len(hidden), self._logits_width
        if isinstance(logits, Tensor) and logits.dtype in LOGITS_DTYPES and logits.dim() == 2:
            fits = logits.shape[1] == width if self._ranks > 1 else logits.shape[1] >= width
            if fits and len(logits) == rows:
                return logits
        dtypes = "float32, bfloat16 or float16"
        vocabulary = f"for a vocabulary of {self._config.vocab_size} on {self._ranks} rank(s)"
        raise self._wrong("compute_logits", logits, f"{(rows, width)}, {dtypes}, {vocabulary}")

    def _wrong(self, method: str, found: object, wanted: str) -> ModelError:
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        where = place_and_fix(None, getattr(self._class, method, self._class))
        return ModelError(f"{self._name}.{method} returned {got}, not {wanted}{where}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
