"""The hooks. This module imports no torch, also not indirectly, because it is imported to list plugins."""

from nanoengine.api import AttentionSpec, CommandSpec, ModelSourceSpec, ModelSpec, SamplerSpec, hookimpl
from nanoengine_plugin_demo.params import TopNSigmaParams


@hookimpl
def register_models():
    return [ModelSpec(name="opt", architectures=("OPTForCausalLM",), target="nanoengine_plugin_demo.opt:OPT", api=1)]


@hookimpl
def register_samplers():
    target = "nanoengine_plugin_demo.top_n_sigma:TopNSigma"
    return [SamplerSpec(name="top_n_sigma", params=TopNSigmaParams, target=target, api=1)]


@hookimpl
def register_attention_backends():
    target = "nanoengine_plugin_demo.row_by_row:RowByRow"
    return [AttentionSpec(name="row_by_row", target=target, api=1, preference=-100)]


@hookimpl
def register_model_sources():
    target = "nanoengine_plugin_demo.source:TinyOPT"
    return [ModelSourceSpec(name="opt-tiny", target=target, api=1, order=50, models=("opt-tiny",))]


@hookimpl
def register_commands():
    target = "nanoengine_plugin_demo.command:write_opt"
    return [CommandSpec(name="write-opt", target=target, help="Write a tiny OPT with random weights.", api=1)]


@hookimpl
def register_configs():
    return ["pkg://nanoengine_plugin_demo.configs"]
