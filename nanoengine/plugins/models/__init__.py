"""Built-in models."""

from __future__ import annotations

from nanoengine.api import API_VERSION, ModelSpec, hookimpl

_MODELS = (
    # name, architecture, module:class in this folder
    ("cohere", "CohereForCausalLM", "cohere:Cohere"),
    ("deepseek-v2", "DeepseekV2ForCausalLM", "deepseek_v2:DeepseekV2"),
    ("deepseek-v3", "DeepseekV3ForCausalLM", "deepseek_v3:DeepseekV3"),
    ("gemma", "GemmaForCausalLM", "gemma:Gemma"),
    ("gemma2", "Gemma2ForCausalLM", "gemma2:Gemma2"),
    ("gemma3", "Gemma3ForCausalLM", "gemma3:Gemma3"),
    ("gemma3-with-images", "Gemma3ForConditionalGeneration", "gemma3:Gemma3WithImages"),
    ("glm", "GlmForCausalLM", "glm4:Glm"),
    ("glm4", "Glm4ForCausalLM", "glm4:Glm4"),
    ("gpt2", "GPT2LMHeadModel", "gpt2:GPT2"),
    ("gpt-neox", "GPTNeoXForCausalLM", "gpt_neox:GPTNeoX"),
    ("gpt-oss", "GptOssForCausalLM", "gpt_oss:GptOss"),
    ("granite", "GraniteForCausalLM", "granite:Granite"),
    ("llama", "LlamaForCausalLM", "llama:Llama"),
    ("mistral", "MistralForCausalLM", "mistral:Mistral"),
    ("mixtral", "MixtralForCausalLM", "mixtral:Mixtral"),
    ("olmo2", "Olmo2ForCausalLM", "olmo2:Olmo2"),
    ("olmoe", "OlmoeForCausalLM", "olmoe:Olmoe"),
    ("phi", "PhiForCausalLM", "phi:Phi"),
    ("phi3", "Phi3ForCausalLM", "phi3:Phi3"),
    ("qwen2", "Qwen2ForCausalLM", "qwen2:Qwen2"),
    ("qwen2-moe", "Qwen2MoeForCausalLM", "qwen2_moe:Qwen2MoE"),
    ("qwen3", "Qwen3ForCausalLM", "qwen3:Qwen3"),
    ("qwen3-moe", "Qwen3MoeForCausalLM", "qwen3_moe:Qwen3MoE"),
    ("smollm3", "SmolLM3ForCausalLM", "smollm3:SmolLM3"),
    ("starcoder2", "Starcoder2ForCausalLM", "starcoder2:Starcoder2"),
)


@hookimpl
def register_models() -> list[ModelSpec]:
    return [
        ModelSpec(name=name, architectures=(architecture,), target=f"{__name__}.{target}", api=API_VERSION)
        for name, architecture, target in _MODELS
    ]
