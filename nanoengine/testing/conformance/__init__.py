"""Conformance kits: tests of everything that the engine requires of a plugin's part, each as one call in a test.

    from nanoengine.testing.conformance import check_attention_backend, check_drafter, check_grammar_backend
    from nanoengine.testing.conformance import check_model, check_policy, check_processor, check_tool_parser

Each raises `ConformanceError`, an AssertionError that says what was expected of which call. They need no GPU.
"""

from nanoengine.testing.conformance.attention import check_attention_backend
from nanoengine.testing.conformance.drafter import check_drafter
from nanoengine.testing.conformance.failure import ConformanceError
from nanoengine.testing.conformance.grammar import check_grammar_backend
from nanoengine.testing.conformance.model import check_model
from nanoengine.testing.conformance.policy import check_policy
from nanoengine.testing.conformance.processor import check_processor
from nanoengine.testing.conformance.tool_parser import ParserExample, check_tool_parser

__all__ = [
    "ConformanceError",
    "ParserExample",
    "check_attention_backend",
    "check_drafter",
    "check_grammar_backend",
    "check_model",
    "check_policy",
    "check_processor",
    "check_tool_parser",
]
