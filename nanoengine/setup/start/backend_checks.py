"""Checks of an attention backend at the start: the sizes that it returns, and a dry run of one token."""

from __future__ import annotations

from collections.abc import Callable

from nanoengine.api.attention import AttentionBackend, KVSpec
from nanoengine.api.errors import (
    ModelError,
    NanoEngineError,
    PluginError,
    described,
    forget_locals,
    is_failure,
    is_out_of_memory,
    shown,
)
from nanoengine.api.plugin_calls import name_of, place_and_fix, plugin_call
from nanoengine.core.execution.results import StepHandle
from nanoengine.core.execution.slots import SlotTables
from nanoengine.core.step import StepPlan
from nanoengine.setup.start.largest_steps import one_token


def kv_block_bytes(backend: type[AttentionBackend], spec: KVSpec, block_size: int) -> int:
    """What `backend.kv_block_bytes` returns, if it is a number of bytes. Raises `PluginError`."""
    with plugin_call(f"{name_of(backend)}.kv_block_bytes failed", backend):
        found: object = backend.kv_block_bytes(spec, block_size)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        text = (
            f"{name_of(backend)}.kv_block_bytes returned {shown(found)} for {spec}, not a number of bytes of at least 1"
        )
        raise PluginError(text + place_and_fix(None, backend))
    return found


def dry_run(launch: Callable[[StepPlan], StepHandle], tables: SlotTables) -> None:
    """Runs one token in the dummy block, so that a model or backend that cannot work fails before the first request.

    Raises `ModelError` or `PluginError`.
    """
    try:
        one_token(launch, tables)
    except BaseException as error:
        if isinstance(error, NanoEngineError) or not is_failure(error):
            raise
        if is_out_of_memory(error):  # not the plugin's fault; steps report it and try smaller steps
            forget_locals(error)
            return
        raise ModelError(f"a dry run of one token failed: {described(error)}") from error
