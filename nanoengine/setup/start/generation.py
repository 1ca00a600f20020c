"""Reads what a model folder says about generation: the ids that end the output, and sampling defaults."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoengine.api.errors import ModelError, ParamsError
from nanoengine.params.field_types import conform
from nanoengine.setup.start.generation_keys import HARMLESS, MEANING
from nanoengine.text.git_lfs import refuse_lfs_pointer

# generation_config.json's names for sampling defaults -> SamplingParams' names, and types.
_DEFAULTS: Mapping[str, tuple[str, Any]] = {
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "max_new_tokens": ("max_tokens", int),
    "min_new_tokens": ("min_tokens", int),
    "stop_strings": ("stop", str | list[str]),
}
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_CORE = ("max_tokens", "min_tokens", "stop")
_MAX_TOKENS = 16  # the default of SamplingParams
_LARGEST_FILE = 2**24
_IDS: Any = list[int]


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a model folder recommends for generation.

    Attributes:
        eos_ids: every id that ends the output. sampling: keywords of `SamplingParams`.
        unsupported: one line for each difference: a setting that has no effect here, or one that only has an effect
            here.
    """

    eos_ids: frozenset[int]
    sampling: Mapping[str, Any]
    unsupported: tuple[str, ...] = ()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ModelError` that names the file if it is not one, or has a key twice."""
    refuse_lfs_pointer(path)
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ModelError(f"{path} is larger than {_LARGEST_FILE >> 20} MiB: it is not a configuration")
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_twins)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} contains {type(found).__name__}, not an object")
    return found


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {twin[:100]!r} more than once")
    return found


def read_generation_defaults(
    folder: Path,
    hf_config: Mapping[str, Any],
    legal: Collection[str],
    tokenizer_eos: int | None,
    *,
    has_tokenizer: bool = True,
    vocab_size: int | None = None,
    max_model_len: int | None = None,
) -> GenerationDefaults:
    """Reads generation_config.json if there is one, else config.json; and the tokenizer's own EOS.

    Args:
        legal: names of the parameters of the installed processors. A default of another parameter is reported.
        has_tokenizer: whether stop strings can be found.
        vocab_size, max_model_len: sizes of the model; None: not known.

    Raises `ModelError` that names the file if a value has a wrong type.
    """
    path = folder / "generation_config.json"
    given = {name: value for name, value in (read_json(path) if path.is_file() else {}).items() if value is not None}
    eos = given.pop("eos_token_id", None)
    where = folder / "config.json" if eos is None else path
    ids = set(_ids(hf_config.get("eos_token_id") if eos is None else eos, where))
    if tokenizer_eos is not None:
        ids.add(tokenizer_eos)
    supported = {*legal, *_CORE} if has_tokenizer else {*legal, *_CORE} - {"stop"}
    reading = _Reading(given, path, supported)
    sampling = reading.sampling(ids, vocab_size)
    return GenerationDefaults(frozenset(ids), sampling, tuple(reading.unsupported(max_model_len)))


class _Reading:
    """Reads generation_config.json. `given`: its values without nulls. `supported`: the valid parameters."""

    def __init__(self, given: Mapping[str, Any], path: Path, supported: Collection[str]) -> None:
        self.given, self.path, self.supported = given, path, supported
        self.read: set[str] = set()

    def sampling(self, eos_ids: Collection[int], vocab_size: int | None) -> dict[str, Any]:
        """Keywords of `SamplingParams`."""
        found: dict[str, Any] = {}
        for theirs, (ours, kind) in _DEFAULTS.items():
            if theirs in self.given and ours in self.supported:
                found[ours] = self._value(theirs, kind)
        if "do_sample" in self.given and not self._value("do_sample", bool) and "temperature" in self.supported:
            found["temperature"] = 0.0  # greedy, for every other setting
        if found.get("min_tokens"):
            # in transformers, min_new_tokens has no effect after max_new_tokens
            longest = found.setdefault("max_tokens", max(_MAX_TOKENS, found["min_tokens"]))
            found["min_tokens"] = min(longest, found["min_tokens"])
        banned = [i for i in self._banned(eos_ids) if i >= 0 and (vocab_size is None or i < vocab_size)]
        if banned:
            found["logit_bias"] = dict.fromkeys(banned, float("-inf"))
        return found

    def _banned(self, eos_ids: Collection[int]) -> list[int]:
        """Ids that are never drawn: `suppress_tokens`, and those `bad_words_ids` that have only one token."""
        if "logit_bias" not in self.supported:
            return []
        banned = list(self._value("suppress_tokens", _IDS)) if "suppress_tokens" in self.given else []
        if "bad_words_ids" in self.given:
            words = self._value("bad_words_ids", list[_IDS])
            banned += [word[0] for word in words if len(word) == 1 and word[0] not in eos_ids]
            if any(len(word) > 1 for word in words):
                self.read.discard("bad_words_ids")
        return sorted(set(banned))

    def unsupported(self, max_model_len: int | None) -> list[str]:
        """One line for each key that was not read and may change the output, and one if sampling is on by default."""
        lines = [*self._sampled()]
        for name, value in self.given.items():
            if name in self.read or _is_harmless(name, value, max_model_len):
                continue
            meaning = MEANING.get(name, "the key is not known")
            lines.append(f"{self.path}: {name:.100} = {reprlib.repr(value)} has no effect here: {meaning}")
        return lines

    def _sampled(self) -> Iterator[str]:
        """A line if the file does not say whether to sample: then transformers does not sample."""
        names = [n for n in _OF_SAMPLING if n in self.read and not _is_harmless(n, self.given[n], None)]
        if names and "do_sample" not in self.given:
            values = ", ".join(f"{name} = {reprlib.repr(self.given[name])}" for name in names)
            yield (
                f"{self.path}: {values} without do_sample: requests are sampled with these values, as in vLLM; "
                "transformers' generate() would be greedy, which is temperature=0 here"
            )

    def _value(self, name: str, kind: Any) -> Any:
        self.read.add(name)
        try:
            return conform(name, self.given[name], kind)
        except ParamsError as error:
            raise ModelError(f"{self.path}: {error}") from error


def _is_harmless(name: str, value: Any, max_model_len: int | None) -> bool:
    if name == "max_length" and max_model_len is not None and isinstance(value, int) and value >= max_model_len:
        return True  # every request has this limit already
    harmless = HARMLESS.get(name, ())
    return harmless is None or any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in harmless
    )


def _ids(value: Any, path: Path) -> list[int]:
    if value is None:
        return []
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
        raise ModelError(f"eos_token_id in {path} is {reprlib.repr(value)}, not a token id or a list of them")
    return found
