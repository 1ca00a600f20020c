"""Which keys of config.json a model read, and what is known of the others.

A model need do nothing for it: it is given a `Recorded` mapping. A key that it did not read is either known to change
nothing at its value, or refused, or reported by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nanoengine.api import ModelError
from nanoengine.layers.hf_config import among, shown

ANY: Any = object()

# Keys that change no number at these values, whatever the model; null changes none anywhere.
HARMLESS: Mapping[str, tuple[Any, ...] | Any] = {
    # names, versions and notes of tools
    "_attn_implementation_autoset": ANY, "_commit_hash": ANY, "_name_or_path": ANY, "architectures": ANY,
    "auto_map": ANY, "custom_pipelines": ANY, "finetuning_task": ANY, "internal_version": ANY, "is_llama_config": ANY,
    "model_name": ANY, "model_type": ANY, "name_or_path": ANY, "tokenizer_class": ANY, "transformers.js_config": ANY,
    "transformers_version": ANY, "unsloth_fixed": ANY, "unsloth_version": ANY,
    # read by the engine: dtype of the weights, ids that end the output
    "dtype": ANY, "torch_dtype": ANY, "eos_token_id": ANY,
    # of training: dropout, losses, initialisation
    "activation_dropout": ANY, "attention_dropout": ANY, "attention_probs_dropout_prob": ANY, "attn_pdrop": ANY,
    "dropout": ANY, "embd_pdrop": ANY, "gradient_checkpointing": ANY, "hidden_dropout": ANY,
    "hidden_dropout_prob": ANY, "init_std": ANY, "initializer_range": ANY, "layerdrop": ANY,
    "output_router_logits": ANY, "resid_pdrop": ANY, "router_aux_loss_coef": ANY,
    # how transformers runs a model and what it returns
    "_attn_implementation": ANY, "_experts_implementation": ANY, "attn_implementation": ANY,
    "cache_implementation": ANY, "chunk_size_feed_forward": ANY, "experts_implementation": ANY, "is_decoder": ANY,
    "output_attentions": ANY, "output_hidden_states": ANY, "pretraining_tp": ANY, "return_dict": ANY,
    "tf_legacy_loss": ANY, "tie_last_hidden_states": ANY, "torchscript": ANY, "use_bfloat16": ANY, "use_cache": ANY,
    # ids that a caller puts into prompts
    "bos_token_id": ANY, "decoder_start_token_id": ANY, "pad_token_id": ANY, "sep_token_id": ANY,
    # of other heads than the language model's
    "classifier_dropout": ANY, "id2label": ANY, "label2id": ANY, "num_labels": ANY, "problem_type": ANY,
    # of generation: transformers reads these from generation_config.json alone
    "bad_words_ids": ANY, "begin_suppress_tokens": ANY, "diversity_penalty": ANY, "do_sample": ANY,
    "early_stopping": ANY, "encoder_no_repeat_ngram_size": ANY, "exponential_decay_length_penalty": ANY,
    "forced_bos_token_id": ANY, "forced_eos_token_id": ANY, "length_penalty": ANY, "max_length": ANY,
    "min_length": ANY, "no_repeat_ngram_size": ANY, "num_beam_groups": ANY, "num_beams": ANY,
    "num_return_sequences": ANY, "output_scores": ANY, "remove_invalid_values": ANY, "repetition_penalty": ANY,
    "return_dict_in_generate": ANY, "suppress_tokens": ANY, "task_specific_params": ANY, "temperature": ANY,
    "top_k": ANY, "top_p": ANY, "typical_p": ANY,
    # switches that do nothing where they are off
    "prefix": ("",), "rope_interleaved": (False,), "tie_encoder_decoder": (False,), "use_mrope": (False,),
}  # fmt: skip

# Keys that make another model of any: what transformers does at other values than these, no plugin does by itself.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_chunk_size": (),
    "attribute_map": ({},),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_sharing_modes": ([],),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "quantization_config": (),
    "transformers_weights": ("model.safetensors",),
}


class Recorded(dict[str, Any]):
    """config.json, or an object in it, which notes the keys that somebody asked for. Objects in it are `Recorded` too.

    Who copies it or goes through its values has read all of it.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__({name: Recorded(each) if isinstance(each, dict) else each for name, each in data.items()})
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        if isinstance(name, str):
            self.read.add(name)
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self.read.update(super().__iter__())
        return super().__iter__()

    def keys(self) -> Any:
        self.read.update(super().__iter__())
        return super().keys()

    def values(self) -> Any:
        self.read.update(super().__iter__())
        return super().values()

    def items(self) -> Any:
        self.read.update(super().__iter__())
        return super().items()

    def unread(self, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
        """Path, name and value of every key that was not asked for, those of objects that were included."""
        for name, value in dict.items(self):
            if name not in self.read:
                yield f"{prefix}{name}", name, value
            elif isinstance(value, Recorded):
                yield from value.unread(f"{prefix}{name}.")


def unread_keys(config: Recorded) -> list[str]:
    """One line for each key that the model did not read and of which nothing is known, after the model was built.

    Raises `ModelError` for a key that was not read and makes it another model.
    """
    found = []
    for path, name, value in config.unread():
        harmless = REFUSED.get(name, HARMLESS.get(name, ()))
        if value is None or harmless is ANY or among(value, harmless):
            continue
        if name in REFUSED:
            raise ModelError(
                f"config.json: {path:.100} = {shown(value)} is not supported; "
                f"supported: {', '.join(['null', *map(shown, harmless)])}"
            )
        found.append(f"{path:.100} = {shown(value)}")
    return found
