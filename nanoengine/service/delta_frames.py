"""A step's deltas as one frame: what an engine sends to a client in another process.

Most deltas are one token of one sample and no more. Those are records of one size, which cost least; all others are
flat arrays behind them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from nanoengine.api.deltas import FinishReason, Float32, Int32, LogprobRows, RequestDelta, SampleDelta, join_rows
from nanoengine.distributed.wire import decode, encode
from nanoengine.service.frames import Kind, error_to_json, frame, request_error

Bytes = npt.NDArray[np.uint8]
Keyed = tuple[int, RequestDelta]
"""A client's key of a request, and what is new of it."""

_FINISHED, _SEED, _PROMPT, _POOLED, _ERROR = 1, 2, 4, 8, 16
_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length", "abort")
_CODES: Mapping[FinishReason | None, int] = {reason: code for code, reason in enumerate(_REASONS)}
_ID, _TEXT, _LOGPROBS = 4, 8, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaArrays:
    """R deltas with S samples together, as flat arrays.

    Attributes:
        keys, flags (_FINISHED ...), cached, computed, seeds, scheduled (NaN: not yet), samples (how many): [R].
        index, counts (tokens), ends (reason, and _ID ...): [S]. token_ids: flat. stop_ids: of samples with _ID.
        logprobs: of the deltas' prompts and then of the samples, one behind the other, each of `rows_of` rows.
        pooled: flat, each of `pooled_of` numbers. texts: UTF-8 of JSON: stop strings, and errors.
    """

    keys: Int32
    flags: Bytes
    cached: Int32
    computed: Int32
    seeds: npt.NDArray[np.int64]
    scheduled: npt.NDArray[np.float64]
    samples: Int32
    index: Int32
    counts: Int32
    ends: Bytes
    token_ids: Int32
    stop_ids: Int32
    rows_of: Int32
    logprobs: LogprobRows
    pooled_of: Int32
    pooled: Float32
    texts: Bytes


_NO_ROWS = LogprobRows()


_COUNT = struct.Struct("=Q")
_TOKEN = struct.Struct("=iiiiiqd")  # key, sample, token id, cached, computed, seed, first scheduled


def deltas_frame(batch: Sequence[Keyed]) -> bytes:
    """The frame of a step's deltas, at least one. Those of one key stay in their order."""
    records, others = list[bytes](), list[Keyed]()
    for keyed in batch:
        record = _record(*keyed)
        if record is None:
            others.append(keyed)
        else:
            records.append(record)
    if others and records and len({key for key, _ in batch}) < len(batch):
        records, others = [], [*batch]
    return frame(Kind.DELTAS, b"".join((_COUNT.pack(len(records)), *records, _arrays(others) if others else b"")))


def _record(key: int, delta: RequestDelta) -> bytes | None:
    """None: there is more in it than one token."""
    _, samples, finished, prompt, cached, computed, seed, scheduled, pooled, error = delta
    if len(samples) != 1 or finished or prompt is not None or pooled is not None or error is not None:
        return None
    index, tokens, logprobs, reason, stop = samples[0]
    if len(tokens) != 1 or logprobs is not None or reason is not None or stop is not None:
        return None
    if seed is None or scheduled is None:
        return None
    return _TOKEN.pack(key, index, tokens[0], cached, computed, seed, scheduled)


def _arrays(batch: Sequence[Keyed]) -> bytes:
    keys, deltas = zip(*batch, strict=True)
    _, of_each, finished, prompts, cached, computed, seeds, scheduled, pooled, errors = zip(*deltas, strict=True)
    samples = [sample for each in of_each for sample in each]
    index, tokens, logprobs, reasons, stops = zip(*samples, strict=True) if samples else ((), (), (), (), ())
    vectors = [each for each in pooled if each is not None]
    rows = [each for each in (*prompts, *logprobs) if each is not None]
    texts = [[each for each in stops if isinstance(each, str)], [error_to_json(e) for e in errors if e is not None]]
    found = DeltaArrays(
        keys=np.array(keys, np.int32),
        flags=_flags(_FINISHED, finished, False)
        | _flags(_SEED, seeds)
        | _flags(_PROMPT, prompts)
        | _flags(_POOLED, pooled)
        | _flags(_ERROR, errors),
        cached=np.array(cached, np.int32),
        computed=np.array(computed, np.int32),
        seeds=np.array([seed or 0 for seed in seeds], np.int64),
        scheduled=np.array(scheduled, np.float64),  # None is NaN there
        samples=np.fromiter(map(len, of_each), np.int32, len(of_each)),
        index=np.array(index, np.int32),
        counts=np.fromiter(map(len, tokens), np.int32, len(tokens)),
        ends=_ends(reasons, stops) | _flags(_LOGPROBS, logprobs),
        token_ids=np.fromiter(chain.from_iterable(tokens), np.int32),
        stop_ids=np.array([each for each in stops if each is not None and not isinstance(each, str)], np.int32),
        rows_of=np.array([len(each.rows) for each in rows], np.int32),
        logprobs=join_rows(rows) or _NO_ROWS,
        pooled_of=np.array([len(each) for each in vectors], np.int32),
        pooled=np.concatenate(vectors, dtype=np.float32) if vectors else np.zeros(0, np.float32),
        texts=np.frombuffer(json.dumps(texts).encode() if any(texts) else b"", np.uint8),
    )
    return encode(found)


def _flags(flag: int, values: Sequence[object], without: object = None) -> Bytes:
    """uint8 [values]: the flag where the value is not `without`."""
    return np.array([flag if value is not without else 0 for value in values], np.uint8)


def _ends(reasons: Sequence[FinishReason | None], stops: Sequence[int | str | None]) -> Bytes:
    """uint8 [samples]: the reason's code, and whether the stop reason is an id or a text."""
    if not any(reasons) and all(stop is None for stop in stops):
        return np.zeros(len(reasons), np.uint8)
    kinds = [0 if stop is None else _TEXT if isinstance(stop, str) else _ID for stop in stops]
    return np.array([_CODES[reason] | kind for reason, kind in zip(reasons, kinds, strict=True)], np.uint8)


def read_deltas(content: bytes, ids: Mapping[int, str]) -> list[Keyed]:
    """`ids`: the request of each key. Deltas of a key that has none are left out: it was closed."""
    (count,) = _COUNT.unpack_from(content)
    end = _COUNT.size + count * _TOKEN.size
    found = list[Keyed]()
    for key, index, token, cached, computed, seed, scheduled in _TOKEN.iter_unpack(content[_COUNT.size : end]):
        name = ids.get(key)
        if name is not None:
            sample = SampleDelta(index, (token,))
            found.append((key, RequestDelta(name, (sample,), False, None, cached, computed, seed, scheduled)))
    return found + _read_arrays(content[end:], ids) if len(content) > end else found


def _read_arrays(content: bytes, ids: Mapping[int, str]) -> list[Keyed]:
    found = decode(DeltaArrays, content)
    stops, errors = json.loads(found.texts.tobytes()) if len(found.texts) else ((), ())
    prompts = int(np.count_nonzero(found.flags & _PROMPT))
    rows = iter(_cut(found.logprobs, found.rows_of))
    of_prompts = iter([next(rows) for _ in range(prompts)])
    samples = _samples(found, rows, iter(stops))
    pooled = iter(np.split(found.pooled, np.cumsum(found.pooled_of)[:-1]) if len(found.pooled_of) else ())
    failed = iter(errors)
    batch = list[Keyed]()
    columns = (found.keys, found.flags, found.cached, found.computed, found.seeds, found.scheduled, found.samples)
    at = 0
    for key, flags, cached, computed, seed, scheduled, count in zip(*(c.tolist() for c in columns), strict=True):
        delta = RequestDelta(
            ids.get(key, ""),
            tuple(samples[at : at + count]),
            bool(flags & _FINISHED),
            next(of_prompts) if flags & _PROMPT else None,
            cached,
            computed,
            seed if flags & _SEED else None,
            None if scheduled != scheduled else scheduled,
            next(pooled) if flags & _POOLED else None,
            request_error(*next(failed)) if flags & _ERROR else None,
        )
        at += count
        if key in ids:
            batch.append((key, delta))
    return batch


def _samples(found: DeltaArrays, rows: Iterator[LogprobRows], stops: Iterator[str]) -> list[SampleDelta]:
    tokens, stop_ids, at = found.token_ids.tolist(), iter(found.stop_ids.tolist()), 0
    samples = []
    for index, count, end in zip(found.index.tolist(), found.counts.tolist(), found.ends.tolist(), strict=True):
        new = tuple(tokens[at : at + count])
        at += count
        if not end:
            samples.append(SampleDelta(index, new))
            continue
        stop = next(stops) if end & _TEXT else next(stop_ids) if end & _ID else None
        samples.append(SampleDelta(index, new, next(rows) if end & _LOGPROBS else None, _REASONS[end & 3], stop))
    return samples


def _cut(rows: LogprobRows, lengths: Int32) -> Iterator[LogprobRows]:
    start = 0
    for length in lengths.tolist():
        yield rows.part(start, start + length)
        start += length
