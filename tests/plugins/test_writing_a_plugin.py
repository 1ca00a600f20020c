"""docs/writing-a-plugin.md, from an empty folder: every file is written and every command runs, in the page's order."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from forked_programs import forked_programs
from plugin_environment import ENVIRONMENT, make_environment

from nanoengine.testing.checkpoints import tiny_llama

PAGE = (Path(__file__).parents[2] / "docs" / "writing-a-plugin.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # pip's own double negation
EXPECTED = re.compile(r"# exit status (\d+)(?:: (.+))?$")


class Typed:
    """Runs lines as in a shell where the environment is active. `nanoengine` is forked (tests/forked_programs.py), from
    another source when pip has installed something: one that began before would not see it."""

    def __init__(self, python: Path, folder: Path) -> None:
        self._python, self._folder = str(python), folder
        self._sources, self._starter = ExitStack(), None

    def __call__(self, line: str) -> subprocess.CompletedProcess[str]:
        words = shlex.split(line, comments=True)
        assert words[0] in ("nanoengine", "pip", "pytest"), line
        command, env = [self._python, "-m", *words], {**ENVIRONMENT, **OFFLINE}
        with pytest.MonkeyPatch.context() as patch:
            if words[0] == "nanoengine":
                self._starter = self._starter or self._sources.enter_context(forked_programs(self._python))
                patch.setattr(subprocess, "_fork_exec", self._starter)
            elif words[0] == "pip":
                self._close()
            return subprocess.run(command, cwd=self._folder, env=env, capture_output=True, text=True)

    def _close(self) -> None:
        self._starter = None
        self._sources.close()

    def __enter__(self) -> Typed:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


@pytest.mark.slow
def test_from_an_empty_folder_to_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    tiny = tiny_llama(tmp_path / "tiny", with_tokenizer=True)
    done: list[tuple[str, str]] = []
    with Typed(make_environment(tmp_path / "environment"), folder) as typed:
        for language, text in BLOCKS:
            if language != "sh":
                name = re.match(r"# file: (\S+)\n", text)
                assert name, f"a block without a file's name:\n{text}"
                file = folder / name[1]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text[name.end() :].replace("model: smollm2-135m", f"model: {tiny}"), "utf-8")
                continue
            for line in text.splitlines():
                ran = typed(line)
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
