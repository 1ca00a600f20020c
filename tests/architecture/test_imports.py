"""Which way imports run (docs/design.md), read from the source of every file."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from source import Import, Source, imports_of, sources, under

# package -> what of nanoengine it may import. The longest package that holds a module decides.
MAY_IMPORT = {
    "nanoengine.core": ("nanoengine.core", "nanoengine.layers", "nanoengine.kernels"),
    "nanoengine.core.scheduling": ("nanoengine.core",),
    "nanoengine.kernels": ("nanoengine.kernels",),
    "nanoengine.layers": ("nanoengine.layers", "nanoengine.kernels", "nanoengine.api"),
    "nanoengine.configs": ("nanoengine.configs", "nanoengine.api"),
    "nanoengine.api": ("nanoengine.core",),
}
PLUGINS_MAY_IMPORT = ("nanoengine.api", "nanoengine.layers", "nanoengine.kernels")
NEVER = {
    "nanoengine.core.scheduling": ("nanoengine.core.execution", "torch", "transformers"),
    "nanoengine.core.execution": ("nanoengine.core.scheduling",),
    "nanoengine.core.setup": ("nanoengine.core.scheduling",),
    "nanoengine.cli": ("nanoengine.plugins", "nanoengine.core.scheduling", "nanoengine.core.execution"),
}


def violations(source: Source) -> list[str]:
    return [
        f"{source.path}:{found.line} imports {found.module}"
        for found in source.imports
        if not allowed(source.module, found)
    ]


def allowed(module: str, found: Import) -> bool:
    if found.module.startswith("."):
        return False
    for package, forbidden in NEVER.items():
        if under(module, package) and any(under(found.module, bad) for bad in forbidden):
            return False
    if not under(found.module, "nanoengine"):
        return True
    if under(module, "nanoengine.plugins"):
        itself = ".".join(module.split(".")[:3])  # nanoengine.plugins.<kind>
        return any(under(found.module, good) for good in (*PLUGINS_MAY_IMPORT, itself))
    rules = [package for package in MAY_IMPORT if under(module, package)]
    if not rules:
        return True  # nanoengine itself, cli and testing
    return any(under(found.module, good) for good in MAY_IMPORT[max(rules, key=len)])


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
        ("nanoengine.core.engine", "from . import errors"),
        ("nanoengine.core.engine", "import nanoengine.cli"),
        ("nanoengine.plugins.models.x", "from nanoengine.core.errors import ModelError"),
        ("nanoengine.plugins.models.x", "from nanoengine.plugins.samplers.y import Y"),
        ("nanoengine.layers.x", "from nanoengine.core.execution import model"),
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
