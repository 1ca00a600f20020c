"""The keys of generation_config.json that are not sampling defaults here. The names are transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# key -> values at which it changes no token; None: all values. A null never changes a token.
HARMLESS: Mapping[str, tuple[Any, ...] | None] = {
    # origin of the file
    "_from_model_config": None, "_name_or_path": None, "chat_format": None, "transformers_version": None,
    "trust_remote_code": None,
    # ids that a caller puts into prompts, or that only encoders use
    "bos_token_id": None, "decoder_start_token_id": None, "pad_token_id": None,
    # how generate() runs and what it returns
    "cache_config": None, "cache_implementation": None, "compile_config": None, "continuous_batching_config": None,
    "disable_compile": None, "low_memory": None, "max_cache_len": None, "output_attentions": None,
    "output_hidden_states": None, "output_logits": None, "output_scores": None, "prefill_chunk_size": None,
    "return_dict_in_generate": None, "use_cache": None, "remove_invalid_values": None, "renormalize_logits": None,
    # speculation, which changes no token
    "assistant_confidence_threshold": None, "assistant_early_exit": None, "assistant_ensemble_weight": None,
    "assistant_lookbehind": None, "is_assistant": None, "max_matching_ngram_size": None, "num_assistant_tokens": None,
    "num_assistant_tokens_schedule": None, "prompt_lookup_num_tokens": None, "speculation_type": None,
    "target_lookbehind": None, "use_mtp": None,
    # beam search, which num_beams turns on
    "diversity_penalty": None, "early_stopping": None, "length_penalty": None, "num_beam_groups": None,
    # at the values that turn them off
    "bad_words_ids": ([],), "begin_suppress_tokens": ([],), "constraints": ([],), "dola_layers": ([],),
    "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1.0,), "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,), "force_words_ids": ([],), "guidance_scale": (1.0,), "max_length": (20,), "max_time": (),
    "min_length": (0,), "min_new_tokens": (0,), "min_p": (0.0,), "no_repeat_ngram_size": (0,), "num_beams": (1,),
    "num_return_sequences": (1,), "penalty_alpha": (0.0,), "repetition_penalty": (1.0,), "sequence_bias": ({}, []),
    "stop_strings": ([],), "suppress_tokens": ([],), "temperature": (1.0,), "token_healing": (False,),
    "top_h": (1.0,), "top_k": (0,), "top_p": (1.0,), "typical_p": (1.0,), "watermarking_config": ({},),
}  # fmt: skip

_NO_PROCESSOR = "no installed logits processor has this parameter"
_NO_BEAMS = "there is no beam search"

# key -> what it would do, and what to do instead
MEANING: Mapping[str, str] = {
    "bad_words_ids": "words of several tokens are not banned by ids; give them as bad_words",
    "begin_suppress_tokens": "no token is banned at the first position only",
    "constraints": _NO_BEAMS,
    "dola_layers": "layers are not contrasted while decoding",
    "encoder_no_repeat_ngram_size": "n-grams of the prompt may be repeated",
    "encoder_repetition_penalty": "tokens outside the prompt are not penalised",
    "epsilon_cutoff": "tokens are not cut off by their probability; min_p is similar",
    "eta_cutoff": "tokens are not cut off by entropy; min_p or top_p is similar",
    "exponential_decay_length_penalty": "long outputs are not ended by a growing bias",
    "force_words_ids": _NO_BEAMS,
    "forced_bos_token_id": "the first token is not forced; put it into the prompt",
    "forced_decoder_ids": "output is not forced; put the ids into the prompt",
    "forced_eos_token_id": "no end token is added to an output that ends at max_tokens",
    "guidance_scale": "there is no classifier-free guidance",
    "logit_bias": "it is not a key of transformers; give it as a sampling parameter",
    "max_length": "prompt and output together are limited by max_model_len only; give max_tokens",
    "max_time": "requests have no time limit",
    "min_length": "it counts the prompt; give min_tokens, which does not",
    "no_repeat_ngram_size": "n-grams may be repeated; repetition_penalty is similar",
    "num_beams": _NO_BEAMS,
    "num_return_sequences": "give n in the sampling parameters",
    "penalty_alpha": "there is no contrastive search",
    "sequence_bias": "sequences have no bias; logit_bias has one for single tokens",
    "stop_strings": "there is no tokenizer to find them with",
    "suppress_tokens": _NO_PROCESSOR,
    "token_healing": "the prompt's last token is not changed",
    "top_h": "tokens are not cut off by entropy; min_p or top_p is similar",
    "typical_p": "there is no typical sampling; top_p is similar",
    "watermarking_config": "output has no watermark",
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "do_sample"), _NO_PROCESSOR),
}
