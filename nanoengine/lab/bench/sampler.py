"""Sampling over a whole vocabulary: microseconds per call for each number of rows, and its cost in a whole engine.

On a GPU the calls run from a CUDA graph, as in the engine. They use several logits buffers in turn, so that small
batches are read from memory and not from the cache. The plain torch reference is measured too, and must draw the same
tokens. Without a GPU only the reference is measured. Logits are normal with a standard deviation of 2. This is flatter
than a trained model's, so truncation without top-k keeps many tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from nanoengine.kernels import philox, sampling
from nanoengine.lab.bench.report import Report, number, share
from nanoengine.lab.bench.session import BenchmarkError, Setup, one_pass
from nanoengine.lab.bench.timing import best_device, calls_over, copies, eager_us, time_us
from nanoengine.lab.bench.workloads import uniform


@dataclass(frozen=True, slots=True)
class Case:
    """The parameters of every row. Temperature 0 means greedy."""

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def truncates(self) -> bool:
        return bool(self.top_k or self.top_p < 1 or self.min_p)

    @property
    def as_params(self) -> dict[str, float]:
        """The parameters as keywords of `SamplingParams`."""
        given = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        return {name: value for name, value in given.items() if name == "temperature" or value != getattr(PLAIN, name)}


PLAIN = Case()
CASES: Mapping[str, Case] = {
    "greedy": Case(temperature=0.0),
    "temperature": PLAIN,
    "top_k=50": Case(top_k=50),
    "top_p=0.95": Case(top_p=0.95),
    "top_k=50,top_p=0.95": Case(top_k=50, top_p=0.95),
    "min_p=0.05": Case(min_p=0.05),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case at one number of rows.

    Attributes:
        kernel: "triton" or "torch". us, best_us: time of a call, median and best. torch_us: the reference's, on a GPU.
        limit_us: time to read the logits once at the device's bandwidth. agrees: both drew the same tokens.
        step_us: time of an engine's step with so many rows and this sampling; None if no engine ran.
        tokens_per_s, median_tokens_per_s: those of that engine, best pass and median.
        cost: share of the speed that is lost compared with plain temperature, by the medians.
    """

    case: str
    rows: int
    vocab: int
    dtype: str
    kernel: str
    us: float
    best_us: float
    torch_us: float | None
    limit_us: float | None
    agrees: bool
    step_us: float | None = None
    tokens_per_s: float | None = None
    median_tokens_per_s: float | None = None
    cost: float | None = None


def run(
    setup: Setup, cases: Mapping[str, Case], rows: Sequence[int], *, engine_rows: int | None, output_len: int = 512
) -> Report:
    """Measures all cases. `engine_rows`: also run an engine with so many requests of 128 prompt tokens.

    `output_len`: output tokens of these requests.
    """
    found = [_measure(setup, name, case, count) for count in rows for name, case in cases.items()]
    if engine_rows is not None:
        beside = _in_engine(setup, cases, engine_rows, output_len)
        found = [replace(row, **beside[row.case]) if row.rows == engine_rows else row for row in found]
    settings = {**setup.as_dict(), "engine_rows": engine_rows}
    return Report(benchmark="sampler", settings=settings, rows=found, columns=COLUMNS)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Parameters of a draw per row, with the names of the kernels' arguments."""

    greedy: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    sample_index: Tensor

    @classmethod
    def of(cls, case: Case, rows: int, device: torch.device) -> _Columns:
        ramp = torch.arange(rows, dtype=torch.int64, device=device)
        return cls(
            greedy=torch.full_like(ramp, case.temperature == 0, dtype=torch.bool),
            temperature=torch.full_like(ramp, case.temperature or 1.0, dtype=torch.float32),
            top_k=torch.full_like(ramp, case.top_k, dtype=torch.int32),
            top_p=torch.full_like(ramp, case.top_p, dtype=torch.float32),
            min_p=torch.full_like(ramp, case.min_p, dtype=torch.float32),
            seeds=ramp * 7919,
            positions=ramp + 100,
            sample_index=torch.zeros_like(ramp),
        )

    def named(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.__slots__}


def _measure(setup: Setup, name: str, case: Case, rows: int) -> Row:
    device, vocab = best_device(setup.options.get("device", "auto")), setup.shape.vocab
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # the dtype of the engine's logits
    columns = _Columns.of(case, rows, device)
    size = rows * vocab * dtype.itemsize
    generator = torch.Generator(device).manual_seed(rows)
    buffers = [
        torch.randn(rows, vocab, device=device, generator=generator).mul_(2).to(dtype)
        for _ in range(copies(size, device))
    ]
    torch_us, agrees = None, True
    if device.type == "cuda":
        call = _kernel(case, rows, columns, device)
        torch_us = eager_us(lambda: reference(buffers[0], case, columns))
        agrees = torch.equal(call(buffers[0]), reference(buffers[0], case, columns))
    else:
        call = partial(reference, case=case, columns=columns)
    middle, best = time_us(calls_over(buffers, call, at_least=16 if device.type == "cuda" else 2), device)
    return Row(
        case=name,
        rows=rows,
        vocab=vocab,
        dtype=str(dtype).removeprefix("torch."),
        kernel="triton" if device.type == "cuda" else "torch",
        us=middle,
        best_us=best,
        torch_us=torch_us,
        limit_us=None if setup.limits is None else 1e6 * size / setup.limits.bandwidth,
        agrees=agrees,
    )


def _kernel(case: Case, rows: int, columns: _Columns, device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        kernels: Any = importlib.import_module("nanoengine.kernels.sampling_triton")
    except ImportError as error:
        raise BenchmarkError(f"the sampling kernels need Triton: {error}; pip install 'nanoengine[triton]'") from error
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    failed = torch.empty(rows, dtype=torch.int32, device=device)
    tail = kernels.Tail.TRUNCATION if case.truncates else kernels.Tail.TEMPERATURE
    tail = kernels.Tail.GREEDY if case.temperature == 0 else tail

    def call(logits: Tensor) -> Tensor:
        kernels.sample(logits, tail, tokens, failed, **columns.named())
        return tokens

    return call


def reference(logits: Tensor, case: Case, columns: _Columns) -> Tensor:
    """The draw of the engine without kernels: logits [R, V] -> tokens int64 [R]."""
    if case.temperature == 0:
        return logits.float().argmax(-1)
    scaled = logits.float() if logits.dtype != torch.float32 else logits.clone()
    keys = philox.draw_keys(columns.seeds, columns.positions, columns.sample_index)
    sampling.scale_by_temperature_(scaled, columns.temperature)
    if case.truncates:
        return sampling.draw_truncated(scaled, keys, columns.top_k, columns.top_p, columns.min_p)[0]
    return sampling.draw(scaled, keys)[0]


def _in_engine(setup: Setup, cases: Mapping[str, Case], rows: int, output_len: int) -> dict[str, dict[str, Any]]:
    """Case -> fields of its row that are measured in an engine. Cases take turns, so that drift affects all of them."""
    workload = uniform(rows, output_len=output_len)
    tried = {"temperature": PLAIN, **cases}
    seconds: dict[str, list[float]] = {name: [] for name in tried}
    torch.cuda.empty_cache()  # so that the engine can use the memory of the calls before
    setup.say("in an engine: warming up")
    with setup.engine() as llm:
        for case in tried.values():
            one_pass(llm, workload, **case.as_params)
        before = llm.stats().steps
        for _ in setup.counted("in an engine"):
            for name, case in tried.items():
                seconds[name].append(one_pass(llm, workload, **case.as_params))
        steps = (llm.stats().steps - before) / (setup.passes * len(tried))
    plain = median(seconds["temperature"])
    return {
        name: {
            "step_us": 1e6 * median(found) / steps,
            "tokens_per_s": workload.counted / min(found),
            "median_tokens_per_s": workload.counted / median(found),
            "cost": 1 - plain / median(found),
        }
        for name, found in seconds.items()
    }


COLUMNS = {
    "case": lambda r: r.case,
    "rows": lambda r: str(r.rows),
    "us": lambda r: number(r.us, 1),
    "best": lambda r: number(r.best_us, 1),
    "torch us": lambda r: number(r.torch_us, 0),
    "limit us": lambda r: number(r.limit_us, 1),
    "of limit": lambda r: share(r.limit_us, r.us),
    "of a step": lambda r: "-" if r.step_us is None else f"{r.us / r.step_us:.1%}",
    "engine tok/s": lambda r: number(r.tokens_per_s),
    "cost": lambda r: "-" if r.cost is None else f"{r.cost:+.1%}",
    "tokens": lambda r: "as torch" if r.agrees else "DIFFER",
}
