"""Conformance kits: what the engine relies on in a plugin's part, each in one call from the plugin's own tests.

    from nanoengine.testing.conformance import check_attention_backend, check_model, check_processor

Each raises `ConformanceError`, an AssertionError that tells what was expected of which call; a CPU is enough.
"""

from nanoengine.testing.conformance.attention import check_attention_backend
from nanoengine.testing.conformance.failure import ConformanceError
from nanoengine.testing.conformance.model import check_model
from nanoengine.testing.conformance.processor import check_processor

__all__ = ["ConformanceError", "check_attention_backend", "check_model", "check_processor"]
