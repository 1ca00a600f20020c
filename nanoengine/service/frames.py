"""What a client and an engine in another process send each other: frames, without pickle.

A frame is two numbers (its kind, its length in bytes) and its content: JSON, or flat arrays behind it. Frames come in
order. Deltas, which go out with every step, are arrays of numbers alone. What comes from a client is checked here as a
user's input is; what comes from the engine is trusted.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np

from nanoengine.api.errors import (
    EngineUnavailable,
    GrammarError,
    NanoEngineError,
    ParamsError,
    RequestError,
    described,
    is_failure,
    shown,
)
from nanoengine.api.structured_outputs import StructuredOutputsParams
from nanoengine.params.pooling import PoolingDefaults
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.service.client import ClientRequest, EngineInfo, ServiceStats, Usage

_HEAD = struct.Struct("=II")
_SIZES = struct.Struct("=II")  # of a request's two parts of JSON
_LONGEST = 1e9  # seconds
MOST_BYTES = 256 << 20  # of a frame
_READ = 1 << 18


class Kind(IntEnum):
    """The kind of a frame. A key is the number of a request among those of its connection."""

    # from the client
    ADD = 1  # JSON of a request, JSON of its parameters, and its token ids
    ABORT = 2  # JSON: key, and a sample or null
    COUNT = 3  # JSON of a usage
    ASK = 4  # JSON: id, what, arguments
    # from the engine
    HELLO = 10  # JSON of the engine's info: the first frame
    DELTAS = 11  # arrays: see `delta_frames.py`
    TAKEN = 12  # JSON: key, and an error or null
    ANSWER = 13  # JSON: id, and a value or an error
    BEAT = 14  # JSON: whether it is draining
    ENDED = 15  # JSON: why the engine has ended


class ProtocolError(NanoEngineError):
    """The other end sent something that is no frame."""


def frame(kind: Kind, content: bytes) -> bytes:
    return _HEAD.pack(kind, len(content)) + content


def sent(sock: socket.socket, data: bytes | bytearray | memoryview) -> int:
    """How many bytes of it the socket took: 0 while it is full. Raises `OSError`."""
    try:
        return sock.send(data)
    except (BlockingIOError, InterruptedError):
        return 0


def json_frame(kind: Kind, **values: Any) -> bytes:
    return frame(kind, json.dumps(values, separators=(",", ":")).encode())


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._room = memoryview(bytearray(_READ))  # `recv` would allocate so much each time, for frames of some bytes

    def receive(self, sock: socket.socket) -> bytes:
        """What has come; b"" at the end of the stream. Raises `OSError`."""
        return bytes(self._room[: sock.recv_into(self._room)])

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """The frames that are complete now. Raises `ProtocolError`."""
        self._data += data
        at = 0
        while len(self._data) - at >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._data, at)
            if length > MOST_BYTES:
                raise ProtocolError(f"a frame of {length} bytes; the most is {MOST_BYTES}")
            if kind not in _KINDS:
                raise ProtocolError(f"a frame of kind {kind}")
            end = at + _HEAD.size + length
            if len(self._data) < end:
                break
            yield Kind(kind), bytes(memoryview(self._data)[at + _HEAD.size : end])
            at = end
        del self._data[:at]


_KINDS = frozenset(Kind)


def read_json(content: bytes) -> dict[str, Any]:
    """Raises `ProtocolError` where it is no JSON object."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame that is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ProtocolError("a frame that is no JSON object")
    return found


# Values of sampling parameters


def to_json(name: str, value: Any) -> Any:
    """A value of a sampling parameter as JSON that `from_json` reads. Raises `ParamsError` where it has none."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: to_json(name, each) for key, each in value.items()}
        return {"$items": [[to_json(name, key), to_json(name, each)] for key, each in value.items()]}
    if isinstance(value, list):
        return [to_json(name, each) for each in value]
    if isinstance(value, tuple | set | frozenset):
        kind = "$tuple" if isinstance(value, tuple) else "$set"
        return {kind: [to_json(name, each) for each in value]}
    if type(value) is StructuredOutputsParams:
        given = {f.name: getattr(value, f.name) for f in fields(value)}
        return {"$structured_outputs": {key: to_json(name, each) for key, each in given.items()}}
    raise ParamsError(f"{name}: {shown(value)} cannot be sent to an engine in another process")


def from_json(value: Any) -> Any:
    """What `to_json` was given. Raises `ParamsError`."""
    if isinstance(value, list):
        return [from_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    inner: Any
    tag, inner = next(iter(value.items()), ("", None)) if len(value) < 2 else ("", None)
    try:
        if tag == "$items":
            return {from_json(key): from_json(each) for key, each in inner}
        if tag == "$tuple":
            return tuple(map(from_json, inner))
        if tag == "$set":
            return set(map(from_json, inner))
        if tag == "$structured_outputs":
            return StructuredOutputsParams(**{key: from_json(each) for key, each in inner.items()})
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ParamsError):
            raise
        raise ParamsError(f"{shown(value)} is no value of a parameter: {error}") from error
    return {key: from_json(each) for key, each in value.items()}


def params_to_json(params: SamplingParams) -> bytes:
    """Raises `ParamsError`."""
    found = {name: to_json(name, value) for name, value in params.given_fields().items()}
    return json.dumps(found, separators=(",", ":")).encode()


def params_from_json(data: bytes) -> SamplingParams:
    """What `params_to_json` was given. Raises `ProtocolError` where it is no JSON object, else what wrong values
    raise."""
    return SamplingParams(**{name: from_json(value) for name, value in read_json(data).items()})


# Requests


def add_frame(key: int, request: ClientRequest, *, resumed: bool = False) -> bytes:
    """Raises `ParamsError` for a parameter that cannot be sent."""
    ids, params = [request.prompt_token_ids, *request.generated], params_to_json(request.params)
    head = json.dumps(
        {
            "key": key,
            "id": request.request_id,
            "priority": request.priority,
            "pooling": request.pooling,
            "every": request.every,
            "client": request.client,
            "timeout": request.timeout,
            "progress": request.progress,
            "lengths": [len(each) for each in ids],
            "resumed": resumed,
        },
        separators=(",", ":"),
    ).encode()
    try:
        tokens = np.fromiter(chain.from_iterable(ids), np.int32)
    except (OverflowError, TypeError, ValueError) as error:
        raise RequestError("invalid_prompt", f"a prompt is made of token ids: {error}") from error
    return frame(Kind.ADD, b"".join((_SIZES.pack(len(head), len(params)), head, params, tokens.tobytes())))


@dataclass(frozen=True, slots=True)
class Added:
    """A request from a client. wrong: why it is refused already."""

    key: int
    request: ClientRequest | None
    resumed: bool = False
    wrong: NanoEngineError | None = None


_TYPES: Mapping[str, tuple[type, ...]] = {
    "id": (str,),
    "priority": (int, type(None)),
    "pooling": (str, type(None)),
    "every": (int,),
    "client": (str,),
    "timeout": (int, float, type(None)),
    "progress": (bool,),
    "lengths": (list,),
    "resumed": (bool,),
}


def read_add(content: bytes, params_of: Callable[[bytes], SamplingParams] = params_from_json) -> Added:
    """`params_of`: as `params_from_json`. Raises `ProtocolError` where it is no request at all."""
    try:
        size, more = _SIZES.unpack_from(content)
        middle, end = _SIZES.size + size, _SIZES.size + size + more
        head = read_json(content[_SIZES.size : middle])
        tokens = np.frombuffer(content, np.int32, offset=end) if len(content) > end else np.zeros(0, np.int32)
    except (struct.error, ValueError) as error:
        raise ProtocolError(f"a frame that is no request: {error}") from error
    key = read_key(head)
    for name, kinds in _TYPES.items():
        value = head.get(name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ProtocolError(f"a request whose {name} is {shown(value)}")
    lengths = head["lengths"]
    if not lengths or any(type(n) is not int or n < 0 for n in lengths) or sum(lengths) != len(tokens):
        raise ProtocolError(f"a request with {len(tokens)} token ids, of lengths {shown(lengths)}")
    timeout = head["timeout"]
    if timeout is not None and not 0 < timeout < _LONGEST:
        return Added(key, None, wrong=ParamsError(f"timeout must be a number of seconds above 0, not {shown(timeout)}"))
    every = tokens.tolist()
    ends = [0, *accumulate(lengths)]
    parts = [tuple(every[start:end]) for start, end in pairwise(ends)]
    try:
        params = params_of(content[middle:end])
    except BaseException as error:  # values nested too deep, for example
        if isinstance(error, ProtocolError) or not is_failure(error):
            raise
        wrong = error if isinstance(error, ParamsError) else ParamsError(f"parameters that raised {described(error)}")
        return Added(key, None, wrong=wrong)
    request = ClientRequest(
        request_id=head["id"],
        prompt_token_ids=parts[0],
        params=params,
        priority=head["priority"],
        pooling=head["pooling"],
        generated=tuple(parts[1:]),
        every=head["every"],
        client=head["client"],
        timeout=timeout,
        progress=head["progress"],
    )
    return Added(key, request, head["resumed"])


def read_key(found: Mapping[str, Any]) -> int:
    """Raises `ProtocolError`."""
    key = found.get("key")
    if type(key) is not int or not 0 <= key < 2**31:
        raise ProtocolError(f"a key that is {shown(key)}")
    return key


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client wants to know. of: a number of seconds, or a request's id."""

    number: int
    what: str
    of: Any


_ASKED: Mapping[str, tuple[type, ...]] = {
    "stats": (type(None),),
    "metrics": (type(None),),
    "abort": (str,),
    "trace": (int, float),
    "drain": (int, float),
}


def read_ask(found: Mapping[str, Any]) -> Asked:
    """Raises `ProtocolError`."""
    number, what, of = found.get("id"), found.get("what"), found.get("of")
    kinds = _ASKED.get(what) if isinstance(what, str) else None
    if type(number) is not int or kinds is None or not isinstance(of, kinds) or isinstance(of, bool):
        raise ProtocolError(f"a question that is {shown(found)}")
    if isinstance(of, int | float):
        of = float(max(-1, min(of, _LONGEST)))
    return Asked(number, str(what), of)


def read_abort(found: Mapping[str, Any]) -> tuple[int, int | None]:
    """Key and sample. Raises `ProtocolError`."""
    sample = found.get("sample")
    if sample is not None and type(sample) is not int:
        raise ProtocolError(f"a sample that is {shown(sample)}")
    return read_key(found), sample


def read_usage(found: Mapping[str, Any]) -> Usage:
    """Raises `ProtocolError`."""
    try:
        usage = Usage(**{**found, "finish_reasons": tuple(map(str, found["finish_reasons"]))})
        counts = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, usage.status)
        texts = (usage.client, usage.endpoint)
        times = [time for time in (usage.ttft, usage.duration) if time is not None]
        right = (
            all(type(n) is int and 0 <= n < 2**53 for n in counts)
            and all(isinstance(text, str) for text in texts)
            and all(isinstance(time, int | float) and 0 <= time < _LONGEST for time in times)
        )
    except (TypeError, KeyError) as error:
        raise ProtocolError(f"a usage that is {shown(found)}") from error
    if not right:
        raise ProtocolError(f"a usage that is {shown(found)}")
    return usage


def usage_frame(usage: Usage) -> bytes:
    return json_frame(Kind.COUNT, **asdict(usage))


# Errors, infos, stats


def error_to_json(error: BaseException | None) -> Any:
    if error is None:
        return None
    code = error.code if isinstance(error, RequestError) else "params" if isinstance(error, ParamsError) else None
    return [code, str(error), getattr(error, "retry_after", None)]


def error_from_json(found: Any) -> NanoEngineError | None:
    if found is None:
        return None
    code, message, retry_after = found
    if code is None:
        return NanoEngineError(message)
    if code == "params":
        return ParamsError(message)
    return request_error(code, message, retry_after)


def request_error(code: str, message: str, retry_after: float | None = None) -> RequestError:
    if code == "unavailable":
        return EngineUnavailable(message, retry_after)
    return GrammarError(message) if code == "invalid_grammar" else RequestError(code, message, retry_after)


def info_to_json(info: EngineInfo) -> dict[str, Any]:
    found = {f.name: getattr(info, f.name) for f in fields(info)}
    sampling = {name: to_json(name, value) for name, value in info.default_sampling.items()}
    names, ends, pooling = sorted(info.sampling_names), sorted(info.end_ids), info.pooling and asdict(info.pooling)
    return {**found, "sampling_names": names, "end_ids": ends, "default_sampling": sampling, "pooling": pooling}


def info_from_json(found: Mapping[str, Any]) -> EngineInfo:
    sampling = {name: from_json(value) for name, value in found["default_sampling"].items()}
    sets = {name: frozenset(found[name]) for name in ("sampling_names", "end_ids")}
    tuples = {"default_unsupported": tuple(found["default_unsupported"]), "pooling": _pooling(found["pooling"])}
    return EngineInfo(**{**found, **sets, **tuples, "default_sampling": sampling})


def _pooling(found: Mapping[str, Any] | None) -> PoolingDefaults | None:
    if found is None:
        return None
    dimensions = found["dimensions"]
    return PoolingDefaults(**{**found, "dimensions": None if dimensions is None else tuple(dimensions)})


def stats_from_json(found: Mapping[str, Any]) -> ServiceStats:
    return ServiceStats(**found)
