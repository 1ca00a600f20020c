"""docs/layers.md has every public name of `nanoengine.layers`, of `ctx.ops` and of the kits, and no other."""

from __future__ import annotations

import dataclasses
import inspect
import re
from functools import cached_property
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, is_typeddict

import pytest
from source import ROOT

from nanoengine import api, layers
from nanoengine.kernels.ops import Ops
from nanoengine.testing import conformance

TEXT = (ROOT / "docs" / "layers.md").read_text("utf-8")


def public() -> dict[str, Any]:
    """Name -> object."""
    modules = [import_module(f"{layers.__name__}.{module.name}") for module in iter_modules(layers.__path__)]
    found = {name: getattr(module, name) for module in modules for name in module.__all__}
    of_api = {id(getattr(api, name)) for name in api.__all__}
    kits = {name: getattr(conformance, name) for name in conformance.__all__ if name.startswith("check_")}
    return {name: value for name, value in found.items() if id(value) not in of_api} | {"Ops": Ops} | kits


NAMES = public()


def sections(text: str) -> dict[str, str]:
    """Name -> the text under its heading; a heading may have several names."""
    found = {}
    for names, below in re.findall(r"^### (`[^\n]*`)\n(.*?)(?=^##|\Z)", text, flags=re.MULTILINE | re.DOTALL):
        for name in re.findall(r"`(\w+)`", names):
            assert name not in found, f"docs/layers.md has two headings for {name}"
            found[name] = below
    return found


def documented(text: str) -> set[str]:
    """The first column of a section's table."""
    return set(re.findall(r"^\| `(.+?)` \| .{3,} \|$", text, flags=re.MULTILINE))


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def members(value: Any) -> set[str]:
    """What a table must have: parameters, and of a class also public methods and properties of its own."""
    if is_typeddict(value) or not (inspect.isclass(value) or inspect.isfunction(value)):
        return set()
    if not inspect.isclass(value):
        return set(parameters(value))
    own = {name: each for name, each in vars(value).items() if not name.startswith("_")}
    found = {name for name, each in own.items() if isinstance(each, property | cached_property)}
    for name, each in own.items():
        function = getattr(each, "__func__", each)
        if inspect.isfunction(function):
            found.add(f"{name}({', '.join(parameters(function))})")
    if dataclasses.is_dataclass(value):
        return found | {name for name in inspect.get_annotations(value) if not name.startswith("_")}
    init = vars(value).get("__init__")
    classvars = {name for name, kind in inspect.get_annotations(value).items() if "ClassVar" in str(kind)}
    return found | classvars | (set(parameters(init)) if init else set())


def test_each_module_says_what_is_public() -> None:
    for module in iter_modules(layers.__path__):
        found = import_module(f"{layers.__name__}.{module.name}")
        assert isinstance(getattr(found, "__all__", None), list), f"{found.__name__} has no __all__"
        assert [name for name in found.__all__ if not hasattr(found, name)] == []


def test_every_public_name_has_a_heading_and_no_other() -> None:
    found = sections(TEXT)
    assert sorted(found) == sorted(NAMES), "docs/layers.md and the `__all__` of nanoengine.layers differ"
    assert [name for name, below in found.items() if len(below.strip()) < 20] == []


def test_each_name_is_in_the_module_that_its_section_names() -> None:
    wrong = []
    for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        for heading, below in re.findall(r"^### (`[^\n]*`)\n(.*?)(?=^##|\Z)", part, flags=re.MULTILINE | re.DOTALL):
            own = re.findall(r"(?:`from|of) `?(nanoengine\.(?:layers|kernels)\.\w+)", below)
            modules = own or re.findall(r"`from (\S+) import", part)
            by_name = dict(re.findall(r"\(`(\w+)`: `(nanoengine\.layers\.\w+)`\)", part))
            for name in re.findall(r"`(\w+)`", heading):
                module = by_name.get(name, modules[0])
                wrong += [] if hasattr(import_module(module), name) else [f"{module} has no {name}"]
    assert wrong == []


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_and_method_is_in_the_table(name: str) -> None:
    assert documented(sections(TEXT)[name]) == members(NAMES[name]), f"docs/layers.md, ### `{name}`"


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_no_table_has_a_row_twice(page: str) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", (ROOT / "docs" / page).read_text("utf-8"), flags=re.MULTILINE):
        names = re.findall(r"^\| (`.+?`) \|", table, flags=re.MULTILINE)
        assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| `make_layer(name, index, config, ctx)` |", "| `make_layer(name, config, ctx)` |"),
        ("| `norm_bias` |", "| `norm_biases` |"),
        ("| `tolerance` |", "| `tolerances` |"),
    ],
)
def test_a_stale_page_would_be_noticed(old: str, new: str) -> None:
    assert TEXT.count(old) == 1
    stale = sections(TEXT.replace(old, new))
    assert [each for each, value in NAMES.items() if documented(stale[each]) != members(value)] != []
