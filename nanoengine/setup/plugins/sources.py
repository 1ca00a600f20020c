"""Where a model is: asks the source plugins, in order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nanoengine.api.errors import ModelSourceError, nearest, shown
from nanoengine.api.plugin_calls import place_and_fix, plugin_call
from nanoengine.api.sources import ModelSource, SourceContext


def with_revision(source: str, revision: str | None) -> str:
    """`source@revision`, the one form in which sources are asked for a revision; raises `ModelSourceError` for two."""
    if revision is None:
        return source
    if "@" in source:
        raise ModelSourceError(f"model {source!r} names a revision, and revision={revision!r} is given: leave out one")
    return f"{source}@{revision}"


def resolve_model(
    source: str,
    sources: Sequence[tuple[str, ModelSource]],
    ctx: SourceContext,
    names: Sequence[str] = (),
    broken: Sequence[str] = (),
) -> Path:
    """The first source's answer.

    Args:
        sources: each with what to call it in an error; one that fails by other than our errors, or
            gives no answer at all, is skipped.
        names: known ones, of which the nearest is named where nobody has the model. broken: sources that are not
            among `sources`, and why; told of then, too.

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
    pinned = f"; {stem} is there, but has no revisions: leave out @{revision}" if there else ""
    path = Path(os.path.expanduser(source))
    if _looks_like_path(source) and not os.path.exists(path) and not there:
        kind = "file" if path.suffix.lower() == ".gguf" else "folder"
        why = f"no such {kind}: {path.absolute()}"
    else:
        why = (
            "it is no folder with a config.json, no .gguf file, no known name and no hub id as in "
            f"owner/name or owner/name@revision{pinned}; {nearest(source, names)}"
        )
    unasked = "".join(f". Not asked, or without an answer: {each}" for each in failed)
    raise ModelSourceError(f"no model {source!r}: {why}{unasked}")


def _answer(where: str, candidate: ModelSource, source: str, ctx: SourceContext) -> Path | None:
    """Raises `_SourceBroken` for what is no answer, and for whatever `resolve` raises but our own errors."""
    cls = type(candidate)
    with plugin_call(f"{where} failed in {cls.__qualname__}.resolve", cls, _SourceBroken):
        path: object = candidate.resolve(source, ctx)
    if path is None:
        return None
    wrong = "" if isinstance(path, Path) else f"{shown(path)} of type {type(path).__name__}, not a pathlib.Path or None"
    if isinstance(path, Path) and not (path / "config.json").is_file():
        wrong = f"{path}, which holds no config.json"
    if wrong:
        text = f"{where}: {cls.__qualname__}.resolve answered {wrong}"
        raise _SourceBroken(text + place_and_fix(None, cls.resolve, text))
    assert isinstance(path, Path)
    return path


class _SourceBroken(ModelSourceError):
    """This source, not the model."""


def _looks_like_path(source: str) -> bool:
    """Whether no hub id or name is written so."""
    if "://" in source:
        return False
    return source.startswith(("/", "./", "../", "~")) or source.count("/") > 1 or source.lower().endswith(".gguf")
