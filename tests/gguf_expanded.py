"""A converted GGUF file whose blocks are dequantised, for what cannot read blocks: transformers' models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoengine.kernels.gguf import dequantise


def expanded_tensors(folder: Path) -> dict[str, Tensor]:
    """Name -> values, float32 where there are blocks in the file."""
    config = json.loads((folder / "config.json").read_text())
    kinds = config.get("quantization_config", {}).get("types", {})
    found = load_file(folder / "model.safetensors")
    return found | {
        f"{module}.weight": dequantise(found[f"{module}.weight"], kind).contiguous() for module, kind in kinds.items()
    }


def expanded_folder(folder: Path, into: Path) -> Path:
    """The same model in plain tensors, in the new folder `into`."""
    shutil.copytree(folder, into, ignore=shutil.ignore_patterns("*.safetensors", "nanoengine.json"))
    config = json.loads((into / "config.json").read_text())
    config.pop("quantization_config", None)
    (into / "config.json").write_text(json.dumps(config))
    save_file(expanded_tensors(folder), into / "model.safetensors", {"format": "pt"})
    return into
