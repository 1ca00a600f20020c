"""Finds a model: asks the model sources, in order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nanoengine.api.errors import ModelSourceError, nearest, shown
from nanoengine.api.plugin_calls import place_and_fix, plugin_call
from nanoengine.api.sources import ModelSource, SourceContext


def with_revision(source: str, revision: str | None) -> str:
    """`source@revision`, as model sources receive it. Raises `ModelSourceError` if a revision is given twice."""
    if revision is None:
        return source
    if "@" in source:
        raise ModelSourceError(f"model {source!r} has a revision, and revision={revision!r} is given: leave out one")
    return f"{source}@{revision}"


def resolve_model(
    source: str,
    sources: Sequence[tuple[str, ModelSource]],
    ctx: SourceContext,
    names: Sequence[str] = (),
    broken: Sequence[str] = (),
) -> Path:
    """The folder of the model, from the first source that has it.

    Args:
        sources: (description for messages, source). A source is skipped if it raises an error that is not ours, or
            returns something that is not a model folder.
        names: known names of models; if no source has the model, the message suggests the nearest.
        broken: sources that could not be made, with the cause; the message lists them if no source has the model.

    Raises `ModelSourceError`.
    """
    failed = list(broken)
    for where, candidate in sources:
        try:
            path = _answer(where, candidate, source, ctx)
        except _SourceBroken as error:
            failed.append(str(error))
            continue
        if path is not None:
            return path
    stem, _, revision = source.rpartition("@")
    there = stem and Path(os.path.expanduser(stem)).exists()
    pinned = f"; {stem} exists, but has no revisions: leave out @{revision}" if there else ""
    path = Path(os.path.expanduser(source))
    if _looks_like_path(source) and not os.path.exists(path) and not there:
        kind = "file" if path.suffix.lower() == ".gguf" else "folder"
        why = f"no such {kind}: {path.absolute()}"
    else:
        why = (
            "it is not a folder with a config.json, a .gguf file, a known name or a hub id such as "
            f"owner/name or owner/name@revision{pinned}; {nearest(source, names)}"
        )
    skipped = "".join(f". Skipped or failed source: {each}" for each in failed)
    raise ModelSourceError(f"no model {source!r}: {why}{skipped}")


def _answer(where: str, candidate: ModelSource, source: str, ctx: SourceContext) -> Path | None:
    """What `resolve` returns. Raises `_SourceBroken` for a wrong value, and for errors that are not ours."""
    cls = type(candidate)
    with plugin_call(f"{where} failed in {cls.__qualname__}.resolve", cls, _SourceBroken):
        path: object = candidate.resolve(source, ctx)
    if path is None:
        return None
    wrong = "" if isinstance(path, Path) else f"{shown(path)} of type {type(path).__name__}, not a pathlib.Path or None"
    if isinstance(path, Path) and not (path / "config.json").is_file():
        wrong = f"{path}, which has no config.json"
    if wrong:
        text = f"{where}: {cls.__qualname__}.resolve returned {wrong}"
        raise _SourceBroken(text + place_and_fix(None, cls.resolve, text))
    assert isinstance(path, Path)
    return path


class _SourceBroken(ModelSourceError):
    """The source is broken; this says nothing about the model."""


def _looks_like_path(source: str) -> bool:
    """Whether `source` can only be a path, not a name or a hub id."""
    if "://" in source:
        return False
    return source.startswith(("/", "./", "../", "~")) or source.count("/") > 1 or source.lower().endswith(".gguf")
