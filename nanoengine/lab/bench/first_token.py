"""A new process that starts an engine, generates one token, and prints the seconds of each phase as a line of JSON.

    python -m nanoengine.lab.bench.first_token '{"model": FOLDER, "attention": "auto", "options": {...}}'

The import of torch is measured too, so this file must not import it at the top.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from nanoengine.setup.config.engine_options import engine_options
from nanoengine.setup.start.clock import StartClock
from nanoengine.setup.start.garbage import without_collections
from nanoengine.setup.start.wake import wake_gpu


def first_token(model: str, attention: str, options: dict[str, Any]) -> dict[str, float]:
    """Phase -> seconds, in order; the last one is "first token"."""
    clock = StartClock.of_process()
    wake_gpu(engine_options(options))
    with without_collections():  # as `nanoengine run` does
        from nanoengine.llm import LLM
        from nanoengine.params.sampling_params import SamplingParams

        clock.lap("import")
        llm = LLM(model, attention=attention, **options)
    with llm:
        started = time.perf_counter()
        with llm.stream(range(10, 42), SamplingParams(temperature=0.6, max_tokens=2, ignore_eos=True)) as stream:
            next(stream)
            token = time.perf_counter() - started
        return {**clock.report().as_dict(), **llm.start_report.as_dict(), "first token": token}


if __name__ == "__main__":
    print(json.dumps(first_token(**json.loads(sys.argv[1]))))
