"""Third-party packages for real: wheels are built, installed into a new environment, and seen from there."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from plugin_environment import build_wheels, install, make_environment, run

PACKAGES = Path(__file__).parent / "packages"
NAMES = ("nanoengine-demo", "nanoengine-broken", "nanoengine-clash", "nanoengine-future")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("wheels")
    sources = [shutil.copytree(PACKAGES / name, root / name) for name in NAMES]  # a build writes beside its sources
    return build_wheels(sources, root / "dist")


@pytest.fixture(scope="module")
def python(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the four packages; nanoengine and torch come from ours."""
    python = make_environment(tmp_path_factory.mktemp("environment"))
    install(python, *wheels)
    return python


def in_environment(python: Path, code: str) -> Any:
    """What `code` assigns to `out`, run there, through JSON."""
    code = f"{PRELUDE}\n{code}\nprint(json.dumps(out))"
    return json.loads(run(python, "-c", code, cwd=python.parent).stdout)


PRELUDE = """
import json
from nanoengine.api.errors import NanoEngineError
from nanoengine.setup.plugins.discover import discover
registry = discover()
def message(look_up, *args, **kwargs):
    try:
        look_up(*args, **kwargs)
    except NanoEngineError as error:
        return f"{type(error).__name__}: {error}"
    raise SystemExit("no error was raised")
"""


def test_every_wheel_was_built(wheels: list[Path]) -> None:
    assert [wheel.name.split("-")[0].replace("_", "-") for wheel in wheels] == sorted(NAMES)


def test_what_the_packages_provide_and_why_some_do_not(python: Path) -> None:
    out = in_environment(
        python,
        """
by = lambda name: {f.at: f.cause for f in registry.failures if f.origin.distribution == name}
processor = registry.samplers["even_only"]
out = {
    "processor": [processor.origin.distribution, processor.origin.version, processor.spec.params().even_only],
    "roots": [root for root, origin in registry.config_roots if origin.distribution == "nanoengine-demo"],
    "demo": by("nanoengine-demo"), "broken": by("nanoengine-broken"), "future": by("nanoengine-future"),
    "clash": message(registry.require, "models", "demo"),
    "clash2": registry.model_for(["Clash2ForCausalLM"]).origin.version,
    "future_needed": message(registry.attention, "future"),
    "not_installed": message(registry.attention, "flashinfer"),
}""",
    )
    assert out["processor"] == ["nanoengine-demo", "0.3.1", False]
    assert out["roots"] == ["pkg://nanoengine_demo.configs"]
    assert out["demo"] == {}
    assert out["broken"] == {"import": "ModuleNotFoundError: No module named 'nanoengine_library_that_is_not_there'"}
    assert list(out["future"]) == ["attention backend 'future'"]
    assert "api 99, this nanoengine supports api 1; upgrade nanoengine" in out["future"]["attention backend 'future'"]
    assert "nanoengine-clash 0.0.9" in out["clash"]
    assert "nanoengine-demo 0.3.1" in out["clash"]
    assert out["clash2"] == "0.0.9"
    assert "nanoengine-future 7.0" in out["future_needed"]
    assert "no attention backend 'flashinfer' is installed" in out["not_installed"]
    assert "nanoengine-broken 1.2.3" in out["not_installed"]  # it may have been the one that provides it


def nanoengine(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "nanoengine", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=python.parent)


def test_the_listing_shows_parts_conflicts_and_failures(python: Path) -> None:
    done = nanoengine(python, "plugins", "list", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {(row["kind"], row["name"]): (row["distribution"], row["version"], row["api"]) for row in found["plugins"]}
    assert rows["sampler", "even_only"] == ("nanoengine-demo", "0.3.1", 1)
    assert rows["configs", "pkg://nanoengine_demo.configs"][0] == "nanoengine-demo"
    assert rows["model", "clash2"][0] == "nanoengine-clash"
    assert ("model", "demo") not in rows
    (conflict,) = found["conflicts"]
    assert (conflict["kind"], conflict["name"]) == ("model", "demo")
    assert "nanoengine-clash 0.0.9" in conflict["cause"]
    assert "nanoengine-demo 0.3.1" in conflict["cause"]
    failures = {failure["distribution"]: failure for failure in found["failures"]}
    assert sorted(failures) == ["nanoengine-broken", "nanoengine-future"]
    assert failures["nanoengine-broken"]["version"] == "1.2.3"
    assert "nanoengine_library_that_is_not_there" in failures["nanoengine-broken"]["cause"]
    assert "nanoengine_broken/__init__.py" in failures["nanoengine-broken"]["traceback"]
    assert "api 99" in failures["nanoengine-future"]["cause"]


def test_the_config_group_is_found_and_its_keys_are_legal(python: Path) -> None:
    done = nanoengine(python, "config", "show", "quickstart", "sampler=even")
    assert done.returncode == 0, done.stderr
    assert "even_only: true" in done.stdout
    assert "nanoengine_demo" in done.stdout  # where the value came from


@pytest.mark.parametrize(
    ("backend", "texts"),
    [
        ("future", ["nanoengine-future 7.0", "api 99", "upgrade nanoengine"]),
        ("flashinfer", ["'flashinfer'", "is installed", "nanoengine-broken 1.2.3"]),
    ],
)
def test_a_selected_part_that_is_not_there_is_a_usage_error(python: Path, backend: str, texts: list[str]) -> None:
    done = nanoengine(python, "run", "quickstart", f"attention.backend={backend}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [text for text in texts if text not in done.stderr] == []


def test_the_packages_model_and_processor_run(python: Path, tmp_path: Path) -> None:
    config = {"architectures": ["DemoForCausalLM"], "vocab_size": 64, "hidden_size": 32, "num_layers": 2,
              "num_heads": 4, "max_position_embeddings": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = in_environment(
        python,
        f"""
from nanoengine import LLM, SamplingParams
with LLM(model={str(tmp_path)!r}, load_format="dummy", num_gpu_blocks_override=32) as llm:
    prompts = [{{"prompt_token_ids": [1, 2, 3]}}, {{"prompt_token_ids": [5, 8]}}]
    free = SamplingParams(max_tokens=24, seed=1, ignore_eos=True)
    even = SamplingParams(max_tokens=24, seed=1, ignore_eos=True, even_only=True)
    outputs = llm.generate(prompts, [even, free], use_tqdm=False)
    out = {{"tokens": [list(each.outputs[0].token_ids) for each in outputs],
            "unknown": message(llm.generate, prompts, SamplingParams(even_onyl=True))}}
""",
    )
    constrained, free = out["tokens"]
    assert len(constrained) == len(free) == 24
    assert all(token % 2 == 0 for token in constrained)
    assert any(token % 2 == 1 for token in free)
    assert "did you mean 'even_only'" in out["unknown"]
