"""Built-in model sources: a model wheel, a folder, a hub id, a .gguf file. Torch-free, as are the targets."""

from __future__ import annotations

from nanoengine.api import API_VERSION, ModelSourceSpec, hookimpl


@hookimpl
def register_model_sources() -> list[ModelSourceSpec]:
    """Names come before paths, so that a folder that happens to be called like a model does not hide it.

    The hub comes last, behind other people's sources too: whatever has the form owner/name is its own.
    """
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
        ModelSourceSpec(name="hub", target=f"{here}.hub:HubSource", api=API_VERSION, order=1000),
    ]
