"""Checks that run before any rank is started."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nanoengine.api.errors import ConfigError, PluginError
from nanoengine.params.engine_plan import EnginePlan


def check_devices(device: str, size: int) -> None:
    """Raises `ConfigError` if there are not enough devices for `size` ranks. Creates no CUDA context."""
    if size == 1 or device == "cpu":
        return
    if device != "cuda":
        raise ConfigError(
            f"engine.device is {device} with tensor_parallel_size={size}, but rank r runs on cuda:r; use device=cuda, "
            "and choose the GPUs with CUDA_VISIBLE_DEVICES"
        )
    count = torch.cuda.device_count()
    if count < size:
        raise ConfigError(
            f"engine.tensor_parallel_size is {size}, one GPU per rank, but this process sees {count}; lower it, or use "
            "device=cpu"
        )


def check_importable(plan: EnginePlan, local: Mapping[str, type[Any]]) -> None:
    """Raises `PluginError` for a part whose class exists only in this process, so that no rank can import it."""
    size = plan.options.tensor_parallel_size
    if size == 1:
        return
    for what, target in _parts(plan):
        module = target.partition(":")[0]
        if target in local or _only_here(module, plan):
            raise PluginError(
                f"{what} {target} is defined in {_place(module)}, which the {size} worker processes of "
                f"tensor_parallel_size={size} cannot import; move it to a module that can be imported, or to a file "
                "given as a plugin (plugins=['file.py'], --plugin file.py)"
            )


def _parts(plan: EnginePlan) -> Iterator[tuple[str, str]]:
    yield "model", plan.model
    yield "attention backend", plan.attention
    for processor in plan.processors:
        yield f"logits processor {processor.name!r}", processor.target
    if plan.speculation is not None and plan.speculation.device:  # a host drafter is made in this process alone
        yield f"drafter {plan.speculation.method!r}", plan.speculation.target
        yield f"parameters of drafter {plan.speculation.method!r}", plan.speculation.params_target


def _only_here(module: str, plan: EnginePlan) -> bool:
    if module == "__main__":
        return True
    if any(file.module == module for file in plan.plugin_files):
        return False
    return module in sys.modules and getattr(sys.modules[module], "__spec__", None) is None


def _place(module: str) -> str:
    return "the program's main script or a notebook" if module == "__main__" else f"{module!r}, only in this process"
