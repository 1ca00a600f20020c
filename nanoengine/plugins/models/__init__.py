"""Built-in models."""

from __future__ import annotations

from nanoengine.api import API_VERSION, ModelSpec, hookimpl


@hookimpl
def register_models() -> list[ModelSpec]:
    here = __name__
    return [
        ModelSpec(name="llama", architectures=("LlamaForCausalLM",), target=f"{here}.llama:Llama", api=API_VERSION),
        ModelSpec(name="qwen3", architectures=("Qwen3ForCausalLM",), target=f"{here}.qwen3:Qwen3", api=API_VERSION),
    ]
