"""Which way imports run (docs/design.md), read from the source of every file."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from source import Import, Source, imports_of, sources, under

# From the bottom up: each may import what is below it. Those in one line do not import each other.
ORDER = (
    ("kernels",),
    ("api",),
    ("layers", "params"),
    ("text",),
    ("core",),
    ("observe",),
    ("setup",),
    ("distributed",),
    ("build",),
    ("build_engine",),
    ("text_engine",),
    ("stream",),
    ("llm",),
    ("service",),
    ("async_llm",),
    ("cli",),
    ("server",),
    ("lab",),
)
RANK = {f"nanoengine.{name}": rank for rank, names in enumerate(ORDER) for name in names}
# package -> what of nanoengine it may import, where that is less than all below it
ONLY = {
    "nanoengine.api": ("nanoengine.api", "nanoengine.kernels.ops"),
    "nanoengine.kernels": ("nanoengine.kernels",),
    "nanoengine.layers": ("nanoengine.layers", "nanoengine.kernels", "nanoengine.api"),
    "nanoengine.configs": ("nanoengine.configs", "nanoengine.api"),
    "nanoengine.plugins": ("nanoengine.api", "nanoengine.layers", "nanoengine.kernels"),
}
NEVER = {
    "nanoengine.core": ("nanoengine.layers", "nanoengine.plugins", "nanoengine.text"),
    "nanoengine.core.scheduling": ("nanoengine.core.execution", "nanoengine.kernels", "torch", "transformers"),
    "nanoengine.core.execution": ("nanoengine.core.scheduling",),
    "nanoengine.setup": ("nanoengine.core.scheduling",),
    "nanoengine.cli": ("nanoengine.plugins", "nanoengine.core.scheduling", "nanoengine.core.execution"),
    "nanoengine.testing": ("nanoengine.cli", "nanoengine.lab"),
}
# Imports that still run up, as "module -> package": the list may only get shorter.
KNOWN: frozenset[str] = frozenset()


def violations(source: Source) -> list[str]:
    return [
        f"{source.path}:{found.line} imports {found.module}"
        for source_module in (source.module,)
        for found in source.imports
        if not allowed(source_module, found) and f"{source_module} -> {unit_of(found.module)}" not in KNOWN
    ]


def unit_of(module: str) -> str:
    """nanoengine.<folder or file>, of what lies anywhere under it."""
    return ".".join(module.split(".")[:2])


def allowed(module: str, found: Import) -> bool:
    if found.module.startswith("."):
        return False
    for package, forbidden in NEVER.items():
        if under(module, package) and any(under(found.module, bad) for bad in forbidden):
            return False
    here, there = unit_of(module), unit_of(found.module)
    if not under(found.module, "nanoengine") or here == "nanoengine":
        return True
    if here in ONLY:
        own = ".".join(module.split(".")[:3]) if here == "nanoengine.plugins" else here  # nanoengine.plugins.<kind>
        return any(under(found.module, good) for good in (*ONLY[here], own))
    if here in RANK and there in RANK:
        return here == there or RANK[there] < RANK[here]
    return not (here in RANK and under(there, "nanoengine.plugins"))


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.module)
def test_imports_run_one_way(source: Source) -> None:
    assert violations(source) == []


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("nanoengine.core.execution.runner", "from nanoengine.plugins.models import x"),
        ("nanoengine.core.execution.runner", "from nanoengine.core.scheduling.scheduler import Scheduler"),
        ("nanoengine.core.scheduling.scheduler", "from nanoengine.core.execution.runner import Runner"),
        ("nanoengine.core.scheduling.scheduler", "def f():\n    import torch"),
        ("nanoengine.core.engine", "from . import request"),
        ("nanoengine.core.outputs", "from nanoengine.text import Tokenizer"),
        ("nanoengine.core.engine", "from nanoengine.setup.config import config"),
        ("nanoengine.setup.start.weights", "from nanoengine.distributed.wire import encode"),
        ("nanoengine.cli.run", "from nanoengine.lab.bench import roofline"),
        ("nanoengine.api.model", "from nanoengine.layers.linear import Linear"),
        ("nanoengine.api.model", "from nanoengine.kernels.rope import rope"),
        ("nanoengine.core.engine", "import nanoengine.cli"),
        ("nanoengine.plugins.models.x", "from nanoengine.core.step import StepPlan"),
        ("nanoengine.plugins.models.x", "from nanoengine.plugins.samplers.y import Y"),
        ("nanoengine.layers.x", "from nanoengine.core.execution import slots"),
        ("nanoengine.kernels.x", "from nanoengine.layers import linear"),
    ],
)
def test_the_rules_would_notice(module: str, statement: str) -> None:
    assert not all(allowed(module, found) for found in imports_of(ast.parse(statement)))


@pytest.mark.parametrize(
    "statement",
    [
        "import nanoengine",
        "import nanoengine.api",
        "import nanoengine.core.scheduling.scheduler",
        "from nanoengine import SamplingParams, load_config; SamplingParams()",
        "import nanoengine.service.remote, nanoengine.service.engine_process, nanoengine.service.text",
        "import sys; from nanoengine.cli import main; sys.argv[1:] = ['--help']; quietly(main)",
        "import sys; from nanoengine.cli import main; sys.argv[1:] = ['plugins', 'list']; quietly(main)",
    ],
)
def test_no_torch_until_a_model_is_wanted(statement: str) -> None:
    code = (
        "import sys\n"
        "def quietly(main):\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        f"{statement}\n"
        "heavy = {'torch', 'transformers', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def parts_of_triton(tree: ast.AST) -> set[str]:
    """Modules of Triton that are taken from the package by name, and not imported."""
    names = (each for each in ast.walk(tree) if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name))
    parts = ("knobs", "runtime", "compiler", "language", "backends", "tools", "testing")
    return {each.attr for each in names if each.value.id == "triton" and each.attr in parts}


def test_what_is_used_of_triton_is_imported() -> None:
    """The package lacks a part by its name where its first import failed, on a thread, and another one did not: Python
    then has the part already. Seen as "module 'triton' has no attribute 'knobs'" in a start."""
    assert {each.module: found for each in sources() if (found := parts_of_triton(each.tree))} == {}
    assert parts_of_triton(ast.parse("print(triton.knobs.cache.dir)")) == {"knobs"}
