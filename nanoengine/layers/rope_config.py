"""Rotations in config.json: two objects in two styles, in which each key is read, neutral, or an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanoengine.api import ModelError
from nanoengine.layers.hf_config import LARGEST, Fields, shown
from nanoengine.layers.rope_kinds import KINDS, ORIGINAL, RopeConfig

__all__ = ["ROPE_TYPES", "read_rope"]

ROPE_TYPES = tuple(KINDS)
_OF_ALL = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_OFF = (("beta_fast", 0), ("beta_slow", 0), ("mscale", 0), ("mscale_all_dim", 0))  # as if they were absent
_NEUTRAL = (("factor", 1.0), ("rope_type", "default"), ("type", "default"))


def read_rope(
    hf: Mapping[str, Any] | Fields,
    theta: float = 10000.0,
    *,
    partial: float | None = None,
    width: int = 0,
    interleaved: bool = False,
    aliases: Mapping[str, str] | None = None,
    kinds: Sequence[str] = ROPE_TYPES,
) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4).

    As in transformers: if both objects are given, `rope_scaling` is used; if the file has none, the default of
    `rope_parameters`. If none has the base, it is `rope_theta`, else `theta`. `original_max_position_embeddings` may
    also be next to the object.

    Args:
        hf: config.json, or its fields with the defaults of the family.
        theta: the default of the family's class.
        partial: default of `partial_rotary_factor`; None: the class knows no such field, and another value than 1 is an
            error.
        width: how many elements are rotated, if the family says so instead of the share of a head.
        interleaved: neighbours are rotated together: the class's choice, no field says it.
        aliases: other names of rope types that the class knows. kinds: those that it knows, if not all.

    Raises `ModelError` as `rope_of` does, and if two places contradict each other.
    """
    whole = hf if isinstance(hf, Fields) else Fields(hf)
    of_file = Fields(whole.data, whole.prefix, names=whole.names)
    parameters, scaling = of_file.nested("rope_parameters"), of_file.nested("rope_scaling")
    given = scaling if scaling.data else parameters
    if not scaling.data and not of_file.has("rope_parameters"):
        given = Fields(whole.defaults.get("rope_parameters", {}), parameters.prefix)
    used = _with_outer(given, whole)
    options: dict[str, Any] = {"partial": partial, "interleaved": interleaved, "aliases": aliases, "kinds": kinds}
    found = replace(rope_of(used, whole, "rope_theta", theta, **options), width=width)
    if scaling.data:
        check_agreement(parameters, scaling, {**used.data, "rope_theta": found.theta}, found.kind)
    return found


def _with_outer(used: Fields, whole: Fields) -> Fields:
    """The object, with the original context length that is next to it. Types that do not need it ignore it."""
    if not whole.has(ORIGINAL):
        return used
    if used.has(ORIGINAL) and used.get(ORIGINAL) != whole.get(ORIGINAL):
        raise contradiction(whole, ORIGINAL, used, shown(used.get(ORIGINAL)))
    return Fields({**used.data, ORIGINAL: whole.get(ORIGINAL)}, used.prefix)


def check_agreement(parameters: Fields, scaling: Fields, result: Mapping[str, Any], kind: str) -> None:
    """Checks two objects that describe one rotation. Raises `ModelError` if `parameters` contradicts `result`.

    The type "default" in `parameters` contradicts nothing. `kind`: the type in the result, given as "type" or
    "rope_type".
    """
    result = {**result, "rope_type": kind, "type": kind}
    for name, value in parameters.data.items():
        if value is not None and (name, value) not in _NEUTRAL and value != result.get(name):
            raise contradiction(parameters, name, scaling, shown(result.get(name)))


def rope_of(
    used: Fields,
    whole: Fields,
    base: str,
    theta: float,
    *,
    partial: float | None = None,
    interleaved: bool = False,
    aliases: Mapping[str, str] | None = None,
    kinds: Sequence[str] = ROPE_TYPES,
) -> RopeConfig:
    """The rotation that one object describes.

    Args:
        used: the object; may be empty. whole: config.json.
        base: name of the field in `whole` that has the base, if the object has none.
        theta: the base if neither has one, nor the family's defaults.
        partial, interleaved, aliases, kinds: as of `read_rope`.

    Raises `ModelError` for a type that is not supported, a key that the type does not read, and two different bases.
    """
    kind = _kind(used, kinds, aliases or {})
    for name, value in used.data.items():
        _check_key(used, name, value, kind)
    own = whole.own_name(base)
    if own in whole.data or own in whole.defaults:
        theta = whole.float(base)
    if own in whole.data and used.has("rope_theta") and used.float("rope_theta") != theta:
        raise contradiction(whole, base, used, f"rope_theta {shown(used.get('rope_theta'))}")
    share = used.float("partial_rotary_factor", whole.float("partial_rotary_factor", partial or 1.0))
    if share != 1.0 and partial is None:
        raise ModelError(f"config.json: {whole.prefix}partial_rotary_factor other than 1 is not supported")
    if share > 1.0:
        raise whole.wrong("partial_rotary_factor", share, "at most 1")
    found = RopeConfig(
        theta=used.float("rope_theta", theta),
        kind=kind,
        partial=share,
        interleaved=interleaved,
        **_read(used, whole, kind),
    )
    if found.limit(1) > LARGEST["max_position_embeddings"]:
        raise used.wrong("factor", found.factor, "smaller: no model has so many positions")
    return found


def _kind(used: Fields, kinds: Sequence[str], aliases: Mapping[str, str]) -> str:
    """The rope type; older files call it "type"."""
    names = (*kinds, *aliases)
    old, new = (used.choice(name, names, "default") for name in ("type", "rope_type"))
    old, new = aliases.get(old, old), aliases.get(new, new)
    kind = new if "rope_type" in used.data else old
    if used.has("type") and old != kind:
        raise contradiction(used, "type", used, f"rope_type {kind}")
    return kind


def _read(used: Fields, whole: Fields, kind: str) -> dict[str, Any]:
    """The parameters that a kind reads, by the names of `RopeConfig`."""
    found, reads = dict[str, Any](), KINDS[kind].reads
    if ORIGINAL in reads:
        found["original_max_position"] = used.int(ORIGINAL, whole.get("max_position_embeddings"))
    if kind == "dynamic":
        found["max_position"] = whole.int("max_position_embeddings")
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
        off = (name, used.get(name)) in _OFF and used.get(name) is not False
        if name in reads and used.has(name) and not off:
            found[name] = used.float(name)
    for name in ("low_freq_factor", "high_freq_factor"):
        if name in reads:
            found[name] = used.float(name)
    if "truncate" in reads:
        found["truncate"] = used.bool("truncate", True)
    for name in ("short_factor", "long_factor"):
        if name in reads:
            found[name] = used.floats(name)
    if "factor" in reads:
        given = used.has("factor") or not (kind == "longrope" or (kind == "yarn" and "factor" in used.data))
        ratio = 0.0 if given else whole.int("max_position_embeddings") / found["original_max_position"]
        found["factor"] = used.float("factor") if given else ratio  # of the two lengths, where it is left open
    _check_numbers(used, found, kind)
    return found


def _check_numbers(used: Fields, found: Mapping[str, Any], kind: str) -> None:
    """Numbers that are possible one by one may not be together."""
    if kind == "llama3" and found["low_freq_factor"] >= found["high_freq_factor"]:
        wanted = f"above low_freq_factor, {found['low_freq_factor']}"
        raise used.wrong("high_freq_factor", found["high_freq_factor"], wanted)
    if kind in ("yarn", "dynamic") and found["factor"] < 1:
        raise used.wrong("factor", found["factor"], "at least 1")
    if kind == "yarn" and found.get("beta_fast", 32.0) < found.get("beta_slow", 1.0):
        raise used.wrong("beta_fast", found.get("beta_fast", 32.0), "at least beta_slow")


def _check_key(used: Fields, name: str, value: Any, kind: str) -> None:
    """Raises `ModelError` for a key that the type does not read: the file probably means another type."""
    idle = name == ORIGINAL  # types that do not need it ignore it
    if value is None or idle or name in _OF_ALL or name in KINDS[kind].reads or (name, value) in _NEUTRAL:
        return
    raise ModelError(
        f"config.json: {used.prefix}{name} = {shown(value)} is not a key of rope_type {kind}, which reads "
        f"{', '.join(('rope_theta', *KINDS[kind].reads))}; rope types: {', '.join(ROPE_TYPES)}"
    )


def contradiction(one: Fields, name: str, other: Fields, value: str) -> ModelError:
    """The error for two places of config.json that differ: `name` in `one`, and `value` in `other`."""
    return ModelError(
        f"config.json: {one.prefix}{name} {shown(one.get(name))} contradicts {value} of {other.prefix.rstrip('.')}: "
        "leave out one of them"
    )
