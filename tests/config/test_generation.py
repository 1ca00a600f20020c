"""What generation_config.json says: taken over where it is of the right type, else refused by the file's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoengine.core.errors import ModelError
from nanoengine.core.setup.generation import read_generation_defaults

LEGAL = ("temperature", "top_k")


def test_defaults_of_installed_stages_under_our_names(tmp_path: Path) -> None:
    given = {"temperature": 1, "top_k": 5, "top_p": "of no stage here", "max_new_tokens": 7, "eos_token_id": [2, 3]}
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    found = read_generation_defaults(tmp_path, {}, LEGAL, 4)
    assert found.sampling == {"temperature": 1.0, "top_k": 5, "max_tokens": 7}
    assert found.eos_ids == {2, 3, 4}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", "hot", "temperature must be a number, not 'hot'"),
        ("temperature", True, "temperature must be a number, not True"),
        ("top_k", 2.5, "top_k must be an integer, not 2.5"),
        ("max_new_tokens", "many", "max_new_tokens must be an integer, not 'many'"),
        ("eos_token_id", "end", "eos_token_id"),
    ],
)
def test_a_wrong_type_names_the_file(tmp_path: Path, name: str, value: Any, words: str) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({name: value}))
    with pytest.raises(ModelError) as caught:
        read_generation_defaults(tmp_path, {}, LEGAL, None)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
