"""What a model folder says about generation: its end-of-sequence set and its sampling defaults."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoengine.core.errors import ModelError, ParamsError
from nanoengine.core.field_types import conform
from nanoengine.core.setup.git_lfs import refuse_lfs_pointer

# generation_config.json's names for sampling defaults -> SamplingParams' names, and types; the others are passed over.
_DEFAULTS: Mapping[str, tuple[str, type[Any]]] = {
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "max_new_tokens": ("max_tokens", int),
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """eos_ids: every id that ends the output. sampling: keywords of `SamplingParams` that the model recommends."""

    eos_ids: frozenset[int]
    sampling: Mapping[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `ModelError` naming the file for anything else."""
    refuse_lfs_pointer(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds {type(found).__name__}, not an object")
    return found


def read_generation_defaults(
    folder: Path, hf_config: Mapping[str, Any], legal: Collection[str], tokenizer_eos: int | None
) -> GenerationDefaults:
    """generation_config.json if there is one, else config.json, and the tokenizer's own EOS.

    `legal` are the parameter names of this engine: a default for a stage that is not installed is passed over.
    Raises `ModelError` naming the file for what is not of the right type.
    """
    path = folder / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    eos = given.get("eos_token_id", hf_config.get("eos_token_id"))
    ids = set(_ids(eos, path if "eos_token_id" in given else folder / "config.json"))
    if tokenizer_eos is not None:
        ids.add(tokenizer_eos)
    sampling = {
        ours: _of_type(theirs, given[theirs], kind, path)
        for theirs, (ours, kind) in _DEFAULTS.items()
        if given.get(theirs) is not None and (ours in legal or ours == "max_tokens")
    }
    return GenerationDefaults(frozenset(ids), sampling)


def _of_type(name: str, value: Any, kind: type[Any], path: Path) -> Any:
    try:
        return conform(name, value, kind)
    except ParamsError as error:
        raise ModelError(f"{path}: {error}") from error


def _ids(value: Any, path: Path) -> list[int]:
    if value is None:
        return []
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
        raise ModelError(f"eos_token_id in {path} is {value!r}, not a token id or a list of them")
    return found
