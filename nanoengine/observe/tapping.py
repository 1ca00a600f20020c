"""Runs a prompt through an engine that is otherwise idle, and records inputs and outputs of chosen modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nanoengine.api.errors import ParamsError
from nanoengine.api.outputs import RequestOutput
from nanoengine.core.engine import Engine
from nanoengine.core.execution.executor import Executor
from nanoengine.observe.taps import Tap
from nanoengine.params.sampling_params import SamplingParams

_CAPTURE = "nanoengine.observe.taps"


Taps = Mapping[str, Tap]
Generate = Callable[[SamplingParams], RequestOutput]


def tap_prompt(engine: Engine, executor: Executor, generate: Generate, modules: Sequence[str], salt: str) -> Taps:
    """What passed through `modules` while `generate` ran a prompt: `LLM.tap`, with its errors.

    `salt` must be new: the request then reads no cached blocks, whose tokens would not run.
    """
    if isinstance(modules, str):
        raise ParamsError(f"modules must be a list of names, not {modules!r}")
    with engine.exclusive():  # the tokens of other requests would be captured, too
        output, taps = _captured(executor, generate, modules, salt)
    if output.error is not None:
        raise output.error
    count = len(output.prompt_token_ids)
    for name in modules:
        _check_whole(name, taps.get(name), count)
    return taps


def _captured(executor: Executor, generate: Generate, modules: Sequence[str], salt: str) -> tuple[RequestOutput, Taps]:
    params = SamplingParams(max_tokens=1, temperature=0, cache_salt=salt)
    unknown = executor.call(f"{_CAPTURE}:start_capture", modules)[0]  # after the steps in flight
    if unknown:
        raise ParamsError(unknown)
    try:
        output = generate(params)
    finally:
        taps: Taps = executor.call(f"{_CAPTURE}:stop_capture")[0]
    return output, taps


def _check_whole(name: str, tap: Tap | None, count: int) -> None:
    if tap is None:
        raise ParamsError(
            f"module {name!r} does not run by itself: linear layers and norms are parts of fused operations, and on a "
            "GPU so is what feeds attention, unless the engine has fuse_kernels=False; tap the module around it"
        )
    lengths = {len(tensor) for tensor in (*tap.inputs, *tap.outputs)}
    if lengths != {count}:
        raise ParamsError(
            f"module {name!r} did not run once a token: the prompt has {count}, its tensors have {sorted(lengths)} rows"
        )
