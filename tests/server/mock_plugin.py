"""A plugin file with the mock model, which only the engine imports, and one whose every step takes a while."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from nanoengine.api import AttentionSpec, ModelSpec, hookimpl

DIES, HANGS = 7, 8  # a prompt that begins with this token ends the process, or holds the step up
_MOCK = "nanoengine.testing.mock_model"


def __getattr__(name: str) -> Any:
    if name != "SlowMock":
        raise AttributeError(name)
    from nanoengine.testing.mock_model import MockModel

    class SlowMock(MockModel):
        """The mock model; a step takes longer by the seconds in the file SLOW_MOCK_SECONDS, and a prompt may begin with
        DIES or HANGS."""

        def forward(self, input_ids: Any, positions: Any, batch: Any) -> Any:
            time.sleep(float(Path(os.environ["SLOW_MOCK_SECONDS"]).read_text()))
            first = set(input_ids[positions == 0].tolist())
            if DIES in first:
                signal.raise_signal(signal.SIGSEGV)  # in this thread: no token is drawn before the end
            if HANGS in first:
                time.sleep(1000)
            return super().forward(input_ids, positions, batch)

    return SlowMock


@hookimpl
def register_models() -> list[ModelSpec]:
    return [
        ModelSpec(name="mock", architectures=("MockForCausalLM",), target=f"{_MOCK}:MockModel", api=1),
        ModelSpec(name="slow-mock", architectures=("SlowMockForCausalLM",), target=f"{__name__}:SlowMock", api=1),
    ]


@hookimpl
def register_attention_backends() -> list[AttentionSpec]:
    return [AttentionSpec(name="mock", target=f"{_MOCK}:MockAttention", api=1, preference=-100)]
