"""What a type checker knows of a user's program: `mypy` checks this file. Each ignored error must be one."""

from __future__ import annotations

from typing import assert_type

import torch

from nanoengine import LLM, AsyncLLM, RequestOutput, SamplingParams, StructuredOutputsParams


def parameters() -> None:
    params = SamplingParams(temperature=0, top_p=0.9, stop=("a", "b"), allowed_token_ids=range(4), logit_bias={5: 1.0})
    assert_type(params, SamplingParams)
    assert_type(params.max_tokens, int | None)
    assert_type(params.replace(seed=7, min_p=0.1), SamplingParams)
    SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    SamplingParams(structured_outputs={"json": {}}, parameter_of_a_plugin=1)
    SamplingParams(max_tokens="many")  # type: ignore[arg-type]
    SamplingParams(0.5)  # type: ignore[call-arg, arg-type]
    params.replace(top_k=0.5)  # type: ignore[arg-type]


def engines() -> None:
    llm = LLM("m", max_model_len=512, dtype=torch.float32, device=torch.device("cpu"), plugins=["p.py"])
    assert_type(llm.generate("Hi", SamplingParams(n=2)), list[RequestOutput])
    LLM("m", speculation="ngram", structured_outputs={"timeout": 5}, policy_options={"weights": {"a": 2}})
    LLM("m", max_num_sequences=3)  # type: ignore[call-arg]
    LLM("m", dtype="float")  # type: ignore[arg-type]
    AsyncLLM("m", process=True, block_size=32)
    AsyncLLM("m", process="yes")  # type: ignore[arg-type]
    assert_type(LLM.from_config("c.yaml", ["engine.seed=3"]), LLM)
