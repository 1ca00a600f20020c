"""A model of the Hugging Face hub by its id: fetched by the huggingface_hub library into its cache, used from there.

The cache is the one that transformers, vLLM and `hf download` fill. The library's variables hold: HF_ENDPOINT,
HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from pathlib import Path

from nanoengine.api import ModelSource, SourceContext
from nanoengine.plugins.model_sources.conversion_cache import ConvertedModel, remembered_sha256
from nanoengine.plugins.model_sources.hub_repository import HubRepository

HUB_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/[\w.-]+(?<!\.gguf))(?:/(?P<file>[^@]+\.gguf))?(?:@(?P<revision>[^@\s]+))?", re.ASCII
)


class HubSource(ModelSource):
    """`owner/name`, `owner/name@revision`, and `owner/name/path/in/it.gguf`, with a revision or without."""

    def resolve(self, source: str, ctx: SourceContext) -> Path | None:
        """The snapshot's folder, or the folder that the .gguf file was converted into; None for what is no hub id.

        Raises `ModelSourceError` telling what the hub said, and the fix.
        """
        match = HUB_ID.fullmatch(source)
        if match is None or Path(source).exists():
            return None
        repository = HubRepository(match["repo"], match["revision"] or "main", ctx)
        if match["file"] is None:
            return repository.folder()
        path = repository.file(match["file"])
        return ConvertedModel(remembered_sha256(path, ctx), ctx).obtain(lambda scratch: path)
