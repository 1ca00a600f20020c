"""`LLM(...)`'s keywords become `EngineOptions`, or are refused with what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanoengine import ConfigError
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.config.engine_options import OPTIONS_NOT_SUPPORTED, engine_options


def test_keywords_are_fields() -> None:
    assert engine_options({}) == EngineOptions()
    given = engine_options({"max_num_seqs": 4, "enforce_eager": True, "step_timeout": 5})
    assert given == EngineOptions(max_num_seqs=4, enforce_eager=True, step_timeout=5.0)


def test_torchs_own_types_name_themselves() -> None:
    given = engine_options({"dtype": torch.bfloat16, "device": torch.device("cpu")})
    assert given == EngineOptions(dtype="bfloat16", device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seq": 4}, r"unknown engine option 'max_num_seq'; .*max_num_seqs"),
        ({"max_num_seqs": "many"}, "engine option max_num_seqs"),
        ({"max_num_seqs": True}, "engine option max_num_seqs"),
        ({"dtype": torch.int8}, "engine option dtype.*'torch.int8'$|engine option dtype.*'int8'$"),
        ({"dtype": "half"}, "'half'; did you mean 'float16'"),
        ({"dtype": "float"}, "'float'; did you mean 'float32'"),
        ({"dtype": "FP16"}, "'FP16'; did you mean 'float16'"),
        ({"dtype": "bf16"}, "'bf16'; did you mean 'bfloat16'"),
        (
            {"kernels": {"attention_code": False}},
            "engine.kernels: no kernel is called .*did you mean 'attention_codes'",
        ),
        ({"kernels": {"attention_codes": "no"}}, "engine option kernels must be"),
        ({"max_num_seqs": 2**40}, "engine.max_num_seqs must be at most 65,536, not 1,099,511,627,776"),
        ({"max_num_batched_tokens": 2**31}, "engine.max_num_batched_tokens must be at most 4,194,304"),
        ({"num_gpu_blocks_override": 2**60}, "engine.num_gpu_blocks_override must be at most"),
        ({"kv_cache_memory": 2**60}, "engine.kv_cache_memory must be at most"),
        ({"spare_slots": 2**31}, "engine.spare_slots must be at most"),
        ({"spare_slots": -1}, "engine.spare_slots must be 0 or more"),
        ({"block_size": 2**31}, "engine.block_size must be at most"),
        ({"seed": 2**63}, "engine.seed must be at most"),
        ({"max_n": 0}, "engine.max_n must be at least 1"),
        ({"max_logprobs": -2}, "engine.max_logprobs must be at least -1"),
        ({"step_timeout": float("inf")}, "engine.step_timeout is in seconds"),
        ({"step_timeout": float("nan")}, "engine.step_timeout is in seconds"),
        ({"device": "\ud800"}, "engine option device must be a string.*surrogate"),
        ({"max_num_seqs": 0}, "engine.max_num_seqs must be at least 1, not 0"),
    ],
)
def test_what_is_no_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_options(options)


@pytest.mark.parametrize("name", sorted(OPTIONS_NOT_SUPPORTED))
def test_options_of_vllms_are_refused_with_what_to_do_instead(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_options({name: 1})
    assert str(caught.value) == f"engine option {name!r}: {OPTIONS_NOT_SUPPORTED[name]}"
