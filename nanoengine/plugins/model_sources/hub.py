"""A model of the Hugging Face hub, by its id. The huggingface_hub library downloads it into its cache.

The cache is that of transformers, vLLM and `hf download`. The library's environment variables have an effect:
HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from pathlib import Path

from nanoengine.api import ModelSource, ModelSourceError, SourceContext
from nanoengine.plugins.model_sources.conversion_cache import ConvertedModel, remembered_sha256
from nanoengine.plugins.model_sources.hub_repository import HubRepository

HUB_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/[\w.-]+(?<!\.gguf))(?:/(?P<file>[^@]+\.gguf))?(?:@(?P<revision>[^@\s]+))?", re.ASCII
)


class HubSource(ModelSource):
    """`owner/name`, `owner/name@revision`, and `owner/name/path/in/it.gguf`, with or without a revision."""

    def resolve(self, source: str, ctx: SourceContext) -> Path | None:
        """The folder of the snapshot, or of the converted .gguf file; None if `source` is not a hub id.

        Raises `ModelSourceError` with the hub's error and the fix.
        """
        match = HUB_ID.fullmatch(source)
        if match is None or Path(source).exists():
            return None
        repository = HubRepository(match["repo"], match["revision"] or "main", ctx)
        if match["file"] is None:
            return repository.folder()
        try:
            path = repository.file(match["file"])
        except ModelSourceError as error:
            raise ModelSourceError(
                f"there is no file {source} here, and as a file of the hub's {repository.repo}: {error}"
            ) from error
        return ConvertedModel(remembered_sha256(path, ctx), ctx).obtain(lambda scratch: path)
