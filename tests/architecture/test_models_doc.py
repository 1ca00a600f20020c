"""docs/models.md names every architecture, and shows what each model plugin takes."""

from __future__ import annotations

import re

from source import PACKAGE, ROOT

from nanoengine.plugins.models import register_models

TEXT = (ROOT / "docs" / "models.md").read_text("utf-8")
FAMILIES = TEXT[TEXT.index("## Families") : TEXT.index("## GGUF files")]


def test_every_architecture_is_named_and_no_other() -> None:
    ours = {architecture for spec in register_models() for architecture in spec.architectures}
    assert set(re.findall(r"`(\w+For\w+|\w+LMHeadModel)`", FAMILIES)) == ours


def test_each_plugin_is_shown_with_its_lines_and_its_parity() -> None:
    modules = {spec.target.partition(":")[0].rpartition(".")[2] for spec in register_models()}
    files = {name: PACKAGE / "plugins" / "models" / f"{name}.py" for name in sorted(modules)}
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in files.items()}
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| .{4,} \| (\d\.\de-\d+) \|$", FAMILIES, flags=re.MULTILINE)
    assert {name: int(count) for name, count, _ in rows} == lines
    assert [name for name, _, error in rows if not float(error) < 5e-4] == []


def test_half_of_the_plugins_have_at_most_45_lines() -> None:
    rows = sorted(int(count) for count in re.findall(r"^\| `\w+` \| (\d+) \|", FAMILIES, flags=re.MULTILINE))
    assert rows[(len(rows) - 1) // 2] <= 45
