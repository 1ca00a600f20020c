"""`LLM(...)`'s keywords become `EngineOptions`, or are refused with what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanoengine import ConfigError
from nanoengine.core.setup.options import OPTIONS_NOT_SERVED, EngineOptions, engine_options


def test_keywords_are_fields() -> None:
    assert engine_options({}) == EngineOptions()
    given = engine_options({"max_num_seqs": 4, "enforce_eager": True, "step_timeout": 5})
    assert given == EngineOptions(max_num_seqs=4, enforce_eager=True, step_timeout=5.0)


def test_torchs_own_types_name_themselves() -> None:
    given = engine_options({"dtype": torch.bfloat16, "device": torch.device("cpu")})
    assert given == EngineOptions(dtype="bfloat16", device="cpu")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_num_seq": 4}, r"unknown engine option 'max_num_seq'; .*max_num_seqs"),
        ({"max_num_seqs": "many"}, "engine option max_num_seqs"),
        ({"max_num_seqs": True}, "engine option max_num_seqs"),
        ({"dtype": torch.int8}, "engine option dtype.*'torch.int8'$|engine option dtype.*'int8'$"),
        ({"dtype": "half"}, "'half'; did you mean 'float16'"),
        ({"dtype": "float"}, "'float'; did you mean 'float32'"),
        ({"dtype": "FP16"}, "'FP16'; did you mean 'float16'"),
        ({"dtype": "bf16"}, "'bf16'; did you mean 'bfloat16'"),
        ({"max_num_seqs": 0}, "engine.max_num_seqs must be at least 1, not 0"),
    ],
)
def test_what_is_no_option_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        engine_options(options)


@pytest.mark.parametrize("name", sorted(OPTIONS_NOT_SERVED))
def test_options_of_vllms_are_refused_with_what_to_do_instead(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_options({name: 1})
    assert str(caught.value) == f"engine option {name!r}: {OPTIONS_NOT_SERVED[name]}"
