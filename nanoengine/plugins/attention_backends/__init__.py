"""Built-in attention backends."""

from __future__ import annotations

from nanoengine.api import API_VERSION, AttentionSpec, hookimpl


@hookimpl
def register_attention_backends() -> list[AttentionSpec]:
    return [AttentionSpec(name="torch", target=f"{__name__}.torch_paged:TorchPaged", api=API_VERSION, preference=0)]
