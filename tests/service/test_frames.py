"""Frames between a client and an engine in another process carry all of a request and of a delta, and nothing wrong."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import asdict
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoengine import SamplingParams
from nanoengine.api.deltas import RequestDelta, SampleDelta
from nanoengine.api.errors import EngineUnavailable, GrammarError, ParamsError, RequestError
from nanoengine.api.structured_outputs import StructuredOutputsParams
from nanoengine.params.pooling import PoolingDefaults
from nanoengine.service.client import ClientRequest, EngineInfo, Usage
from nanoengine.service.delta_frames import deltas_frame, read_deltas
from nanoengine.service.frames import (
    FrameReader,
    Kind,
    ProtocolError,
    add_frame,
    error_from_json,
    error_to_json,
    frame,
    info_from_json,
    info_to_json,
    json_frame,
    read_abort,
    read_add,
    read_ask,
    read_json,
    read_usage,
    usage_frame,
)
from nanoengine.service.known_params import KnownParams
from tests.service.test_client import plain, requests_deltas


def content(data: bytes) -> bytes:
    ((_, found),) = FrameReader().feed(data)
    return found


@given(st.lists(requests_deltas(), min_size=1, max_size=4), st.sets(st.integers(0, 3)))
def test_all_of_a_delta_goes_through_a_frame(requests: list[list[RequestDelta]], closed: set[int]) -> None:
    batch = [(key, delta._replace(request_id=f"r{key}")) for key, each in enumerate(requests) for delta in each]
    ids = {key: f"r{key}" for key in range(len(requests)) if key not in closed}
    found = read_deltas(content(deltas_frame(batch)), ids)
    found.sort(key=itemgetter(0))  # those of one key stay in their order
    assert [key for key, _ in found] == [key for key, _ in batch if key in ids]
    for (_, got), (_, sent) in zip(found, [each for each in batch if each[0] in ids], strict=True):
        assert repr(plain(got)) == repr(plain(sent))  # errors have no equality


def test_deltas_of_one_token_are_records_beside_others_and_in_their_order() -> None:
    def one(key: int, token: int, **more: Any) -> tuple[int, RequestDelta]:
        sample = SampleDelta(1, (token,), **more)
        return key, RequestDelta(f"r{key}", (sample,), False, None, 3, 4, -(2**63), 1.5)

    records, other = [one(0, 2**31 - 1), one(2, 5)], one(1, 7, finish_reason="stop")
    ids = {key: f"r{key}" for key in range(3)}
    alone, beside = deltas_frame(records), deltas_frame([records[0], other, records[1]])
    assert read_deltas(content(alone), ids) == records
    assert read_deltas(content(alone), {2: "r2"}) == records[1:]
    assert read_deltas(content(beside), ids) == [*records, other]
    assert beside[16 : len(alone)] == alone[16:]  # behind kind, length and count
    assert len(beside) > len(alone)
    twice = [one(0, 1), one(0, 2, finish_reason="stop")]
    assert read_deltas(content(deltas_frame(twice)), ids) == twice
    same = [one(0, 1), one(0, 2)]
    assert read_deltas(content(deltas_frame(same)), ids) == same


@pytest.mark.parametrize("reason", [None, "stop", "length", "abort"])
@pytest.mark.parametrize("stop", [None, 0, 7, "kv_cache_full", "é\n"])
def test_every_end_of_a_sample_goes_through_a_frame(reason: Any, stop: Any) -> None:
    delta = RequestDelta("r", (SampleDelta(3, (1, 2), None, reason, stop), SampleDelta(0)), seed=-(2**63))
    assert read_deltas(content(deltas_frame([(9, delta)])), {9: "r"}) == [(9, delta)]


@pytest.mark.parametrize(
    "error",
    [
        RequestError("overloaded", "full é", 2.5),
        EngineUnavailable("gone", 1.0),
        GrammarError("bad"),
        ParamsError("top_p"),
    ],
)
def test_errors_keep_their_class_code_and_time(error: Any) -> None:
    found: Any = error_from_json(json.loads(json.dumps(error_to_json(error))))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert getattr(found, "code", None) == getattr(error, "code", None)
    assert getattr(found, "retry_after", None) == getattr(error, "retry_after", None)


_VALUES = [
    None,
    True,
    3,
    0.1,
    float("inf"),
    "é",
    [1, [2]],
    (1, "a"),
    {"a": {"b": 1}},
    {5: -1.5, 7: 2.0},
    {"$tuple": [1]},
    {1, 2},
    StructuredOutputsParams(json={"type": "object", "properties": {"$ref": {"type": "string"}}}),
    StructuredOutputsParams(choice=["a", "b"], reasoning=3),
]


@pytest.mark.parametrize("value", _VALUES, ids=str)
def test_values_of_parameters_are_the_same_on_the_other_side(value: Any) -> None:
    params = SamplingParams(n=2, stop=["x"], max_tokens=None, logprobs=-1, some_field=value)
    given_request = ClientRequest(
        request_id="é",
        prompt_token_ids=(1, 2, 3),
        params=params,
        priority=-5,
        generated=((4,), ()),
        every=32,
        client="ann",
        timeout=1.5,
        progress=True,
        pooling="mean",
    )
    added = read_add(content(add_frame(7, given_request, resumed=True)))
    assert (added.key, added.resumed, added.wrong) == (7, True, None)
    assert added.request == given_request


def test_parameters_that_come_again_are_the_same_object() -> None:
    known = KnownParams()
    asked = [
        ClientRequest(request_id="r", prompt_token_ids=(1,), params=SamplingParams(max_tokens=n, bad_words=["x"]))
        for n in (5, 5, 6)
    ]
    found = [read_add(content(add_frame(0, each)), known.of).request for each in asked]
    assert found == asked
    one, again = (each.params for each in found[:2] if each is not None)
    assert one is again
    long = {"temperature": 0.5, "stop": ["y" * 2000]}  # is not kept
    assert known.of(json.dumps(long).encode()) is not known.of(json.dumps(long).encode())
    for n in range(2000):
        known.of(b'{"max_tokens":%d}' % (n + 1))
    assert len(known._known) <= 256
    with pytest.raises(ParamsError):
        known.of(b'{"n":0}')


def test_numbers_of_numpy_are_numbers_and_other_objects_are_refused_by_name() -> None:
    asked = ClientRequest(request_id="r", prompt_token_ids=(1,), params=SamplingParams(top_p=np.float32(0.5)))
    added = read_add(content(add_frame(0, asked)))
    assert added.request is not None
    assert added.request.params.top_p == 0.5
    wrong = ClientRequest(request_id="r", prompt_token_ids=(1,), params=SamplingParams(hook=len))
    with pytest.raises(ParamsError, match="hook"):
        add_frame(0, wrong)
    with pytest.raises(RequestError, match="token ids"):
        add_frame(0, ClientRequest(request_id="r", prompt_token_ids=(2**40,), params=SamplingParams()))


def test_info_and_usage_are_the_same_on_the_other_side() -> None:
    info = EngineInfo(
        model="m",
        tokenizer="/t",
        vocab_size=5,
        max_model_len=9,
        sampling_names=frozenset({"a", "b"}),
        default_sampling={"temperature": 0.5, "logit_bias": {3: 1.0}, "stop": ["x"]},
        default_unsupported=("line",),
        end_ids=frozenset({1}),
        pooling=PoolingDefaults(size=4, pooling="mean", dimensions=(2, 4)),
    )
    assert info_from_json(json.loads(json.dumps(info_to_json(info)))) == info
    usage = Usage(client="ann", endpoint="/v1", prompt_tokens=3, finish_reasons=("stop",), ttft=0.25)
    assert read_usage(read_json(content(usage_frame(usage)))) == usage


@given(st.lists(st.binary(max_size=50), max_size=5), st.data())
def test_frames_arrive_whole_however_the_bytes_are_cut(contents: list[bytes], data: Any) -> None:
    sent, reader, found = b"".join(frame(Kind.BEAT, each) for each in contents), FrameReader(), []
    while sent:
        size = data.draw(st.integers(1, len(sent)))
        found += [each for _, each in reader.feed(sent[:size])]
        sent = sent[size:]
    assert found == contents


def request_head(**changes: Any) -> bytes:
    given_request = ClientRequest(request_id="r", prompt_token_ids=(1, 2), params=SamplingParams())
    data = content(add_frame(0, given_request))
    size, more = struct.unpack_from("=II", data)
    params = changes.pop("params", {})
    head = json.loads(data[8 : 8 + size]) | changes
    encoded = json.dumps({key: value for key, value in head.items() if value != "missing"}).encode()
    inner = json.dumps(params).encode()
    return struct.pack("=II", len(encoded), len(inner)) + encoded + inner + data[8 + size + more :]


@pytest.mark.parametrize(
    "changes",
    [
        {"key": -1}, {"key": True}, {"key": 2**40}, {"id": 3}, {"params": []}, {"priority": "high"}, {"every": 1.5},
        {"every": True}, {"client": None}, {"timeout": "1"}, {"progress": 1}, {"pooling": 1}, {"lengths": []},
        {"lengths": [3]},
        {"lengths": [-1, 3]}, {"lengths": [True, 1]}, {"resumed": None}, {"id": "missing"}, {"lengths": "missing"},
    ],
    ids=str,
)  # fmt: skip
def test_a_request_that_no_client_of_ours_sends_ends_its_connection(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        read_add(request_head(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"params": {"n": 0}}, {"params": {"temperature": {"$set": 3}}}, {"params": {"x": {"$items": [1]}}},
        {"params": {"structured_outputs": {"$structured_outputs": {"jsno": 1}}}}, {"timeout": -1},
        {"timeout": float("nan")}, {"timeout": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_a_request_with_a_wrong_value_is_refused_alone(changes: dict[str, Any]) -> None:
    assert isinstance(read_add(request_head(**changes)).wrong, ParamsError)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        struct.pack("=II", 90, 0) + b"{}",
        struct.pack("=II", 2, 0) + b"[]",
        struct.pack("=II", 2, 0) + b"{}abc",
    ],
)
def test_content_that_is_no_request_ends_its_connection(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_add(data)


@pytest.mark.parametrize("data", [struct.pack("=II", 99, 0), struct.pack("=II", 1, 2**31), b"\xff" * 8])
def test_bytes_that_are_no_frame_end_their_connection(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(FrameReader().feed(data))


@pytest.mark.parametrize("data", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_content_that_is_no_json_object_ends_its_connection(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_json(data)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.sampled_from([10**400, -(10**400)]) | st.floats()
    | st.text(max_size=4) | st.sampled_from(["$set", "$items", "$tuple", "$structured_outputs", "stats", "trace"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=3) | st.sampled_from(["$set", "$items", "$tuple", "$structured_outputs", "json", "n", "seed"]),
        inner, max_size=3,
    ),
    max_leaves=6,
)  # fmt: skip
_FIELDS = ["key", "id", "params", "priority", "pooling", "every", "client", "timeout", "progress", "lengths", "resumed"]


@given(
    st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=2),
    st.dictionaries(st.text(max_size=5), _JSON, max_size=2),
)
def test_whatever_json_a_client_sends_is_a_request_or_an_error_of_ours(changes: Any, params: Any) -> None:
    for head in (changes, {"params": params}):
        try:
            added = read_add(request_head(**head))
        except ProtocolError:
            continue
        assert (added.request is None) == isinstance(added.wrong, ParamsError)


@given(st.dictionaries(st.sampled_from(["id", "what", "of", "key", "sample", "status", "ttft", "client"]), _JSON))
def test_whatever_json_a_client_asks_counts_and_aborts_is_checked(found: Any) -> None:
    for read in (read_ask, read_abort, lambda changes: read_usage(asdict(Usage()) | changes)):
        with contextlib.suppress(ProtocolError):
            read(found)


def test_values_that_are_nested_too_deep_are_refused_with_their_request() -> None:
    deep: Any = 1
    for _ in range(400):
        deep = {"a": [deep]}
    assert isinstance(read_add(request_head(params={"x": deep})).wrong, ParamsError)


@pytest.mark.parametrize(
    "changes", [{"prompt_tokens": -1}, {"status": "200"}, {"client": 1}, {"ttft": "x"}, {"finish_reasons": 3}, {"x": 1}]
)
def test_a_usage_that_cannot_be_counted_ends_its_connection(changes: dict[str, Any]) -> None:
    found = read_json(content(usage_frame(Usage()))) | changes
    with pytest.raises(ProtocolError):
        read_usage(found)


def test_no_frame_is_larger_than_the_limit() -> None:
    assert json_frame(Kind.BEAT, draining=True)[:8] == struct.pack("=II", Kind.BEAT, 17)
