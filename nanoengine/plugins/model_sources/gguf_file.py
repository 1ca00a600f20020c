"""A .gguf file on disk. It is converted once to a folder in the cache, which is then used."""

from __future__ import annotations

import os
from pathlib import Path

from nanoengine.api import ModelSource, ModelSourceError, SourceContext
from nanoengine.plugins.model_sources.conversion_cache import ConvertedModel, remembered_sha256
from nanoengine.plugins.model_sources.hub import HUB_ID


class GGUFFileSource(ModelSource):
    """Paths that end in .gguf."""

    def resolve(self, source: str, ctx: SourceContext) -> Path | None:
        """The converted folder; None if `source` does not end in .gguf, or may be a file of a hub repository.

        Raises `ModelSourceError` if there is no such file, or if it is not supported.
        """
        if not source.lower().endswith(".gguf"):
            return None
        path = Path(os.path.expanduser(source))
        if not path.is_file():
            if HUB_ID.fullmatch(source):
                return None
            raise ModelSourceError(f"no such file: {path} (working directory: {Path.cwd()})")
        try:
            digest = remembered_sha256(path, ctx)
        except OSError as error:
            raise ModelSourceError(
                f"cannot read {path} or write the cache {ctx.cache} (set NANOENGINE_CACHE to use another one): {error}"
            ) from error
        return ConvertedModel(digest, ctx).obtain(lambda scratch: path)
