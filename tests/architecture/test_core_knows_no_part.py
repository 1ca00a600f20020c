"""The core knows no model, sampler or backend by name, and keeps no state in modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from source import Source, sources, under

PARTS = re.compile(r"qwen|llama|smollm|gemma|mistral|flash[_-]?attn|flash[_-]?infer|triton_paged", re.IGNORECASE)
CORE = [source for source in sources() if under(source.module, "nanoengine.core")]

MAKERS = {"list", "dict", "set", "defaultdict", "OrderedDict", "Counter", "deque", "bytearray", "WeakValueDictionary"}
READ_ONLY = ("Mapping", "Sequence", "Final", "frozenset", "Iterable", "Set")
MUTATORS = {"append", "extend", "insert", "remove", "pop", "clear", "update", "add", "discard", "setdefault", "popitem"}


@pytest.mark.parametrize("source", CORE, ids=lambda source: source.module)
def test_the_core_names_no_model_and_no_backend(source: Source) -> None:
    assert [f"{n}: {line}" for n, line in enumerate(source.text.splitlines(), 1) if PARTS.search(line)] == []


def mutable_globals(tree: ast.Module) -> Iterator[str]:
    """Module-level containers that are neither declared read-only nor constants that are never changed."""
    changed = set(changed_names(tree))
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if _annotated(node) else []
        for target in targets:
            if not isinstance(target, ast.Name) or not _mutable(node.value):  # type: ignore[attr-defined]
                continue
            declared = isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith(READ_ONLY)
            constant = target.id == target.id.upper() or target.id == "__all__"
            if target.id in changed or not (declared or constant):
                yield f"line {node.lineno}: {target.id}"
    yield from (f"line {n.lineno}: global {', '.join(n.names)}" for n in ast.walk(tree) if isinstance(n, ast.Global))


def changed_names(tree: ast.AST) -> Iterator[str]:
    """Names that some statement writes into."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            owner: ast.expr = node.func.value
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            owner = node.value
        else:
            continue
        if isinstance(owner, ast.Name):
            yield owner.id


def _annotated(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and node.value is not None


def _mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in MAKERS
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.module)
def test_no_state_in_modules(source: Source) -> None:
    assert list(mutable_globals(source.tree)) == []


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("cache = {}", 1),
        ("CACHE = {}\ndef f(k): CACHE[k] = 1", 1),
        ("SEEN: Mapping[str, int] = {}\ndef f(): SEEN.update(a=1)", 1),
        ("names = defaultdict(list)", 1),
        ("x = 1\ndef f():\n    global x\n    x = 2", 1),
        ("TABLE = {'a': 1}", 0),
        ("table: Mapping[str, int] = {'a': 1}", 0),
        ("__all__ = ['a']", 0),
        ("def f():\n    local = {}\n    local['a'] = 1", 0),
    ],
)
def test_the_rule_would_notice(code: str, count: int) -> None:
    assert len(list(mutable_globals(ast.parse(code)))) == count
