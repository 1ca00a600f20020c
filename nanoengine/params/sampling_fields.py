"""The names that `SamplingParams` takes: the engine's own fields and those of the logits processors. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from nanoengine.api.errors import ParamsError, PluginError
from nanoengine.api.specs import ProcessorParams

INT64 = range(-(2**63), 2**63)

# Keywords of calls that are no sampling parameters, and whose they are.
KEYWORDS_OF_CALLS: Mapping[str, str] = {
    "use_tqdm": "LLM.generate and LLM.chat",
    **dict.fromkeys(
        ("add_generation_prompt", "continue_final_message", "tools", "documents", "chat_template",
         "chat_template_kwargs", "sanitize_control_tokens"),
        "LLM.chat",
    ),
}  # fmt: skip

# Fields of vLLM's SamplingParams that are not served, and what to do instead. A processor may still bring one of them.
NOT_SUPPORTED: Mapping[str, str] = {
    "best_of": "ask for n samples and pick by cumulative_logprob",
    "use_beam_search": "there is no beam search",
    "length_penalty": "there is no beam search",
    "early_stopping": "there is no beam search",
    "structured_outputs": "output is not constrained to a grammar or schema",
    "guided_decoding": "output is not constrained to a grammar or schema",
    "logits_processors": "write a logits processor plugin (docs/plugin-api.md)",
    "extra_args": "a logits processor's own parameters are keywords like any other",
    "bad_words_token_ids": "give the words themselves as bad_words",
    "spaces_between_special_tokens": "special tokens are decoded as the tokenizer does",
    "truncate_prompt_tokens": "cut the prompt's token ids yourself",
    "output_kind": "outputs are cumulative; stream() yields each step",
    "stream_interval": "outputs are cumulative; stream() yields each step",
    "flat_logprobs": "log-probs are a list of mappings",
    "logprob_token_ids": "use logprobs=-1 where engine option max_logprobs is -1, and pick",
    "prompt_logprob_token_ids": "use prompt_logprobs=-1 where engine option max_logprobs is -1, and pick",
    "prompt_logprob_start": "prompt_logprobs cover the whole prompt",
    "skip_reading_prefix_cache": "give a cache_salt of its own, or enable_prefix_caching=False to the engine",
    "skip_clone": "parameters are immutable and shared freely",
    "thinking_token_budget": "use max_tokens",
    "repetition_detection": "use the penalties or a stop string",
    "output_text_buffer_length": "the engine finds it",
    "trace_decode_token_ids": "output cannot be forced from outside",
    "routed_experts_prompt_start": "routing is not reported",
}

PROCESSOR_MEMBERS = frozenset(name for name in vars(ProcessorParams) if not name.startswith("_"))
"""What the base class of every processor's parameters has: "columns", "pack" and so on are no names for a parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreFields:
    """The fields that no processor owns: vLLM's names, meanings and defaults.

    Attributes:
        n: samples of one prompt, at most engine option max_n; they share its seed and differ by index.
        seed: of the draw; None: made from the engine's seed and the request's ordinal.
        max_tokens: longest output; None: as far as the model's length goes.
        min_tokens: EOS and stop_token_ids cannot be drawn before so many tokens.
        stop: text that ends the output. stop_token_ids: ids that do. ignore_eos: EOS does not.
        include_stop_str_in_output: leave the stop text in.
        logprobs: log-probs of the chosen token and so many of the likeliest, at each position: at most engine option
            max_logprobs; -1: of all, where that is -1.
        prompt_logprobs: the same over the prompt.
        detokenize: make text. skip_special_tokens: leave special tokens out of it.
        priority: lower is served first (scheduling_policy="priority").
        cache_salt: prefixes are shared only among requests with the same one.
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

    def __post_init__(self) -> None:
        self._check("n", self.n >= 1, "at least 1")
        self._check("seed", self.seed is None or self.seed in INT64, "a 64-bit integer")
        self._check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None")
        self._check("min_tokens", self.min_tokens >= 0, "at least 0")
        if self.max_tokens is not None:
            self._check("min_tokens", self.min_tokens <= self.max_tokens, f"at most max_tokens ({self.max_tokens})")
        self._check("stop", all(self.stop_strings), "strings that are not empty")
        self._check("stop", self.detokenize or not self.stop_strings, "None where detokenize is False")
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
    """Fields of one processor's parameters, with annotations. Raises `PluginError` for what is no such dataclass."""
    if not dataclasses.is_dataclass(params):
        raise PluginError(f"logits processor {name!r}: {params.__qualname__} must be a dataclass")
    bare = [f.name for f in dataclasses.fields(params) if f.default is f.default_factory is dataclasses.MISSING]
    if bare:
        raise PluginError(f"logits processor {name!r}: parameters without a default: {', '.join(bare)}")
    hiding = [f.name for f in dataclasses.fields(params) if f.name in PROCESSOR_MEMBERS]
    if hiding:
        raise PluginError(
            f"logits processor {name!r}: fields that hide those of all processors' parameters: {', '.join(hiding)}; "
            "give them other names, or, where that is what is meant, annotate them as ClassVar"
        )
    try:
        hints = get_type_hints(params)
    except NameError as error:
        raise PluginError(
            f"logits processor {name!r}: {params.__qualname__} has an unknown annotation: {error}"
        ) from error
    return {f.name: hints[f.name] for f in dataclasses.fields(params)}


def legal_fields(processors: Sequence[tuple[str, type[ProcessorParams]]]) -> dict[str, Any]:
    """Every legal keyword of `SamplingParams` -> its type annotation, given the processors (name, parameters).

    Raises `PluginError` naming both owners where two processors, or one and the engine, have a field of one name.
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
