"""docs/writing-a-plugin.md, from an empty folder: every file is written and every command runs, in the page's order."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from plugin_environment import ENVIRONMENT, make_environment

from nanoengine.testing.checkpoints import tiny_llama

PAGE = (Path(__file__).parents[2] / "docs" / "writing-a-plugin.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # pip's own double negation
EXPECTED = re.compile(r"# exit status (\d+)(?:: (.+))?$")


def command_folder(python: Path) -> Path:
    """Where `nanoengine`, `pip` and `pytest` are those of the environment, as if nanoengine were installed there."""
    for name in ("nanoengine", "pip", "pytest"):
        script = python.parent / name
        script.write_text(f'#!/bin/sh\nexec "{python}" -m {name} "$@"\n')
        script.chmod(0o755)
    return python.parent


@pytest.mark.slow
def test_from_an_empty_folder_to_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    tiny = tiny_llama(tmp_path / "tiny", with_tokenizer=True)
    path = f"{command_folder(make_environment(tmp_path / 'environment'))}{os.pathsep}{os.environ['PATH']}"
    environment = {**ENVIRONMENT, **OFFLINE, "PATH": path}
    done: list[tuple[str, str]] = []
    for language, text in BLOCKS:
        if language != "sh":
            name = re.match(r"# file: (\S+)\n", text)
            assert name, f"a block without a file's name:\n{text}"
            file = folder / name[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text[name.end() :].replace("model: smollm2-135m", f"model: {tiny}"), "utf-8")
            continue
        for line in text.splitlines():
            ran = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
            expected = EXPECTED.search(line)
            assert ran.returncode == int(expected[1] if expected else 0), f"{line}\n{ran.stdout}\n{ran.stderr}"
            assert expected is None or expected[2] in ran.stderr, f"{line}\n{ran.stderr}"
            done.append((line, ran.stdout))
    outputs = dict(done)
    assert "nanoengine-skip-top" in outputs["nanoengine config list sampler"]
    assert "The second-best token, always" in outputs["nanoengine config list sampler"]
    assert re.search(r"\b2 passed", outputs["pytest nanoengine-skip-top"])
    assert re.search(r"\b6 passed", outputs["pytest test_stablelm.py"])
    assert "StableLmForCausalLM" in outputs["nanoengine plugins list --plugin stablelm.py"]
    assert any(line.startswith("nanoengine plugins new model") for line in outputs)
    record = json.loads((folder / "results.jsonl.run.json").read_text())
    assert record["config"]["attention"]["backend"] == "rows"
    assert "attention=auto takes: " in outputs["nanoengine plugins doctor run.yaml"]


def test_the_package_is_the_file_in_parts() -> None:
    """The page writes the processor twice; both must be the same."""
    files = {m[1]: text for _, text in BLOCKS if (m := re.match(r"# file: (\S+)\n", text))}
    package = "nanoengine-skip-top/nanoengine_skip_top/"
    for file, name in (("params.py", "class SkipTopParams"), ("processor.py", "class SkipTop(")):
        part = files[package + file]
        assert part[part.index(name) :].rstrip() in files["skip_top.py"]
