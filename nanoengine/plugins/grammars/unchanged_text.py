"""A tokenizer.json for llguidance, which splits texts that must come next into tokens: as they are, not normalised.

With NFC, as many tokenizers have it, it would allow a token of another text, and then refuse it.
"""

from __future__ import annotations

import json
import re
from typing import Any

_NORMALIZER = re.compile(r'"normalizer"\s*:\s*')
_SPELLING = ("Replace", "Prepend")  # write a space as the vocabulary has it


def with_unchanged_text(tokenizer_json: str) -> str:
    """The tokenizer without the normalizers that make another text of a text. Only that part of it is read."""
    found = _NORMALIZER.search(tokenizer_json)
    if found is None:
        return tokenizer_json
    try:
        normalizer, end = json.JSONDecoder().raw_decode(tokenizer_json, found.end())
    except ValueError:
        return tokenizer_json  # llguidance says what is wrong
    return tokenizer_json[: found.end()] + json.dumps(_kept(normalizer)) + tokenizer_json[end:]


def _kept(normalizer: Any) -> Any:
    if not isinstance(normalizer, dict) or normalizer.get("type") in _SPELLING:
        return normalizer
    several = normalizer.get("normalizers")
    if isinstance(several, list):
        return {**normalizer, "normalizers": [each for each in map(_kept, several) if each is not None]}
    return None
