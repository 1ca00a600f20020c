"""Registers a model under the name that nanoengine-demo took, and one for an architecture of its own."""

from nanoengine.api import ModelSpec, hookimpl


@hookimpl
def register_models():
    return [
        ModelSpec(name="demo", architectures=("ClashForCausalLM",), target="nanoengine_clash.model:Clash", api=1),
        ModelSpec(name="clash2", architectures=("Clash2ForCausalLM",), target="nanoengine_clash.model:Clash", api=1),
    ]
