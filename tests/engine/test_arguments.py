"""What callers hand over: what counts as one prompt, as token ids, as one each; and what the refusals say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from nanoengine import ParamsError, RequestError, SamplingParams
from nanoengine.params.arguments import (
    GivenPrompt,
    check_priority,
    checked_ids,
    is_one,
    one_each,
    one_name,
    split_prompt,
)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("text", True),
        ({"prompt": "text"}, True),
        ([1, 2], True),
        (np.array([1, 2]), True),
        ([], False),
        (["text"], False),
        ([[1, 2]], False),
        ([1, "text"], False),
        (range(2 * 10**9), True),  # without a look at each
        (np.array([[1, 2]]), False),
    ],
)
def test_one_prompt_or_several(prompts: Any, expected: bool) -> None:
    assert is_one(prompts) is expected


@pytest.mark.parametrize("prompts", [3, None, {1, 2}])
def test_what_is_neither(prompts: Any) -> None:
    with pytest.raises(ParamsError, match="prompts must be text, token ids, a dict, or a list of those"):
        is_one(prompts)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", ("text", None)),
        ([1, 2], ([1, 2], None)),
        ({"prompt": "text"}, ("text", None)),
        ({"prompt_token_ids": [1]}, ([1], None)),
        ({"prompt": "text", "prompt_token_ids": [1]}, ([1], "text")),
        ({"prompt": "text", "generated_token_ids": [4]}, ("text", None, [4])),
        ({"prompt": "text", "prompt_token_ids": [1], "generated_token_ids": [[4], []]}, ([1], "text", [[4], []])),
        ({"prompt": "text", "generated_token_ids": None}, ("text", None, ())),
        ({"promt": "text"}, ({"promt": "text"}, None)),  # for the engine to refuse
        ({"generated_token_ids": [4]}, ({"generated_token_ids": [4]}, None)),
        ({}, ({}, None)),
    ],
)
def test_ids_and_text_of_a_prompt(prompt: Any, expected: Any) -> None:
    assert split_prompt(prompt) == GivenPrompt(*expected)


@pytest.mark.parametrize("given", [[3, 1, 9], (3, 1, 9), np.array([3, 1, 9]), torch.tensor([3, 1, 9]), iter([3, 1, 9])])
def test_token_ids_become_plain_ints(given: Any) -> None:
    ids = checked_ids(given, 10, 8)
    assert ids == (3, 1, 9)
    assert {type(token) for token in ids} == {int}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "the prompt is empty: at least one token is needed"),
        (5, "not int"),
        (b"\1\2", "not bytes"),
        ({"promt": "text"}, r"not a dict with \['promt'\]"),
        ({"role": "user", "content": "hi"}, r"not a dict with \['role', 'content'\]; messages go to chat$"),
        ([1, 2.0], r"prompt\[1\] is 2.0, not a token id"),
        ([True], r"prompt\[0\] is True, not a token id"),
        ([1, -1], r"prompt\[1\] is -1, outside the vocabulary 0..9"),
        (np.array([10]), r"prompt\[0\] is 10, outside the vocabulary 0..9"),
    ],
)
def test_what_is_no_prompt(given: Any, said: str) -> None:
    error = checked_ids(given, 10, 8)
    assert isinstance(error, RequestError)
    assert error.code == "invalid_prompt"
    with pytest.raises(RequestError, match=said):
        raise error


class Counted(list[int]):
    """Counts what is read of it."""

    read = 0

    def __iter__(self) -> Iterator[int]:
        for each in super().__iter__():
            self.read += 1
            yield each


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Counted([1] * 8), "the prompt has 8 tokens and max_model_len is 8"),
        (range(2 * 10**9), "the prompt has 2000000000 tokens"),
        (np.ones(900, np.int64), "the prompt has 900 tokens"),
        (itertools.repeat(1), "the prompt has at least 8 tokens"),
    ],
)
def test_a_prompt_that_is_too_long_is_not_read_to_its_end(given: Any, said: str) -> None:
    error = checked_ids(given, 10, 8)
    assert isinstance(error, RequestError)
    assert error.code == "too_long"
    assert said in str(error)
    assert getattr(given, "read", 0) == 0


def test_a_refusal_is_passed_on() -> None:
    refused = RequestError("invalid_prompt", "no messages")
    assert checked_ids(refused, 10, 8) is refused


def test_one_for_all_or_one_each() -> None:
    params = SamplingParams()
    assert one_each(params, 2, "params") == [params, params]
    assert one_each((1, 2), 2, "priority") == [1, 2]
    with pytest.raises(ParamsError, match="priority has 3 entries for 2 prompts"):
        one_each([1, 2, 3], 2, "priority")


def test_two_names_for_one_thing() -> None:
    params = SamplingParams()
    assert one_name(None, params) is one_name(params, None) is params
    with pytest.raises(ParamsError, match="two names for one thing"):
        one_name(params, params)


@pytest.mark.parametrize("priority", [True, 1.5, "1"])
def test_priorities_are_whole_numbers(priority: Any) -> None:
    check_priority(None)
    check_priority(np.int64(-3))
    with pytest.raises(ParamsError, match="priority must be a whole number"):
        check_priority(priority)


class Exits:
    def __index__(self) -> int:
        raise SystemExit


def test_a_priority_that_exits_is_refused() -> None:
    with pytest.raises(ParamsError, match="reading the priority raised SystemExit"):
        check_priority(Exits())
