"""Keywords of `LLM` become `EngineOptions`; unknown ones are refused with what to use instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_type_hints

from nanoengine.api.errors import ConfigError, ParamsError, nearest
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.field_types import conform

OPTIONS_NOT_SUPPORTED: Mapping[str, str] = {
    "pipeline_parallel_size": "layers are shared over devices, not stacked: use tensor_parallel_size",
    "trust_remote_code": "code from model folders is never run; a model is a plugin (docs/plugin-api.md)",
    "tokenizer": "the tokenizer is the model folder's own",
    "enable_chunked_prefill": "prompts are always chunked under max_num_batched_tokens",
    "enable_lora": "adapters are not supported yet",
    "speculative_config": "write speculation={'method': 'ngram', 'tokens': 4}: see docs/speculation.md",
    "structured_outputs_config": "give structured_outputs={'backend': ...}",
    "guided_decoding_backend": "give structured_outputs={'backend': ...}",
    "reasoning_parser": "give structured_outputs={'reasoning': '</think>'}: constraints begin after that token",
    "kv_cache_dtype": "its name is kv_dtype: kv_dtype='fp8', or engine.kv_dtype=fp8 in a configuration",
    "disable_custom_all_reduce": "its name is custom_all_reduce: custom_all_reduce=False",
    "swap_space": "preempted requests are computed again, not swapped",
    "load_in_8bit": "write quantization='int8' (plain weights, quantised while they are loaded)",
    "load_in_4bit": "use a checkpoint in four bits (AWQ, GPTQ, compressed-tensors or a .gguf file)",
    "torch_dtype": "its name is dtype: dtype='bfloat16', or engine.dtype=bfloat16 in a configuration",
    "attn_implementation": "its name is attention: attention='torch', or attention=torch in a configuration",
    "device_map": "its name is device; tensor_parallel_size=N shares a model over N devices",
    "num_threads": "torch takes its CPU threads from the environment: OMP_NUM_THREADS",
}
"""Options of vLLM and transformers, and what to do instead of each."""


def engine_options(options: Mapping[str, Any]) -> EngineOptions:
    """Keywords -> `EngineOptions`. Raises `ConfigError` for one that is unknown or of the wrong type."""
    types = get_type_hints(EngineOptions)
    given = {}
    for name, value in options.items():
        if name in OPTIONS_NOT_SUPPORTED:
            raise ConfigError(f"engine option {name!r}: {OPTIONS_NOT_SUPPORTED[name]}")
        if name not in types:
            raise ConfigError(f"unknown engine option {name!r}; {nearest(name, types)}")
        plain = str(value).removeprefix("torch.") if name in ("dtype", "device") else value  # torch's own are fine
        if name == "speculation" and isinstance(value, str):
            plain = {"method": value}
        try:
            given[name] = conform(name, plain, types[name])
        except ParamsError as error:
            raise ConfigError(f"engine option {error}{dtype_hint(plain) if name == 'dtype' else ''}") from None
    return EngineOptions(**given)


_DTYPES: Mapping[str, str] = {
    "half": "float16",
    "fp16": "float16",
    "float": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
}


def dtype_hint(value: object) -> str:
    """Tail of a message: the name of a dtype that is called `value` elsewhere, as "half"; "" for any other value."""
    name = _DTYPES.get(value.lower()) if isinstance(value, str) else None
    return f"; did you mean {name!r}?" if name else ""
