"""`SamplingParams`, with vLLM's names and defaults. Core fields are checked here, fields of processors when resolved.

The valid fields depend on the processors that plugins register. So `SamplingParams` accepts any keyword, and
`ParamsResolver` (one per engine) checks it when a request is submitted. Imports no torch.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nanoengine.api.deltas import Pooling
from nanoengine.api.errors import ParamsError, PluginError, described, is_failure, nearest_part, shown
from nanoengine.api.plugin_calls import plugin_call
from nanoengine.api.specs import ColumnSpec, ParamsContext, ProcessorParams, StandardOp
from nanoengine.params.field_types import conform
from nanoengine.params.sampling_fields import (
    CORE_TYPES,
    KEYWORDS_OF_CALLS,
    NOT_SUPPORTED,
    CoreFields,
    legal_fields,
    processor_types,
)
from nanoengine.params.signatures import SamplingSignature

_CACHE_SIZE = 256
MAX_RAGGED = 16_384
"""Most values of one request in a ragged column. The table of the column is as wide as its widest row, in all slots."""


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


class SamplingParams(SamplingSignature):
    """How to sample: `SamplingParams(temperature=0.8, top_p=0.95, max_tokens=64)`.

    Keywords are the parameters of the engine itself (n, seed, max_tokens, stop ...), and those of the logits processors
    (temperature, top_p, bad_words ...), also of plugins. docs/reference.md lists them.

    The engine's own are checked here. The others are checked when a request is submitted, because only the engine knows
    its processors. Immutable: `replace` returns a changed copy. A processor's parameter can be read only if it was
    given.
    """

    __slots__ = ("_core", "_key", "_processor")
    __signature__ = inspect.signature(SamplingSignature)
    _core: CoreFields
    _key: Hashable
    _processor: dict[str, Any]

    if not TYPE_CHECKING:  # which reads the signatures of `SamplingSignature`

        def __init__(self, /, *by_place: object, **fields: Any) -> None:
            self._set(by_place, fields)

        def replace(self, /, *by_place: object, **changes: Any) -> SamplingParams:
            return self._replaced(by_place, changes)

        __init__.__doc__, replace.__doc__ = SamplingSignature.__init__.__doc__, SamplingSignature.replace.__doc__
        replace.__signature__ = inspect.signature(SamplingSignature.replace)

    def _set(self, by_place: Sequence[object], fields: dict[str, Any]) -> None:
        _keywords_only("SamplingParams", by_place)
        core = {name: conform(name, fields.pop(name), kind) for name, kind in CORE_TYPES.items() if name in fields}
        object.__setattr__(self, "_core", CoreFields(**core))
        object.__setattr__(self, "_processor", {name: _own(name, value) for name, value in fields.items()})
        object.__setattr__(self, "_key", None)

    @property
    def core(self) -> CoreFields:
        """The fields of the engine itself, checked."""
        return self._core

    @property
    def processor_fields(self) -> Mapping[str, Any]:
        """The fields that are not core fields, not checked."""
        return types.MappingProxyType(self._processor)

    @property
    def key(self) -> Hashable:
        """Equal for equal parameters only. Computed once, because a batch compares thousands of them."""
        if self._key is None:
            core = tuple(_frozen(getattr(self._core, name)) for name in CORE_TYPES)
            object.__setattr__(self, "_key", (core, _frozen(self._processor)))
        return self._key

    def _replaced(self, by_place: Sequence[object], changes: Mapping[str, Any]) -> SamplingParams:
        _keywords_only("replace", by_place)
        return SamplingParams(**{**self._fields(), **changes})

    def given_fields(self) -> dict[str, Any]:
        """The core fields that differ from their defaults, and the fields of logits processors that were given."""
        plain = CoreFields()
        return {k: v for k, v in self._fields().items() if k in self._processor or v != getattr(plain, k)}

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self._core, name) for name in CORE_TYPES} | self._processor

    def __getattr__(self, name: str) -> Any:
        if name in CORE_TYPES:
            return getattr(self._core, name)
        if not name.startswith("_") and name in self._processor:
            return self._processor[name]
        raise AttributeError(
            f"SamplingParams has no value for {name!r}: it was not given, and only the engine knows the default"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"SamplingParams is immutable: use params.replace({name}=...)")

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if isinstance(other, SamplingParams) else NotImplemented

    def __repr__(self) -> str:
        return f"SamplingParams({', '.join(f'{k}={v!r}' for k, v in self.given_fields().items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self._fields(),))


def _keywords_only(name: str, by_place: Sequence[object]) -> None:
    if by_place:
        raise ParamsError(
            f"{name} takes keywords only, but {shown(by_place[0])} has no name: write for example "
            f"{name}(temperature=0.8, max_tokens=64)"
        )


def _rebuild(fields: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**fields)


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
            except _TooWide as error:
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


class _TooWide(ParamsError):
    """A request has more than `MAX_RAGGED` values for a ragged column."""


def pack_columns(processor: str, specs: Mapping[str, ColumnSpec], values: Mapping[str, Any]) -> dict[str, Any]:
    """A processor's column values as read-only arrays of the declared dtypes: 0-d, or 1-d for ragged columns.

    `values`: what `ProcessorParams.pack` returned. Raises `PluginError` that names the processor and the column, and
    `ParamsError` for more than `MAX_RAGGED` values.
    """
    if not isinstance(values, Mapping):
        raise PluginError(
            f"logits processor {processor!r}: packed {values!r:.80}, not a mapping of its columns {sorted(specs)}"
        )
    packed = {name: spec for name, spec in specs.items() if spec.op is not StandardOp.BITMASK}
    if set(values) != set(packed):
        raise PluginError(
            f"logits processor {processor!r}: packed {sorted(values, key=str)} for its columns {sorted(packed)}"
        )
    return {name: pack_column(processor, name, spec, values[name]) for name, spec in packed.items()}


def pack_column(
    processor: str, name: str, spec: ColumnSpec, value: Any, shape: tuple[int, ...] | None = None
) -> npt.NDArray[Any]:
    """The value of one column as a read-only array of the declared dtype. Raises the errors of `pack_columns`.

    shape: what it must have; default: that of one slot, where a ragged column has any number of values.
    """
    where = f"logits processor {processor!r}, column {name!r}"
    try:
        array = as_column(value, spec)
    except (TypeError, ValueError, OverflowError) as error:
        raise PluginError(f"{where}: no {spec.dtype}: {error}") from error
    if spec.ragged and array.size > MAX_RAGGED:
        raise _TooWide(f"{where}: {array.size} values, more than {MAX_RAGGED}: give fewer")
    if shape is None:
        shape = array.shape[:1] if spec.ragged else () if spec.width is None else (spec.width,)
    if array.shape != shape or (spec.ragged and array.ndim != 1):
        wanted = "a flat sequence" if spec.ragged else f"of shape {shape}" if shape else "one number"
        raise PluginError(f"{where}: {value!r:.80} is not {wanted}")
    if spec.op is StandardOp.TEMPERATURE and not ((array >= 0) & (array < np.inf)).all():
        raise PluginError(f"{where}: a temperature must be a number from 0 (greedy) up, not {value!r:.80}")
    array.flags.writeable = False
    return array


Draws = npt.NDArray[Any] | list[npt.NDArray[Any]]


def pack_draws(processor: str, name: str, spec: ColumnSpec, values: Any, draws: int, vocab_size: int) -> Draws:
    """The values of one column for so many draws, as `HostState.columns` returned them: an array [draws, values], or of
    a ragged column a list of flat arrays. An array may be the state's own.

    Raises the errors of `pack_columns`.
    """
    if spec.ragged:
        if len(values) != draws:
            where = f"logits processor {processor!r}, column {name!r}"
            raise PluginError(f"{where}: {len(values)} sequences for {draws} draws")
        return [pack_column(processor, name, spec, each) for each in values]
    shape = (draws, *values_of_draw(spec, vocab_size))
    given = isinstance(values, np.ndarray) and values.shape == shape and values.dtype == spec.dtype
    if not given or spec.op is StandardOp.TEMPERATURE:  # else there is nothing to check or to convert
        values = pack_column(processor, name, spec, values, shape)
    packed: npt.NDArray[Any] = values.reshape(draws, -1)
    return packed


def values_of_draw(spec: ColumnSpec, vocab_size: int) -> tuple[int, ...]:
    """The shape of the values that a column which is not ragged has for one draw."""
    width = -(-vocab_size // 32) if spec.op is StandardOp.BITMASK else spec.width
    return () if width is None else (width,)


def as_column(value: Any, spec: ColumnSpec) -> np.ndarray[Any, Any]:
    """A copy of the numbers in the column's dtype; the plugin may change its own array later.

    Raises `ValueError` for a number that does not fit in int32, of which numpy would take the lower bits.
    """
    if spec.op is StandardOp.BITMASK and isinstance(value, np.ndarray) and value.dtype == np.uint32:
        value = value.view(np.int32)  # the same bits
    with np.errstate(over="ignore"):
        array = np.array(value, dtype=spec.dtype)
    if spec.dtype == "int32" and getattr(value, "dtype", None) != np.int32 and not np.array_equal(array, value):
        raise ValueError(f"{shown(value)} does not fit in int32")
    return array


def _is_greedy(processor: PackedProcessor) -> bool:
    return any(
        spec.op is StandardOp.TEMPERATURE and not processor.columns[name]
        for name, spec in processor.params.columns.items()
    )


def _own(name: str, value: Any) -> Any:
    """A copy that the caller cannot change. Raises `ParamsError` if it cannot be copied: a lock, a recursive list."""
    try:
        parts = value if isinstance(value, list | tuple) else [value]
        found = copy.deepcopy(value, {id(each): each for each in parts if callable(each)})  # which may have a state
        hash(_frozen(found))
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ParamsError(f"{name}: {shown(value)} cannot be a parameter: {described(error)}") from error
    return found


_ATOMS = frozenset({type(None), bool, int, float})


def _frozen(value: Any) -> Hashable:
    """A key that is equal for equal values only. Types count: for the checks True is not 1."""
    if type(value) in _ATOMS:
        return (type(value), value)
    if isinstance(value, Mapping):  # every mapping is read as a dict
        return (dict, tuple((_frozen(k), _frozen(v)) for k, v in value.items()))
    if isinstance(value, str | bytes) and type(value) in (str, bytes):
        return value
    if isinstance(value, np.ndarray):
        return (np.ndarray, value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, list | tuple | set | frozenset | range):
        return (type(value), *map(_frozen, value))
    return (type(value), value if isinstance(value, Hashable) else object())  # not hashable: equal to nothing
