"""Captures the inputs and outputs of a model's modules, token by token: hidden states, queries, keys."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from nanoengine.core.execution.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class Tap:
    """One module over one prompt of T tokens, on the CPU.

    inputs, outputs: of its positional arguments and of what it returned, the tensors, in order; each [T, ...].
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def start_capture(runner: ModelRunner, modules: Sequence[str]) -> str:
    """From here on, copy what passes through these modules. Returns an error text; "" if the model has all of them."""
    unknown = unknown_module(runner.model, modules)
    if not unknown:
        runner.capture, runner.eager = Capture(runner.model, modules), True
    return unknown


def stop_capture(runner: ModelRunner) -> dict[str, Tap]:
    """What was copied since `start_capture`."""
    capture, runner.capture, runner.eager = runner.capture, None, False
    return {} if capture is None else capture.end()


class Capture:
    """Copies what passes through some modules, from when it is made until `end`. Steps must run without graphs."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """`names`: dotted paths in the model, as in `named_modules`; "" is the model itself. Each must be there."""
        self._captured: dict[str, list[Tap]] = defaultdict(list)
        self._handles = [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in names]

    def _hook(self, name: str) -> Any:
        def capture(module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
            self._captured[name].append(Tap(_copies(given), _copies(returned)))

        return capture

    def end(self) -> dict[str, Tap]:
        """Remove the hooks. Returns each module's tensors of all steps, joined, without modules that did not run."""
        for handle in self._handles:
            handle.remove()
        return {name: _joined(steps) for name, steps in self._captured.items()}


def unknown_module(model: nn.Module, names: Sequence[str]) -> str:
    """An error text that names the first one that is missing; "" if the model has all of them."""
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            return f"the model has no module {name!r}; {hint}llm.model.named_modules() lists all {len(known)}"
    return ""


def _copies(values: Any) -> tuple[Tensor, ...]:
    """Copies: the next layer, or the next step, may write over the originals."""
    parts = values if isinstance(values, tuple | list) else (values,)
    return tuple(part.detach().to("cpu", copy=True) for part in parts if isinstance(part, Tensor) and part.dim())


def _joined(steps: Sequence[Tap]) -> Tap:
    inputs, outputs = (zip(*each, strict=True) for each in ([s.inputs for s in steps], [s.outputs for s in steps]))
    return Tap(tuple(map(torch.cat, inputs)), tuple(map(torch.cat, outputs)))
