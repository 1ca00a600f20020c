"""Model folders in Hugging Face format: config.json, safetensors and tokenizer files."""

from __future__ import annotations

import os
from pathlib import Path

from nanoengine.api import ModelSource, ModelSourceError, SourceContext


class FolderSource(ModelSource):
    """Paths of folders that have a config.json."""

    def resolve(self, source: str, ctx: SourceContext) -> Path | None:
        """The folder as an absolute path; None if `source` is not a folder.

        Raises `ModelSourceError` for a folder without config.json; the message says what it has instead.
        """
        folder = Path(os.path.expanduser(source))
        if not folder.is_dir():
            return None
        if (folder / "config.json").is_file():
            return folder.resolve()
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        if ggufs:
            fix = f"give a .gguf file in it instead: {', '.join(str(folder / name) for name in ggufs[:4])}"
        elif any(folder.glob("*/config.json")):
            inner = sorted(str(path.parent) for path in folder.glob("*/config.json"))
            fix = f"did you mean a folder inside it? {', '.join(inner[:4])}"
        else:
            fix = "a model folder has config.json, *.safetensors and the tokenizer's files"
        raise ModelSourceError(f"folder {folder} is not a model: it has no config.json; {fix}")
