"""Reads what a model folder says about embeddings: sentence-transformers' modules, and the sizes of vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoengine.api.deltas import Pooling
from nanoengine.api.errors import ModelError, shown
from nanoengine.params.pooling import PoolingDefaults
from nanoengine.setup.start.generation import read_json

_MODES: Mapping[str, Pooling] = {"mean": "mean", "lasttoken": "last", "last": "last"}
_FLAGS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
"""Switches of a Pooling module's config.json -> the mode, by the name that newer files have."""


def read_pooling_defaults(folder: Path, hf_config: Mapping[str, Any], size: int) -> PoolingDefaults:
    """How the model makes embeddings: as modules.json and the Pooling module say; without them the last token's hidden
    state, scaled to length 1, as in vLLM.

    What is wrong in these files, or not supported, is `unsupported`: the model can generate all the same.
    """
    try:
        dimensions = _dimensions(hf_config, size)
        modules = _modules(folder)
        if modules is None:
            return PoolingDefaults(size=size, dimensions=dimensions)
        kinds = [kind for kind, _ in modules]
        unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
        if unknown:
            raise ModelError(f"{folder / 'modules.json'}: the module {unknown[0]} is not supported")
        path = next((path for kind, path in modules if kind == "Pooling"), None)
        pooling = "last" if path is None else _pooling(folder / path / "config.json")
        return PoolingDefaults(size=size, pooling=pooling, normalize="Normalize" in kinds, dimensions=dimensions)
    except ModelError as error:
        return PoolingDefaults(size=size, unsupported=str(error))


def with_output_layer(
    hf_config: Mapping[str, Any], architectures: Sequence[str], supported: Callable[[str], bool]
) -> Mapping[str, Any] | None:
    """config.json of a model for embeddings that has no output layer ("SomeModel"), as the language model that it is a
    part of ("SomeForCausalLM"): its output layer is the embedding, which nothing may draw from. None: it is no such
    model, or its own architecture is supported.
    """
    whole = [name.removesuffix("Model") + "ForCausalLM" for name in architectures if name.endswith("Model")]
    if any(map(supported, architectures)) or not any(map(supported, whole)):
        return None
    return {**hf_config, "architectures": whole, "tie_word_embeddings": True}


def _modules(folder: Path) -> list[tuple[str, str]] | None:
    """Kind and folder of each of sentence-transformers' modules, in order; None: the model has none."""
    path = folder / "modules.json"
    if not path.is_file():
        alone = (folder / "1_Pooling" / "config.json").is_file()
        return [("Pooling", "1_Pooling"), ("Normalize", "")] if alone else None
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        return [(str(each["type"]).rpartition(".")[2], str(each.get("path", ""))) for each in found]
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"cannot read {path}: {error!r}") from error


def _pooling(path: Path) -> Pooling:
    given = read_json(path)
    mode = given.get("pooling_mode")
    modes = [mode] if mode is not None else [name for flag, name in _FLAGS.items() if given.get(flag) is True]
    if len(modes) != 1 or modes[0] not in _MODES:
        names = " with ".join(map(str, modes)) or "none"
        raise ModelError(f"{path}: pooling {names:.100} is not supported")
    return _MODES[modes[0]]


def _dimensions(hf_config: Mapping[str, Any], size: int) -> tuple[int, ...] | None:
    """The sizes that a vector may be shortened to, as in `PoolingDefaults`: by the keys that vLLM reads."""
    given = hf_config.get("matryoshka_dimensions")
    if given is None:
        return () if hf_config.get("is_matryoshka") is True else None
    if not isinstance(given, list) or not all(type(each) is int and 1 <= each <= size for each in given):
        raise ModelError(f"config.json: matryoshka_dimensions must be numbers from 1 to {size}, not {shown(given)}")
    return tuple(sorted(given))
