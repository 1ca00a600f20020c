"""`ParamsResolver`: checks `SamplingParams` for the processors and the model of one engine. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanoengine.api.deltas import Pooling
from nanoengine.api.errors import ParamsError, PluginError, described, is_failure, nearest_part, shown
from nanoengine.api.plugin_calls import plugin_call
from nanoengine.api.processor_params import ParamsContext, ProcessorParams, StandardOp
from nanoengine.params.columns import MAX_RAGGED, TooWide, pack_columns
from nanoengine.params.field_types import conform
from nanoengine.params.sampling_fields import (
    KEYWORDS_OF_CALLS,
    NOT_SUPPORTED,
    CoreFields,
    legal_fields,
    processor_types,
)
from nanoengine.params.sampling_params import SamplingParams

_CACHE_SIZE = 256


@dataclass(frozen=True, slots=True)
class PackedProcessor:
    """A processor that a request uses: its name, parameters and packed columns (numpy arrays, 0-d or 1-d; no masks)."""

    name: str
    params: ProcessorParams
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedParams:
    """The checked parameters of one request, as scheduler and output processor use them.

    Attributes:
        n, max_tokens (None: up to max_model_len), min_tokens, seed (None: the engine's), priority, cache_salt,
        speculate, logprobs, prompt_logprobs (None: not requested; -1 was replaced by the size of the vocabulary),
        detokenize, skip_special_tokens, include_stop_str_in_output: as in `SamplingParams`.
        stop: stop strings. eos_ids: empty with ignore_eos. stop_token_ids: the user's own.
        processors: those that this request uses. greedy: the draw is the arg-max.
        pooling: a request that pools: its vector is the mean of the hidden states, or the last one; it draws no token.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    seed: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    speculate: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    stop: tuple[str, ...] = ()
    eos_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    processors: tuple[PackedProcessor, ...] = ()
    greedy: bool = False
    pooling: Pooling | None = None

    @property
    def stop_set(self) -> frozenset[int]:
        """Ids that end the output. They are masked until `min_tokens` tokens are generated."""
        return self.eos_ids | self.stop_token_ids

    @property
    def restrictions(self) -> tuple[str, ...]:
        """What may leave no token to be drawn: logits processors, unless they scale or keep the likeliest, and
        min_tokens, which masks the end."""
        may = (None, StandardOp.BITMASK)
        names = [p.name for p in self.processors if any(each.op in may for each in p.params.columns.values())]
        return (*names, *(("min_tokens",) if self.min_tokens else ()))


class ParamsResolver:
    """Turns `SamplingParams` into `ResolvedParams` for the processors and the model of one engine.

    Equal parameters give the same object, because a batch may have thousands of them.
    """

    def __init__(
        self,
        processors: Sequence[tuple[str, type[ProcessorParams]]],
        ctx: ParamsContext,
        eos_ids: frozenset[int],
        failed_processors: Mapping[str, str] | None = None,
        failure_hint: str = "",
        *,
        max_n: int = sys.maxsize,
        max_logprobs: int = -1,
        engine_options: Collection[str] = (),
    ) -> None:
        """Raises `PluginError` if processors have the same field, or parameters that are not a correct dataclass.

        Args:
            failed_processors: processors that cannot run, name -> cause. A request that sets one of their fields is
                rejected.
            failure_hint: added to the message about an unknown field: the plugins that failed to register, one of which
                may provide it.
            max_n, max_logprobs: as in `EngineOptions`.
            engine_options: names of engine options, for the message if one is given as a sampling parameter.
        """
        self._legal = legal_fields(processors)
        self._processors = [(name, params, processor_types(name, params)) for name, params in processors]
        self._failed = dict(failed_processors or {})
        self._failure_hint = failure_hint
        self._engine_options = engine_options
        self.ctx, self._max_n, self._max_logprobs = ctx, max_n, max_logprobs
        # Some checkpoints list end-of-text ids outside their vocabulary. These are never drawn and need no mask.
        self._eos_ids = frozenset(i for i in eos_ids if 0 <= i < ctx.vocab_size)
        self._cache: dict[Hashable, ResolvedParams] = {}

    @property
    def names(self) -> frozenset[str]:
        """Every valid field of `SamplingParams`."""
        return frozenset(self._legal)

    def resolve(self, params: SamplingParams) -> ResolvedParams:
        """The checked parameters.

        Raises `ParamsError` that names the field, its value and the valid ones (for an unknown field the nearest name),
        and `PluginError` if a field is given whose processor is broken.
        """
        key = params.key
        try:
            found = self._cache.get(key)
        except BaseException as error:  # the values' classes may be any code, also their comparison
            if not is_failure(error):
                raise
            raise ParamsError(f"comparing {shown(dict(params.processor_fields))} raised {described(error)}") from error
        if found is None:
            found = self._resolve(params.core, params.processor_fields)
            if len(self._cache) >= _CACHE_SIZE:
                self._cache = {}
            self._cache[key] = found
        return found

    def preparations(self, params: ResolvedParams) -> list[Callable[[], Any]]:
        """What must be done before a request with these parameters can start: `ProcessorParams.prepare` of each."""
        jobs = []
        for each in params.processors:
            with plugin_call(f"logits processor {each.name!r}: prepare failed", type(each.params)):
                job = each.params.prepare(self.ctx)
            if job is not None:
                jobs.append(job)
        return jobs

    def _resolve(self, core: CoreFields, given: Mapping[str, Any]) -> ResolvedParams:
        self._check_names(given)
        processors = tuple(
            s for name, params, kinds in self._processors if (s := self._processor(name, params, kinds, given))
        )
        if core.stop_strings:
            self.ctx.encode(core.stop_strings[0])  # raises if there is no tokenizer
        self._check_ids("stop_token_ids", core.stop_token_ids or ())
        if core.n > self._max_n:
            raise ParamsError(f"n is {core.n}, and engine option max_n is {self._max_n}: lower n or raise max_n")
        self._check_num_logprobs("logprobs", core.logprobs)
        self._check_num_logprobs("prompt_logprobs", core.prompt_logprobs)
        plain = unchecked_params(core, self.ctx.vocab_size, self._eos_ids)
        return replace(plain, processors=processors, greedy=any(_is_greedy(processor) for processor in processors))

    def _check_names(self, given: Mapping[str, Any]) -> None:
        for name in given:
            if name in self._legal:
                continue
            if name in NOT_SUPPORTED:
                raise ParamsError(f"SamplingParams: vLLM's {name!r} is not supported: {NOT_SUPPORTED[name]}")
            if name in KEYWORDS_OF_CALLS:
                raise ParamsError(f"SamplingParams has no field {name!r}; it is a keyword of {KEYWORDS_OF_CALLS[name]}")
            if name in self._engine_options:
                place = f"it is an option of the engine: LLM(model, {name}=...), or engine.{name} in a configuration"
                raise ParamsError(f"SamplingParams has no field {name!r}; {place}")
            raise ParamsError(
                f"SamplingParams has no field {name!r}; {nearest_part(name, self._legal)}{self._failure_hint}"
            )

    def _processor(
        self, name: str, params: type[ProcessorParams], kinds: Mapping[str, Any], given: Mapping[str, Any]
    ) -> PackedProcessor | None:
        """The processor with this request's values; None if the request does not use it or sets none of its fields."""
        values = {field: conform(field, given[field], kind) for field, kind in kinds.items() if field in given}
        if not values:
            return None
        if name in self._failed:
            raise PluginError(
                f"logits processor {name!r}, which {', '.join(values)} needs, cannot run: {self._failed[name]}; fix or "
                f"uninstall its plugin, or leave out {', '.join(values)}"
            )
        with plugin_call(f"logits processor {name!r}: {params.__qualname__} failed on {shown(values)}", params):
            processor = params(**values)
            if not processor.active():
                return None
            packed = processor.pack(self.ctx)
            try:
                columns = pack_columns(name, params.columns, packed)
            except TooWide as error:
                raise ParamsError(f"{', '.join(values)}: {error}") from error
        return PackedProcessor(name, processor, columns)

    def _check_ids(self, name: str, ids: Collection[int]) -> None:
        outside = sorted({i for i in ids if not 0 <= i < self.ctx.vocab_size})
        if outside:
            raise ParamsError(f"{name}: no such token id: {shown(outside)}; ids are 0 to {self.ctx.vocab_size - 1}")
        if len(set(ids)) > MAX_RAGGED:
            raise ParamsError(f"{name} has {len(set(ids))} ids, more than {MAX_RAGGED}: shorten it")

    def _check_num_logprobs(self, name: str, value: int | None) -> None:
        """The number of log-probs per position is limited, because it costs memory and time of other requests."""
        if value is not None and value > self.ctx.vocab_size:
            raise ParamsError(f"{name} must be at most the size of the vocabulary, {self.ctx.vocab_size}, not {value}")
        limit = self._max_logprobs
        if value is not None and limit != -1 and (value == -1 or value > limit):
            wanted = f"-1 (all {self.ctx.vocab_size})" if value == -1 else value
            raise ParamsError(
                f"{name} is {wanted}, and engine option max_logprobs is {limit}: ask for at most {limit}, or raise "
                "max_logprobs (-1: no limit)"
            )


def unchecked_params(core: CoreFields, vocab_size: int, eos_ids: frozenset[int]) -> ResolvedParams:
    """What the core fields say, without logits processors: all that makes text and outputs of a request's tokens."""
    logprobs, prompt_logprobs = (vocab_size if n == -1 else n for n in (core.logprobs, core.prompt_logprobs))
    return ResolvedParams(
        n=core.n,
        max_tokens=core.max_tokens,
        min_tokens=core.min_tokens,
        seed=core.seed,
        priority=core.priority,
        cache_salt=core.cache_salt,
        speculate=core.speculate,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        detokenize=core.detokenize,
        skip_special_tokens=core.skip_special_tokens,
        include_stop_str_in_output=core.include_stop_str_in_output,
        stop=core.stop_strings,
        eos_ids=frozenset() if core.ignore_eos else eos_ids,
        stop_token_ids=frozenset(core.stop_token_ids or ()),
    )


def _is_greedy(processor: PackedProcessor) -> bool:
    return any(
        spec.op is StandardOp.TEMPERATURE and not processor.columns[name]
        for name, spec in processor.params.columns.items()
    )
