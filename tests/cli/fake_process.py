"""`python fake_process.py ARGUMENTS`: the command line with the model of conftest, in a process that imports no torch.

`FAKE_SECONDS`: how long a step takes. Models called `crash...` end the process as a segmentation fault does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from conftest import FakeEngine, FakeLLM


class SlowEngine(FakeEngine):
    def step(self) -> Any:
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        return super().step()


class ProcessLLM(FakeLLM):
    def __init__(self, config: Any) -> None:
        if config.model.source.startswith("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        super().__init__(config)
        self.text_engine = SlowEngine()


def main() -> None:
    module: Any = types.ModuleType("nanoengine.llm")
    module.LLM = ProcessLLM
    no_gpu: Any = types.ModuleType("torch")
    no_gpu.cuda = types.SimpleNamespace(is_initialized=lambda: False)
    sys.modules |= {"nanoengine.llm": module, "torch": no_gpu}
    from nanoengine.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
