"""Built-in model sources: a model wheel, a folder, a hub id, a .gguf file. They import no torch."""

from __future__ import annotations

from nanoengine.api import API_VERSION, ModelSourceSpec, hookimpl


@hookimpl
def register_model_sources() -> list[ModelSourceSpec]:
    """The built-in sources. Names come before paths, so that a folder with the name of a model does not hide it.

    The hub comes last, also after sources of plugins, because it accepts every name of the form owner/name.
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
