"""The package's source files as the architecture tests read them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nanoengine"


@dataclass(frozen=True)
class Import:
    """`module` as written at `line`; `typing_only` under `if TYPE_CHECKING`."""

    module: str
    line: int
    typing_only: bool


@dataclass(frozen=True)
class Source:
    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def imports(self) -> list[Import]:
        return list(imports_of(self.tree))


def imports_of(tree: ast.AST, typing_only: bool = False) -> Iterator[Import]:
    """Every import in the tree, those inside functions too. A relative one shows as "." and its module."""
    for node in ast.iter_child_nodes(tree):
        inside = typing_only or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from package import module` names the module too.
            yield from (Import(f"{base}.{alias.name}", node.lineno, inside) for alias in node.names)
        yield from imports_of(node, inside)


@cache
def sources() -> tuple[Source, ...]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Source(path, module, text, ast.parse(text)))
    assert len(found) > 20, "the package's sources were not found"
    return tuple(found)


def under(name: str, package: str) -> bool:
    """Whether the dotted `name` is `package` or lies in it."""
    return name == package or name.startswith(package + ".")
