"""Logits processors as the core calls them: what `apply` returns is checked, and errors name the plugin."""

from __future__ import annotations

from torch import Tensor

from nanoengine.api.errors import PluginError, shown
from nanoengine.api.plugin_calls import place_and_fix, plugin_step
from nanoengine.api.processors import LogitsProcessor, ProcessorRows


def checked_logits(processor: LogitsProcessor, where: str, logits: Tensor, rows: ProcessorRows) -> Tensor:
    """`processor.apply`, of which the logits' shape, dtype and device stay. `where`: its name and origin, for messages.

    Raises `PluginError` for anything else.
    """
    shape, dtype, device = logits.shape, logits.dtype, logits.device  # the processor may change the tensor itself
    with plugin_step(where, type(processor)):
        out: object = processor.apply(logits, rows)
    if not isinstance(out, Tensor):
        text = f"{shown(out):.80} of type {type(out).__name__}, not the logits, a Tensor"
    elif (out.shape, out.dtype, out.device) == (shape, dtype, device):
        return out
    else:
        got = f"{out.dtype} {tuple(out.shape)}" + (f" on {out.device}" if out.device != device else "")
        text = f"{got} instead of the {dtype} {tuple(shape)} it was given"
    error = PluginError(f"{where} returned {text}")
    error.add_note(place_and_fix(None, type(processor).apply, where).removeprefix(", "))
    raise error
