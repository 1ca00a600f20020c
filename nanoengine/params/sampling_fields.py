"""The fields of `SamplingParams`: the engine's own and those of the logits processors. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from nanoengine.api.errors import ParamsError, PluginError
from nanoengine.api.processor_params import ProcessorParams

INT64 = range(-(2**63), 2**63)

# Keywords that are not sampling parameters -> the methods that have them.
KEYWORDS_OF_CALLS: Mapping[str, str] = {
    "use_tqdm": "LLM.generate and LLM.chat",
    "generated": "LLM's prompts, as 'generated_token_ids', and of Engine.add_request",
    "generated_token_ids": "LLM's prompts: {'prompt': text, 'generated_token_ids': ids}",
    **dict.fromkeys(
        ("add_generation_prompt", "continue_final_message", "tools", "documents", "chat_template",
         "chat_template_kwargs", "sanitize_control_tokens"),
        "LLM.chat",
    ),
}  # fmt: skip

# Fields of vLLM's SamplingParams that are not supported -> what to do instead. A processor may define one of them.
NOT_SUPPORTED: Mapping[str, str] = {
    "best_of": "request n samples and choose by cumulative_logprob",
    "use_beam_search": "there is no beam search",
    "length_penalty": "there is no beam search",
    "early_stopping": "there is no beam search",
    "guided_decoding": "use structured_outputs=StructuredOutputsParams(...)",
    **{
        f"guided_{kind}": f"use structured_outputs=StructuredOutputsParams({kind}=...)"
        for kind in ("json", "regex", "choice", "grammar")
    },
    "response_format": "use structured_outputs=StructuredOutputsParams(json=...), or json_object=True",
    "extra_args": "give the parameters of a logits processor as keywords",
    "bad_words_token_ids": "give the words as bad_words",
    "spaces_between_special_tokens": "special tokens are decoded as the tokenizer does",
    "truncate_prompt_tokens": "shorten the prompt's token ids before the call",
    "output_kind": "give delta=True to LLM.stream or AsyncLLM.generate; other outputs have all so far",
    "stream_interval": "LLM.stream and AsyncLLM.generate yield what each step brings",
    "flat_logprobs": "log-probs are a list of mappings",
    "logprob_token_ids": "set engine option max_logprobs to -1, use logprobs=-1, and choose",
    "prompt_logprob_token_ids": "set engine option max_logprobs to -1, use prompt_logprobs=-1, and choose",
    "prompt_logprob_start": "prompt_logprobs cover the whole prompt",
    "skip_reading_prefix_cache": "give the request a unique cache_salt, or enable_prefix_caching=False to the engine",
    "skip_clone": "parameters are immutable, so they are never copied",
    "thinking_token_budget": "use max_tokens",
    "repetition_detection": "use the penalties or a stop string",
    "output_text_buffer_length": "the engine computes it",
    "trace_decode_token_ids": "output cannot be forced from outside",
    "routed_experts_prompt_start": "routing is not reported",
}

PROCESSOR_MEMBERS = frozenset(name for name in vars(ProcessorParams) if not name.startswith("_"))
"""Members of the base class of processors' parameters: a parameter cannot be called "columns", "pack" and so on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreFields:
    """The fields that belong to no processor, with vLLM's names, meanings and defaults.

    Attributes:
        n: number of samples of the prompt, at most engine option max_n. They have the same seed and differ by index.
        seed: seed of the draw. None: made from the engine's seed and the number of the request.
        max_tokens: most tokens of the output. None: up to max_model_len.
        min_tokens: EOS and stop_token_ids cannot be drawn before the output has so many tokens.
        stop: strings that end the output.
        stop_token_ids: token ids that end the output.
        ignore_eos: EOS does not end the output.
        include_stop_str_in_output: keep the stop string in the text.
        logprobs: at each position, return the log-probs of the chosen token and of so many of the likeliest tokens. At
            most engine option max_logprobs; -1: of the whole vocabulary, if that option is -1.
        prompt_logprobs: as `logprobs`, for the positions of the prompt.
        detokenize: decode the output to text.
        skip_special_tokens: leave special tokens out of the text.
        priority: requests with a lower value run first (scheduling_policy="priority").
        cache_salt: only requests with the same salt share prefixes.
        speculate: False: no drafts, if the engine has speculation. The tokens are the same.
    """

    n: int = 1
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    priority: int = 0
    cache_salt: str | None = None
    speculate: bool = True

    def __post_init__(self) -> None:
        self._check("n", self.n >= 1, "at least 1")
        self._check("seed", self.seed is None or self.seed in INT64, "a 64-bit integer")
        self._check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None")
        self._check("min_tokens", self.min_tokens >= 0, "at least 0")
        if self.max_tokens is not None:
            self._check("min_tokens", self.min_tokens <= self.max_tokens, f"at most max_tokens ({self.max_tokens})")
        self._check("stop", all(self.stop_strings), "strings that are not empty")
        self._check("stop", self.detokenize or not self.stop_strings, "None if detokenize is False")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            self._check(name, value is None or value >= -1, "at least 0, or -1 for the whole vocabulary")
        self._check("priority", self.priority in INT64, "a 64-bit integer")
        self._check("cache_salt", self.cache_salt != "", "a string that is not empty")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def _check(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            raise ParamsError(f"{name} must be {rule}, not {getattr(self, name)!r}")


CORE_TYPES: Mapping[str, Any] = get_type_hints(CoreFields)


def processor_types(name: str, params: type[ProcessorParams]) -> dict[str, Any]:
    """Field -> annotation of a processor's parameters. Raises `PluginError` if `params` is not a correct dataclass."""
    found = plugin_fields(f"logits processor {name!r}", params)
    hiding = [field for field in found if field in PROCESSOR_MEMBERS]
    if hiding:
        raise PluginError(
            f"logits processor {name!r}: fields with names of members of ProcessorParams: {', '.join(hiding)}; "
            "rename them, or annotate them as ClassVar if they are to override the members"
        )
    return found


@functools.lru_cache(64)  # each start asks a few times for each processor, and each annotation is compiled anew
def _annotations(params: type[Any]) -> Mapping[str, Any]:
    return get_type_hints(params)


def plugin_fields(where: str, params: type[Any]) -> dict[str, Any]:
    """Field -> annotation of the parameters of the part `where`.

    Raises `PluginError` if `params` is not a dataclass, or a field has no default or an unknown annotation.
    """
    if not dataclasses.is_dataclass(params):
        raise PluginError(f"{where}: {params.__qualname__} must be a dataclass")
    bare = [f.name for f in dataclasses.fields(params) if f.default is f.default_factory is dataclasses.MISSING]
    if bare:
        raise PluginError(f"{where}: parameters without a default: {', '.join(bare)}")
    try:
        hints = _annotations(params)
    except NameError as error:
        raise PluginError(f"{where}: {params.__qualname__} has an unknown annotation: {error}") from error
    return {f.name: hints[f.name] for f in dataclasses.fields(params)}


def legal_fields(processors: Sequence[tuple[str, type[ProcessorParams]]]) -> dict[str, Any]:
    """Every valid keyword of `SamplingParams` -> its type annotation. `processors`: (name, parameters) of each.

    Raises `PluginError` that names both owners if two processors, or a processor and the engine, have the same field.
    """
    legal, owner = dict(CORE_TYPES), dict.fromkeys(CORE_TYPES, "SamplingParams itself")
    for name, params in processors:
        for field_name, kind in processor_types(name, params).items():
            if field_name in legal:
                raise PluginError(
                    f"parameter {field_name!r} of logits processor {name!r} belongs to {owner[field_name]} already: "
                    "rename it, or unload one of the two"
                )
            legal[field_name], owner[field_name] = kind, f"logits processor {name!r}"
    return legal
