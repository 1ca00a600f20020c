"""What all benchmarks of whole engines share: settings, engines with dummy weights, and measured passes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanoengine.api.errors import NanoEngineError
from nanoengine.lab.bench.roofline import Limits
from nanoengine.lab.bench.shapes import Shape
from nanoengine.lab.bench.workloads import Workload
from nanoengine.llm import LLM
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.setup.start.garbage import without_collections


class BenchmarkError(NanoEngineError):
    """A benchmark cannot run here, or the measured code failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured, and how often.

    Attributes:
        passes: number of measured passes, after one to warm up. attention: name of a backend, or "auto".
        options: engine options. limits: limits of one device; None: no limits are reported.
        say: reports what begins now.
    """

    shape: Shape
    passes: int = 5
    max_model_len: int = 4096
    attention: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits | None = None
    say: Callable[[str], None] = field(default=lambda _: None, compare=False, repr=False)

    def counted(self, what: str) -> Iterator[int]:
        """The numbers of the measured passes, from 1. Reports each."""
        for number in range(1, self.passes + 1):
            self.say(f"{what}: pass {number} of {self.passes}")
            yield number

    @property
    def engine_limits(self) -> Limits | None:
        """The limits of all devices of an engine."""
        return None if self.limits is None else self.limits.of(self.options.get("tensor_parallel_size", 1))

    def as_dict(self) -> dict[str, Any]:
        found = {**asdict(self), "shape": self.shape.name, "options": dict(self.options)}
        del found["say"]
        return found

    @contextmanager
    def engine(self, **options: Any) -> Iterator[LLM]:
        """A context with an engine of this shape. `options` override those of the setup."""
        given = {"load_format": "dummy", "max_model_len": self.max_model_len, **self.options, **options}
        with tempfile.TemporaryDirectory() as folder:
            model = self.shape.write(Path(folder), given["max_model_len"])
            with without_collections():  # as `nanoengine run` does
                llm = LLM(model, attention=self.attention, **given)
            with llm:
                yield llm


def backend_of(llm: LLM) -> str:
    """The name of the engine's attention backend."""
    return llm._built.assembly.plan.attention_name


def places_of(llm: LLM) -> int:
    """The largest number of requests that run at the same time."""
    return llm.engine.scheduler.config.max_num_seqs


def one_pass(llm: LLM, workload: Workload, **sampling: Any) -> float:
    """Runs the workload with an empty prefix cache. Returns the seconds from the first request to the last token."""
    llm.reset_prefix_cache()
    given = {"temperature": 0.6, "ignore_eos": True, **sampling}
    params = [SamplingParams(max_tokens=n, **given) for n in workload.output_lens]
    start = time.perf_counter()
    outputs = llm.generate(workload.prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    for output, length in zip(outputs, workload.output_lens, strict=True):
        if output.error is not None:
            raise output.error
        assert len(output.outputs[0].token_ids) == length
    return seconds
