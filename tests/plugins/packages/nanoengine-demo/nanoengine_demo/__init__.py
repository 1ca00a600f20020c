"""A third-party package: a model, a logits processor with a parameter of its own, and two config files."""

from nanoengine.api import ModelSpec, SamplerSpec, hookimpl
from nanoengine_demo.params import EvenOnlyParams


@hookimpl
def register_models():
    return [ModelSpec(name="demo", architectures=("DemoForCausalLM",), target="nanoengine_demo.model:DemoModel", api=1)]


@hookimpl
def register_samplers():
    return [SamplerSpec(name="even_only", params=EvenOnlyParams, target="nanoengine_demo.processor:EvenOnly", api=1)]


@hookimpl
def register_configs():
    return ["pkg://nanoengine_demo.configs"]
