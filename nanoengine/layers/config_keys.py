"""Records which keys of config.json a model reads, and decides about the others.

A model does nothing for this: it receives a `Recorded` mapping. A key that it did not read is ignored if it changes
nothing at its value, rejected if it would change any model, and otherwise reported by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nanoengine.api import ModelError
from nanoengine.layers.hf_config import among, shown

__all__: list[str] = []  # the engine's

ANY: Any = object()

# Keys that change no result at these values, in any model. The value null never changes a result.
HARMLESS: Mapping[str, tuple[Any, ...] | Any] = {
    # names, versions and notes of tools
    "_attn_implementation_autoset": ANY, "_commit_hash": ANY, "_name_or_path": ANY, "architectures": ANY,
    "auto_map": ANY, "custom_pipelines": ANY, "finetuning_task": ANY, "internal_version": ANY, "is_llama_config": ANY,
    "model_name": ANY, "model_type": ANY, "name_or_path": ANY, "tokenizer_class": ANY, "transformers.js_config": ANY,
    "transformers_version": ANY, "unsloth_fixed": ANY, "unsloth_version": ANY,
    # read by the engine: dtype of the weights, ids that end the output, sizes of embeddings
    "dtype": ANY, "torch_dtype": ANY, "eos_token_id": ANY, "is_matryoshka": ANY, "matryoshka_dimensions": ANY,
    # training: dropout, losses, initialisation
    "activation_dropout": ANY, "attention_dropout": ANY, "attention_probs_dropout_prob": ANY, "attn_pdrop": ANY,
    "aux_loss_alpha": ANY, "dropout": ANY, "embd_pdrop": ANY, "embedding_dropout": ANY,
    "gradient_checkpointing": ANY, "hidden_dropout": ANY, "hidden_dropout_prob": ANY, "init_std": ANY,
    "initializer_range": ANY, "layerdrop": ANY, "output_router_logits": ANY, "resid_pdrop": ANY,
    "residual_dropout": ANY, "router_aux_loss_coef": ANY, "seq_aux": ANY,
    # how a model is run and what it returns
    "_attn_implementation": ANY, "_experts_implementation": ANY, "attn_implementation": ANY,
    "cache_implementation": ANY, "chunk_size_feed_forward": ANY, "ep_size": ANY, "experts_implementation": ANY,
    "is_decoder": ANY, "output_attentions": ANY, "output_hidden_states": ANY, "pretraining_tp": ANY,
    "return_dict": ANY, "tf_legacy_loss": ANY, "tie_last_hidden_states": ANY, "torchscript": ANY,
    "use_bfloat16": ANY, "use_cache": ANY,
    # ids that a caller puts into prompts
    "bos_token_id": ANY, "decoder_start_token_id": ANY, "pad_token_id": ANY, "sep_token_id": ANY,
    # heads that are not the language model's
    "classifier_dropout": ANY, "id2label": ANY, "label2id": ANY, "num_labels": ANY, "problem_type": ANY,
    "summary_activation": ANY, "summary_first_dropout": ANY, "summary_proj_to_labels": ANY, "summary_type": ANY,
    "summary_use_proj": ANY,
    # generation: transformers reads these only from generation_config.json
    "bad_words_ids": ANY, "begin_suppress_tokens": ANY, "diversity_penalty": ANY, "do_sample": ANY,
    "early_stopping": ANY, "encoder_no_repeat_ngram_size": ANY, "exponential_decay_length_penalty": ANY,
    "forced_bos_token_id": ANY, "forced_eos_token_id": ANY, "length_penalty": ANY, "max_length": ANY,
    "min_length": ANY, "no_repeat_ngram_size": ANY, "num_beam_groups": ANY, "num_beams": ANY,
    "num_return_sequences": ANY, "output_scores": ANY, "remove_invalid_values": ANY, "repetition_penalty": ANY,
    "return_dict_in_generate": ANY, "suppress_tokens": ANY, "task_specific_params": ANY, "temperature": ANY,
    "top_k": ANY, "top_p": ANY, "typical_p": ANY,
    # switches, at the value that turns them off
    "prefix": ("",), "rope_interleaved": (False,), "tie_encoder_decoder": (False,), "use_mrope": (False,),
    # scores of every model are scaled, and their softmax is in float32
    "attention_softmax_in_fp32": (True,), "scale_attention_softmax_in_fp32": (True,), "scale_attn_weights": (True,),
}  # fmt: skip

# Keys that change every model at other values than these. transformers implements them outside the model's class, so no
# plugin implements them.
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
    """config.json, or an object in it, which records the keys that were read. Objects in it are `Recorded` too.

    Copying it or iterating over its values counts as reading all keys.

    Attributes:
        read: keys that were read. unused: those of them that change no result, as the model says (`Fields.unused`).
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__({name: Recorded(each) if isinstance(each, dict) else each for name, each in data.items()})
        self.read: set[str] = set()
        self.unused: set[str] = set()

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
        """Path, name and value of every key that was not read, also in objects that were read."""
        for name, value in dict.items(self):
            if name not in self.read:
                yield f"{prefix}{name}", name, value
            elif isinstance(value, Recorded):
                yield from value.unread(f"{prefix}{name}.")


def unread_keys(config: Recorded) -> list[str]:
    """One line for each unknown key that the model did not read. Called after the model was built.

    Raises `ModelError` for a key that was not read and would change any model (`REFUSED`).
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
