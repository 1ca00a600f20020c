"""A model on a device without values: what would wait for a GPU fails, and so does a tensor on another device.

Operations of `ctx.ops`, attention and collectives are the engine's, and do what they do on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from nanoengine.api import AttentionLayerSpec, BatchLimits, ForwardBatch, Model
from nanoengine.api.errors import described, is_failure
from nanoengine.api.parallel import ShapesOnly
from nanoengine.api.plugin_calls import place_and_fix
from nanoengine.kernels.ops import Ops
from nanoengine.plugins.attention_backends.torch_paged import TorchPaged
from nanoengine.setup.start.build_model import build_model, kv_groups
from nanoengine.testing.conformance.failure import ConformanceError, during

_META = torch.device("meta")
_TOKENS = (1, 3, 128)  # of a step
_WAITS = (
    "waits for the device, because it reads values on the host (.item(), .tolist(), .cpu(), int(tensor), `if tensor:`, "
    "boolean indexing, nonzero, unique ...): a GPU is idle meanwhile, and no step can be captured. Use torch.where, "
    "masked_fill or index_select on whole tensors"
)
_COPIES = (
    "copies from the host to the device in a step: make the tensor once in __init__, on ctx.device, or with the "
    "device= of another tensor and a function that fills it there (torch.full, torch.arange)"
)
_MIXES = "mixes devices: make tensors with the device= of another tensor, and buffers in __init__ on ctx.device"
_OTHER_DEVICE = ("is not on the expected device", "to be on the same device")


class _Copies(Exception):
    """The model copies to the device. Its message says by what."""


class _Attends(TorchPaged):
    """Attention's shapes."""

    def forward(self, layer: int, spec: AttentionLayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q)

    def attend(self, layer: int, spec: AttentionLayerSpec, q: Tensor) -> Tensor:
        return torch.empty_like(q)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what the meta device allows although it waits for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("index_put", "index_put_"):
            masked = any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
            if masked and args[2].numel() > 1:  # one number is filled in on the device
                raise RuntimeError("boolean indexing: tensor[mask] = values")
        out = func(*args, **(kwargs or {}))
        copies = name in ("to", "_to_copy", "copy_") and isinstance(out, Tensor) and out.device == _META
        if copies and args[name == "copy_"].device.type == "cpu":
            raise _Copies("from a tensor on the CPU")
        return out


class _Makes(torch.overrides.TorchFunctionMode):
    """Refuses tensors that are made on the device of Python's numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], Tensor)
        if made and out.device == _META:
            raise _Copies(f"torch.{func.__name__}(..., device=)")
        return out


class _OnCpu(Ops):
    """The operations, on zeros of a CPU where tensors are on the meta device."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return found if name.startswith("_") or not callable(found) else _without_values(found)


def _without_values(do: Any) -> Any:
    @wraps(do)
    def call(*args: Any, **kwargs: Any) -> Any:
        devices = {x.device for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.dim()}
        if _META not in devices:
            return do(*args, **kwargs)
        if len(devices) > 1:
            raise RuntimeError(f"tensors of {do.__name__}() to be on the same device are on {devices}")
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            args, kwargs = tree_map(_zeros, (args, kwargs))
            return tree_map(_shape, do(*args, **kwargs))

    return call


def _zeros(x: Any) -> Any:
    return torch.zeros_like(x, device="cpu") if isinstance(x, Tensor) else x


def _shape(x: Any) -> Any:
    return torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x


def check_no_waiting(model: type[Model], hf: Mapping[str, Any], ranks: int) -> None:
    """Checks that `forward` and `compute_logits` of rank 0 do not wait for a device, in steps of several sizes."""
    with during(f"{model.__name__} on {ranks} rank{'s' * (ranks > 1)}: building"):
        built = build_model(model, hf, tp=ShapesOnly(ranks), dtype=torch.float32, device="meta", ops=_OnCpu())
    longest = built.config.max_model_len
    limits = BatchLimits(max_rows=8, max_tokens=max(_TOKENS), max_model_len=min(longest, 64), block_size=4)
    for spec, layers in kv_groups(built.attention_layers):
        backend = _Attends(spec, limits, torch.device("cpu"))
        for index, layer in enumerate(layers):
            layer.bind(backend, index)
    for tokens in _TOKENS:
        ids = torch.empty(tokens, dtype=torch.long, device="meta")
        with torch.inference_mode():
            hidden = _watched(model, "forward", built.model, ids, ids.clone(), ForwardBatch(num_tokens=tokens))
            if isinstance(hidden, Tensor):  # what else it may be is checked where values are
                _watched(model, "compute_logits", built.model.compute_logits, hidden)


def _watched(model: type[Model], name: str, do: Any, *args: Any) -> Any:
    try:
        with _Watch(), _Makes():  # type: ignore[no-untyped-call]
            return do(*args)
    except BaseException as error:
        if not is_failure(error):
            raise
        cause = described(error).split("\n")[0]
        what = _MIXES if any(words in cause for words in _OTHER_DEVICE) else _WAITS
        what = _COPIES if isinstance(error, _Copies) else what
        place = place_and_fix(error, model).partition(";")[0]
        raise ConformanceError(f"{model.__name__}.{name}() {what} ({cause}{place})") from error
