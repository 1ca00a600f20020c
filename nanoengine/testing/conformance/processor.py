"""`check_processor`: tests a logits processor alone, in mixed batches, with a part of the vocabulary, in the engine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nanoengine.api import (
    Constraint,
    Grammar,
    LogitsProcessor,
    ParamsError,
    ProcessorContext,
    ProcessorParams,
    SamplerSpec,
    UnsupportedError,
    hookimpl,
)
from nanoengine.api.errors import described, is_failure
from nanoengine.api.plugin_calls import FILE_MODULE
from nanoengine.params.engine_plan import ProcessorPlan
from nanoengine.params.resolver import ParamsResolver
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.setup.plugins.validation import check_spec
from nanoengine.setup.start.processors import build_processors
from nanoengine.testing.conformance.failure import ConformanceError, during, require, require_close
from nanoengine.testing.conformance.host_state import check_state
from nanoengine.testing.conformance.processor_rows import Batch, Row, columns_of

_MAX_LEN = 32
_SPLIT = 0.4  # where the vocabulary is split for a sharded processor
_HISTORIES = ((3, 0), (6, 4), (9, 7))  # prompt and output lengths of the rows of each example


class _Vocabulary:
    """A context for the checks of parameters, in which each character is a token."""

    max_model_len = _MAX_LEN
    in_process = True
    end_ids: frozenset[int] = frozenset()
    reasoning = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = self.num_tokens = vocab_size

    def grammar(self, constraint: Constraint) -> Grammar:
        raise UnsupportedError("the kit", ["it has no grammar backend"])

    def encode(self, text: str) -> list[int]:
        return [ord(character) % self.vocab_size for character in text]


def check_processor(
    spec: SamplerSpec, *examples: Mapping[str, Any], refused: Sequence[Mapping[str, Any]] = (), vocab_size: int = 97
) -> None:
    """Tests a processor and its parameters.

    Args:
        spec: what the plugin's `register_samplers` returns.
        examples: values of its fields. Each example must change the logits of some row: {"even_only": True}.
        refused: values that must raise `ParamsError`.

    Raises `ConformanceError` that says what was wrong.
    """
    require(
        bool(examples), f"give check_processor an example of {spec.name!r}: values of its fields that have an effect"
    )
    with during(f"logits processor {spec.name!r}"):
        check_spec(spec)
        check_imports(spec.params)
        _check_params(spec.params, examples)
        resolver = ParamsResolver([(spec.name, spec.params)], _Vocabulary(vocab_size), frozenset())
        _check_refused(resolver, refused)
        _check_states(resolver, examples, vocab_size)
        processor = _make(spec, vocab_size, "cpu")
        batch = _batch(spec, resolver, examples, vocab_size)
        out = _check_apply(processor, batch, examples)
        _check_rows_alone(processor, batch, out)
        if processor.argmax_invariant:
            for shift in range(4):  # the likeliest tokens are close together, and each shift gives them other ids
                each = replace(batch, logits=0.03 * batch.logits.roll(shift, -1))
                same = torch.equal(_apply(processor, each).argmax(-1), each.logits.argmax(-1))
                require(same, "argmax_invariant is set, but apply() changes which token is the likeliest")
        if processor.sharded:
            _check_shards(processor, batch, out)
        _check_no_waiting(_make(spec, vocab_size, "meta"), batch)
        _check_engine(spec, examples, vocab_size)


def check_imports(params: type[Any]) -> None:
    """Checks that the module of the parameters imports no torch, because it is imported to list plugins."""
    module = params.__module__
    loaded_as_file = module == "__main__" or module.startswith(FILE_MODULE)
    if loaded_as_file or importlib.util.find_spec(module) is None:
        return  # in a plugin file, parameters and their part may be together
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    require(not done.stderr, f"importing {module} by itself failed: {done.stderr[-500:]}")
    require(
        done.returncode == 0,
        f"{module}, which has {params.__name__}, imports torch: move it to a module that does not",
    )


def _check_params(params: type[ProcessorParams], examples: Sequence[Mapping[str, Any]]) -> None:
    plain = params()
    require(not plain.active(), f"{params.__name__}() is active: each field's default must have no effect")
    for example in examples:
        require(
            params(**example).active(), f"{params.__name__}({_shown(example)}) is not active: active() returned False"
        )


def _check_refused(resolver: ParamsResolver, refused: Sequence[Mapping[str, Any]]) -> None:
    for values in refused:
        try:
            resolver.resolve(SamplingParams(**values))
        except ParamsError:
            continue
        require(False, f"{_shown(values)} was not rejected: raise ParamsError in __post_init__ or in pack()")


def _check_states(resolver: ParamsResolver, examples: Sequence[Mapping[str, Any]], vocab_size: int) -> None:
    for example in examples:
        (processor,) = resolver.resolve(SamplingParams(**example)).processors
        make: Any = partial(processor.params.start, [3, 1, 4, 1, 5], resolver.ctx)
        if make() is not None:
            check_state(processor, make, vocab_size)


def _make(spec: SamplerSpec, vocab_size: int, device: str) -> LogitsProcessor:
    ctx = ProcessorContext(max_slots=16, vocab_size=vocab_size, max_model_len=_MAX_LEN, device=torch.device(device))
    plan = ProcessorPlan(name=spec.name, target=spec.target, columns=spec.params.columns)
    built = build_processors([plan], TargetLoader(), ctx)
    require(not built.failed, f"on device {device!r}: {built.failed.get(spec.name)}")
    ((_, processor),) = built.working
    return processor


def _batch(
    spec: SamplerSpec, resolver: ParamsResolver, examples: Sequence[Mapping[str, Any]], vocab_size: int
) -> Batch:
    """Three rows of each example with different histories, and three that do not use the processor, shuffled."""
    random = torch.Generator().manual_seed(11)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=random).tolist()

    rows = []
    for number, example in enumerate([*examples, {}]):
        resolved = resolver.resolve(SamplingParams(**example))
        for prompt, output in _HISTORIES:
            history = tokens(prompt), tokens(output)
            packed = columns_of(resolved.processors, *history, resolver.ctx)
            rows.append(Row(*history, packed, number if example else -1))
    order = torch.randperm(len(rows), generator=random).tolist()
    logits = 3 * torch.randn(len(rows), vocab_size, generator=random)
    return Batch.of([rows[i] for i in order], spec.params.columns, logits, _MAX_LEN)


def _check_apply(processor: LogitsProcessor, batch: Batch, examples: Sequence[Mapping[str, Any]]) -> Tensor:
    out = _apply(processor, batch)
    for row, number in enumerate(batch.examples):
        if number < 0:
            unchanged = torch.equal(out[row], batch.logits[row])
            require(unchanged, "apply() changed a row that does not use the processor: its columns have the defaults")
    require(not bool((out == float("-inf")).all(-1).any()), "apply() removed every token of a row: none can be drawn")
    for number, example in enumerate(examples):
        mine = [row for row, each in enumerate(batch.examples) if each == number]
        changed = any(not torch.equal(out[row], batch.logits[row]) for row in mine)
        require(changed, f"apply() changed nothing for {_shown(example)}; give an example that has an effect")
    return out


def _apply(processor: LogitsProcessor, batch: Batch) -> Tensor:
    with during("apply()"):
        out = processor.apply(batch.logits.clone(), batch.rows_for(processor.needs))
    wanted = batch.logits
    require(isinstance(out, Tensor), f"apply() returned {type(out).__name__}: it must return the logits")
    good = (out.shape, out.dtype, out.device) == (wanted.shape, wanted.dtype, wanted.device)
    got, expected = (f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (out, wanted))
    require(good, f"apply() returned {got}, not {expected}")
    require(not bool((out.isnan() | (out == float("inf"))).any()), "apply() returned NaN or +inf")
    return out


def _check_rows_alone(processor: LogitsProcessor, batch: Batch, out: Tensor) -> None:
    """Checks that the result of a row does not depend on the other rows in the batch, or on its place."""
    backwards = list(range(len(batch)))[::-1]
    same = torch.equal(_apply(processor, batch.pick(backwards)), out[backwards])
    require(same, "a row depends on its place in the batch")
    for row in range(len(batch)):
        alone = _apply(processor, batch.pick([row]))
        require_close(alone[0], out[row], 1e-5, "a row alone, compared with the same row in a batch")


def _check_shards(processor: LogitsProcessor, batch: Batch, out: Tensor) -> None:
    cut = int(_SPLIT * out.shape[1])
    for first, last in ((0, cut), (cut, out.shape[1])):
        part = _apply(processor, batch.shard(first, last))
        what = f"`sharded` is set, but the result for only the ids {first} to {last - 1} is different"
        require_close(part, out[:, first:last], 1e-5, what)


def _check_no_waiting(processor: LogitsProcessor, batch: Batch) -> None:
    """Runs the processor on meta tensors, on which every operation that waits for the device fails."""
    on_meta = batch.to("meta")
    try:
        processor.apply(on_meta.logits, on_meta.rows_for(processor.needs))
    except BaseException as error:
        if not is_failure(error):
            raise
        cause = described(error).split("\n")[0]
        raise ConformanceError(
            "apply() reads values on the host (.item(), .cpu(), `if tensor:`, boolean indexing), which waits for the "
            f"device, or mixes devices (make tensors on logits.device, buffers on ctx.device): {cause}"
        ) from error


def _check_engine(spec: SamplerSpec, examples: Sequence[Mapping[str, Any]], vocab_size: int) -> None:
    """Runs requests on the mock model: tokens must be equal alone and together, with and without the processor."""
    from nanoengine import LLM
    from nanoengine.setup.plugins.discover import discover
    from nanoengine.testing import mock_model
    from nanoengine.testing.checkpoints import write_byte_tokenizer

    found = discover().samplers.get(spec.name)
    own = [] if found and found.spec == spec else [SimpleNamespace(register_samplers=hookimpl(lambda: [spec]))]
    requests = [
        ({"prompt_token_ids": [7 + i, 1, 2 + i]}, SamplingParams(max_tokens=8, ignore_eos=True, seed=i, **example))
        for i, example in enumerate([*examples, {}])
    ]
    with tempfile.TemporaryDirectory() as folder, during("in the engine"):
        path = mock_model.write_mock_checkpoint(
            Path(folder), vocab_size=max(vocab_size, 259), max_position_embeddings=_MAX_LEN
        )
        write_byte_tokenizer(path)
        options: dict[str, Any] = {"load_format": "dummy", "num_gpu_blocks_override": 64, "device": "cpu"}
        with LLM(path, attention="mock", plugins=[mock_model, *own], **options) as llm:
            together = llm.generate(*(list(each) for each in zip(*requests, strict=True)), use_tqdm=False)
            alone = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt, params in requests]
    for output in (*together, *alone):
        require(output.error is None, f"the request failed: {output.error}")
    same = [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    require(same, "requests have different tokens together than alone")


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
