"""Which parameters an engine takes to be the same, without checking them again."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from nanoengine import SamplingParams


def test_equal_parameters_have_equal_keys() -> None:
    given = {"temperature": 0.6, "max_tokens": 9, "stop": ["a"], "logit_bias": {3: 1.5}}
    params = SamplingParams(**given)
    assert params.key == SamplingParams(**given).key == pickle.loads(pickle.dumps(params)).key
    assert params.key is params.key
    assert params.replace(max_tokens=9).key == params.key
    hash(params.key)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 8}, {"temperature": 1}, {"temperature": 1.0}, {"stop": ["b"]}, {"stop": None}, {"top_k": True},
        {"top_k": 1}, {"logit_bias": {3: 1.0}}, {"logit_bias": np.array([1.0])}, {"seed": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_change_of_value_or_type_changes_the_key(change: dict[str, object]) -> None:
    params = SamplingParams(temperature=True, max_tokens=9, stop=["a"], top_k=1.0, logit_bias={3: 1})
    assert params.replace(**change).key != params.key
