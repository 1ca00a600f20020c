"""Built-in attention backends, in the order of `auto`.

triton: the fastest in our benchmarks (benchmarks/README.md); any block size, every dtype. flash_attn: an alternative
for bf16 and fp16 with block sizes that are multiples of 256. torch: runs everywhere; the reference.
"""

from __future__ import annotations

from nanoengine.api import API_VERSION, AttentionSpec, hookimpl


@hookimpl
def register_attention_backends() -> list[AttentionSpec]:
    return [
        AttentionSpec(
            name="triton",
            target=f"{__name__}.triton_paged:TritonPaged",
            api=API_VERSION,
            preference=20,
            requires=("triton",),
            install="pip install 'nanoengine[triton]'",
        ),
        AttentionSpec(
            name="flash_attn",
            target=f"{__name__}.flash_attn:FlashAttn",
            api=API_VERSION,
            preference=10,
            requires=("flash_attn",),
            install="pip install flash-attn --no-build-isolation",
        ),
        AttentionSpec(name="torch", target=f"{__name__}.torch_paged:TorchPaged", api=API_VERSION, preference=0),
    ]
