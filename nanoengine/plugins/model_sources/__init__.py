"""Built-in model sources: a model wheel, a folder, a .gguf file. Torch-free; targets are imported when asked."""

from __future__ import annotations

from nanoengine.api import API_VERSION, ModelSourceSpec, hookimpl


@hookimpl
def register_model_sources() -> list[ModelSourceSpec]:
    """Names come before paths, so that a folder that happens to be called like a model does not hide it."""
    here = "nanoengine.plugins.model_sources"
    return [
        ModelSourceSpec(
            name="smollm2-wheel",
            target=f"{here}.smollm2:SmolLM2Wheel",
            api=API_VERSION,
            order=10,
            models=("smollm2-135m",),
        ),
        ModelSourceSpec(name="folder", target=f"{here}.folder:FolderSource", api=API_VERSION, order=20),
        ModelSourceSpec(name="gguf_file", target=f"{here}.gguf_file:GGUFFileSource", api=API_VERSION, order=30),
    ]
