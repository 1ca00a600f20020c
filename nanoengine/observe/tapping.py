"""One prompt through an engine that is otherwise idle, with an ear at some of the model's modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanoengine.api.errors import ParamsError
from nanoengine.params.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanoengine.core.execution.executor import Executor
    from nanoengine.core.request import RequestOutput
    from nanoengine.llm import LLM
    from nanoengine.observe.taps import Tap


def tap_prompt(llm: LLM, executor: Executor, prompt: Any, modules: Sequence[str]) -> dict[str, Tap]:
    """See `LLM.tap`. A salt of its own keeps the request from reading cached blocks, whose tokens would not run."""
    if isinstance(modules, str):
        raise ParamsError(f"modules must be a list of names, not {modules!r}")
    with llm.engine.alone():  # the tokens of others would be heard too
        output, heard = _heard(llm, executor, prompt, modules)
    if output.error is not None:
        raise output.error
    count = len(output.prompt_token_ids)
    for name in modules:
        _check_whole(name, heard.get(name), count)
    return heard


def _heard(llm: LLM, executor: Executor, prompt: Any, modules: Sequence[str]) -> tuple[RequestOutput, dict[str, Tap]]:
    params = SamplingParams(max_tokens=1, temperature=0, cache_salt=f"tap-{llm._next_id()}")
    unknown = executor.call("listen", modules)[0]  # after the steps in flight
    if unknown:
        raise ParamsError(unknown)
    try:
        [output] = llm.generate([prompt], params, use_tqdm=False)
    finally:
        heard: dict[str, Tap] = executor.call("heard")[0]
    return output, heard


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
