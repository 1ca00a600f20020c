"""docs/reference.md and nanoengine/params/signatures.py are those that the code makes."""

from __future__ import annotations

from importlib import import_module

import pytest
from source import ROOT

GENERATE = ROOT / "docs" / "generate"
AGAIN = "run `make reference`, or python docs/generate"


@pytest.fixture(autouse=True)
def generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GENERATE))


def test_the_page_is_what_the_code_makes() -> None:
    made = import_module("reference_page").page((GENERATE / "reference.md.in").read_text("utf-8"))
    assert made == (ROOT / "docs" / "reference.md").read_text("utf-8"), AGAIN


def test_the_signatures_are_what_the_code_makes() -> None:
    made = import_module("reference_signatures").signatures()
    assert made == (ROOT / "nanoengine" / "params" / "signatures.py").read_text("utf-8"), AGAIN
