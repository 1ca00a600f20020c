"""The keys of `quantization_config` in files of four bits, with errors that name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from nanoengine.api import LayerInfo, ModelError
from nanoengine.layers.hf_config import shown
from nanoengine.plugins.quantizations.reading import Section

Value = TypeVar("Value", int, str, bool)

_HOW_IT_WAS_MADE = frozenset({
    "act_group_aware", "amp", "autoround_version", "backend", "batch_size", "block_name_to_quantize",
    "cache_block_outputs", "calibration", "damp_auto_increment", "damp_percent", "data_type", "dataset", "device",
    "disable_exllama", "do_fuse", "enable_full_range", "enable_minmax_tuning", "enable_norm_bias_tuning",
    "enable_quanted_input", "exllama_config", "failsafe", "fallback", "fuse_max_seq_len", "gptaq",
    "gradient_accumulate_steps", "hyb_act", "iters", "lm_head_name", "low_gpu_mem_usage", "lr", "max_input_length",
    "meta", "method", "minmax_lr", "mock_quantization", "model_file_base_name", "model_name_or_path", "model_seqlen",
    "module_name_preceding_first_block", "modules_to_fuse", "mse", "n_samples", "not_use_best_mse", "nsamples",
    "offload_to_disk", "offload_to_disk_path", "pack_impl", "pad_token_id", "parallel_packing", "process", "provider",
    "quant_block_list", "quantizer", "sampler", "scale_dtype", "seqlen", "static_attention_granularity",
    "static_kv_granularity", "supported_types", "sym", "to_quant_block_names", "tokenizer", "train_bs",
    "true_sequential", "use_cuda_fp16", "use_exllama", "use_quant_input", "v2", "v2_alpha", "v2_memory_device",
    "vram_strategy", "wait_for_submodule_finalizers",
})  # fmt: skip
"""Keys of quantisers that say nothing of what the tensors mean. `sym` shows in the zeros, which are read."""


class Int4Config(Section):
    """A `Section` whose keys may have older names, be off, or say how the file was made."""

    harmless = _HOW_IT_WAS_MADE
    off = (None, False)

    def choice(self, key: str, *values: Value, also: tuple[str, ...] = (), default: Value | None = None) -> Value:
        """One of these values (text in any case), by any of the names of the key. Raises `ModelError` for another."""
        given = {name: self.get(name) for name in (key, *also) if self.get(name) is not None}
        found = {name: value.lower() if isinstance(value, str) else value for name, value in given.items()}
        wanted = " or ".join(map(shown, values))
        for name, value in found.items():
            if not any(value == each and type(value) is type(each) for each in values):
                raise self.wrong(name, wanted)
        if len(set(found.values())) > 1:
            raise ModelError(f"config.json: {self.path} has {' and '.join(found)} with different values")
        chosen = next(iter(found.values()), default)
        if chosen is None:
            raise ModelError(f"config.json: {self.path} has no {key}; supported is {wanted}")
        return next(each for each in values if each == chosen)

    def flag(self, key: str, *, default: bool) -> bool:
        return self.choice(key, True, False, default=default)

    def inputs(self, key: str, also: tuple[str, ...] = (), default: int | None = None) -> int:
        """Inputs that share a scale; -1: all."""
        name = next((each for each in (key, *also) if self.get(each) is not None), key)
        given = self.get(name, default)
        if type(given) is not int or (given != -1 and given < 1):
            raise self.wrong(name, "a positive number, or -1 for one group of all inputs")
        return given

    def lists(self, key: str) -> list[str]:
        """The names in a list of lists."""
        given = self.get(key, [])
        if not isinstance(given, list):
            raise self.wrong(key, "a list of lists of names of modules")
        return [name for names in given for name in Section({key: names}, self.path).patterns(key)]

    def sections(self, key: str) -> Iterator[tuple[str, Int4Config]]:
        given = self.get(key, {})
        if not isinstance(given, Mapping):
            raise self.wrong(key, "an object of objects")
        for name, values in given.items():
            yield name, Int4Config(values, f"{self.path}.{key}[{shown(name)}]")


def refused_experts(layer: LayerInfo, format_: str) -> ModelError:
    return ModelError(
        f"{layer.name}: experts in {format_} are not supported; use a checkpoint whose experts are plain or MXFP4, "
        "or the one that this was made from"
    )
