"""`nanoengine plugins doctor`, the real command: what works, what is refused and why, what a configuration lacks."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from nanoengine.testing.checkpoints import tiny_llama

Run = Callable[..., Result]
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
pytestmark = CPU_ONLY


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "tiny")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_modules: None) -> Callable[[str, str], None]:
    """install("nanoengine-x", code): a distribution on sys.path whose module registers itself by entry point."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def do(name: str, code: str) -> None:
        module = name.replace("-", "_")
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[nanoengine]\nplug = {module}\n")
        importlib.invalidate_caches()

    return do


def examined(result: Result) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The JSON, and its findings by name."""
    found = json.loads(result.stdout)
    return found, {finding["name"]: finding for finding in found["findings"]}


def repeated(result: Result, verdict: str) -> list[str]:
    """What stands below the verdict: errors and warnings, once more."""
    lines = result.stdout.splitlines()
    [at] = [number for number, line in enumerate(lines) if line.startswith(verdict)]
    return lines[at + 1 :]


def test_an_installation_that_works(nanoengine: Run) -> None:
    result = nanoengine("plugins", "doctor")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    sections = [line for line in lines if line and not line.startswith(" ")]
    assert sections[:3] == ["environment", "gpu", "plugins"]
    assert f"  ok       torch: {version('torch')}" in result.stdout
    assert "  ok       llama: model, nanoengine 0.1.0 (plugin 'builtin-models')" in lines
    assert any(line.startswith("  note     triton: not supported: needs an NVIDIA GPU (") for line in lines)
    assert any(line.startswith("  ok       torch: supported (preference 0, ") for line in lines)
    assert sum(line[11:].startswith("CPU kernels: ") for line in lines) == 1
    assert all(line.startswith("  warning  ") for line in repeated(result, "this configuration works: 0 errors"))
    at = lines.index("attention=auto takes: torch")
    assert lines[at - 1 : at + 1] == [
        "auto tries these in order, highest preference first: triton (20), flash_attn (10), torch (0)",
        "attention=auto takes: torch",
    ]


def test_structured_outputs_need_a_grammar_backend(
    nanoengine: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error only for a configuration that constrains outputs, or names a backend."""
    plain, asks = tmp_path / "plain.yaml", tmp_path / "asks.yaml"
    plain.write_text(f"model: {model}\nprompts: [hello]\n")
    asks.write_text(f"model: {model}\nprompts: [hello]\nsampler: {{structured_outputs: {{regex: a}}}}\n")
    _, findings = examined(nanoengine("plugins", "doctor", str(asks), "--json"))
    assert findings["grammar backend"] | {"level": "ok", "text": "auto takes LLGuidance"} == findings["grammar backend"]
    monkeypatch.setattr("nanoengine.setup.plugins.choose._is_there", lambda module: False)
    for config, overrides, level in (
        (plain, [], "note"),
        (asks, [], "error"),
        (plain, ["engine.structured_outputs.backend=xgrammar"], "error"),
    ):
        result = nanoengine("plugins", "doctor", str(config), *overrides, "--json")
        found = examined(result)[1]["grammar backend"]
        assert found["level"] == level
        assert "pip install 'nanoengine[" in found["text"]
        assert result.exit_code == (level == "error")


def test_json_says_the_same(nanoengine: Run) -> None:
    found, findings = examined(nanoengine("plugins", "doctor", "--json"))
    assert found["works"] is True
    assert found["attention"] == "torch"
    assert [b["name"] for b in found["backends"]] == ["triton", "flash_attn", "torch"]
    refused = {b["name"]: b["reasons"] for b in found["backends"]}
    assert refused["torch"] == []
    assert "needs flash_attn, not installed here" in refused["flash_attn"][0]
    assert findings["smollm2-wheel"]["level"] == "ok"


def test_a_model_with_the_choice_for_it(nanoengine: Run, model: Path) -> None:
    result = nanoengine("plugins", "doctor", "--model", str(model))
    assert result.exit_code == 0, result.output
    shape = json.loads((model / "config.json").read_text())
    size = shape["hidden_size"] // shape["num_attention_heads"]
    for line in (
        f"  ok       folder: {model}",
        "  ok       implementation: llama, nanoengine 0.1.0 (plugin 'builtin-models')",
        "  ok       weights: 0.00 GiB in float32",
        f"attention, for heads of {size} in float32 on cpu",
        "attention=auto takes: torch",
    ):
        assert line in result.stdout.splitlines()


def test_a_configuration_that_names_what_cannot_serve_here(nanoengine: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {model}\nattention: {{backend: triton}}\nprompts: [hello]\n")
    result = nanoengine("plugins", "doctor", "run.yaml", "--json")
    found, findings = examined(result)
    assert result.exit_code == 1
    assert found["works"] is False
    assert found["attention"] is None
    assert findings["run.yaml"]["level"] == "ok"
    (triton,) = [f for f in found["findings"] if f["section"].startswith("attention") and f["name"] == "triton"]
    assert triton["level"] == "error"
    assert "needs an NVIDIA GPU" in triton["text"]
    assert "attention=auto" in triton["fix"]
    again = nanoengine("plugins", "doctor", "run.yaml", "attention=torch")
    assert again.exit_code == 0, again.output
    assert "attention=torch takes: torch" in again.stdout


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("model: {model}\nengin: {{seed: 1}}\n", "did you mean 'engine'"),
        ("model: no-such-model\n", "no model 'no-such-model'"),
        ("model: {model}\nengine: {{device: cuda}}\n", "no usable CUDA device"),
        ("model: {model}\nengine: {{max_model_len: 100000}}\n", "the model was made for 256"),
        ("model: {model}\nattention: {{backend: tritn}}\n", "did you mean 'triton'"),
    ],
)
def test_a_configuration_that_cannot_run(nanoengine: Run, model: Path, tmp_path: Path, config: str, words: str) -> None:
    (tmp_path / "run.yaml").write_text(config.format(model=model) + "prompts: [hello]\n")
    result = nanoengine("plugins", "doctor", "run.yaml")
    assert result.exit_code == 1
    assert words in result.stdout
    [first, *_] = repeated(result, "this configuration cannot work: 1 error, ")
    assert first.startswith("  error    ")
    assert words in first
    assert "Traceback" not in result.output


def test_a_broken_package_is_a_warning_with_its_cause_and_fix(
    nanoengine: Run, install: Callable[[str, str], None]
) -> None:
    install("nanoengine-burst", "raise RuntimeError('the fuse blew')")
    result = nanoengine("plugins", "doctor")
    assert result.exit_code == 0, result.output
    at = result.stdout.index("nanoengine-burst 1.0 (plugin 'plug'): failed at import: RuntimeError: the fuse blew")
    shown = result.stdout[at : at + 900]
    assert "raise RuntimeError('the fuse blew')" in shown  # the traceback's last line
    assert "fix: pip uninstall nanoengine-burst" in shown
    assert "0 errors, 1 warning" in result.stdout


PROCESSOR = """
from dataclasses import dataclass
from nanoengine.api import SamplerSpec, ProcessorParams, hookimpl

@dataclass(frozen=True)
class Params(ProcessorParams):
    spice: float = 0.0

@hookimpl
def register_samplers():
    return [SamplerSpec(name="spice", params=Params, target="no_such_module:Spice", api=1)]
"""


def test_a_processor_that_cannot_load_is_an_error_for_a_configuration_that_uses_it(
    nanoengine: Run, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "spice.py").write_text(PROCESSOR)
    (tmp_path / "run.yaml").write_text(f"model: {model}\nprompts: [hello]\n")
    for overrides, code, level in (([], 0, "warning"), (["+sampler.spice=0.5"], 1, "error")):
        result = nanoengine("plugins", "doctor", "run.yaml", *overrides, "--plugin", "spice.py", "--json")
        _, findings = examined(result)
        assert findings["spice"]["level"] == level
        assert "no_such_module" in findings["spice"]["text"]
        fix = findings["spice"]["fix"]
        assert fix.startswith("correct SamplerSpec.target, now 'no_such_module:Spice'; or leave out --plugin")
        assert result.exit_code == code
        shown = nanoengine("plugins", "doctor", "run.yaml", *overrides, "--plugin", "spice.py")
        lines = repeated(shown, "this configuration ")
        [again] = [line for line in lines if line.startswith(f"  {level:<8} spice: logits processor")]
        assert again.endswith(f"; fix: {fix}")
        assert any(line.startswith("  warning  tokenizer: ") for line in lines)
        assert lines == sorted(lines, key=lambda line: line.startswith("  warning"))  # errors first


@pytest.mark.parametrize(
    ("target", "correct"),
    [
        ('f"{__name__}:Parms"', "correct SamplerSpec.target, now 'Parms' of plugin file "),
        ('"os.pth:Spice"', "correct SamplerSpec.target, now 'os.pth:Spice'"),
        ('"bad:Spice"', "leave out --plugin"),  # it is there, and fails by itself
    ],
)
def test_a_misspelled_target_is_to_be_corrected(
    nanoengine: Run, tmp_path: Path, forget_modules: None, monkeypatch: pytest.MonkeyPatch, target: str, correct: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "bad.py").write_text("import torch\ntorch.no_such_thing\n")
    (tmp_path / "spice.py").write_text(PROCESSOR.replace('"no_such_module:Spice"', target))
    _, findings = examined(nanoengine("plugins", "doctor", "--plugin", "spice.py", "--json"))
    assert findings["spice"]["fix"].startswith(correct)


def test_a_plugin_file_that_fails_is_an_error_and_the_rest_is_examined(nanoengine: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    result = nanoengine("plugins", "doctor", "--plugin", "bad.py", "--json")
    found, findings = examined(result)
    assert result.exit_code == 1
    assert "ZeroDivisionError" in findings["bad.py"]["text"]
    assert found["attention"] == "torch"


def test_a_package_outside_its_bounds(nanoengine: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: {"pluggy": "0.1", "tqdm": None}.get(name, "") or real(name))
    _, findings = examined(nanoengine("plugins", "doctor", "--json"))
    assert findings["pluggy"]["level"] == "warning"
    assert "0.1 is not in" in findings["pluggy"]["text"]
    assert findings["pluggy"]["fix"].startswith("pip install 'pluggy")
    assert findings["tqdm"]["level"] == "ok"


@pytest.mark.parametrize(("driver", "level"), [(None, "note"), ("driver 580.1 with a GPU", "warning")])
def test_without_triton_only_a_machine_with_a_gpu_is_warned(
    nanoengine: Run, monkeypatch: pytest.MonkeyPatch, driver: str | None, level: str
) -> None:
    from importlib import metadata

    real = metadata.version

    def version(name: str) -> str:
        if name == "triton":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr("nanoengine.lab.doctor.environment._driver", lambda: driver)
    found, _ = examined(nanoengine("plugins", "doctor", "--json"))
    (triton,) = [f for f in found["findings"] if (f["section"], f["name"]) == ("environment", "triton")]
    assert triton["level"] == level
    assert ("there is none here" in triton["text"]) == (driver is None)
    assert bool(triton["fix"]) == (driver is not None)


def test_a_torch_that_cannot_be_imported_is_reported_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from nanoengine.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "plugins", "doctor", "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    (broken,) = [f for f in found["findings"] if f["level"] == "error"]
    assert broken["name"] == "import torch"
    assert "libcudart" in broken["text"]
    assert broken["fix"]
    assert any(f["name"] == "llama" and "(not loaded)" in f["text"] for f in found["findings"])


def test_config_options_that_clash_and_roots_that_are_not_there(
    nanoengine: Run, install: Callable[[str, str], None], tmp_path: Path
) -> None:
    root = tmp_path / "site" / "acme_configs"
    (root / "sampler").mkdir(parents=True)
    (root / "sampler/greedy.yaml").write_text("temperature: 0\n")
    for name in ("acme_configs", "not_there"):
        code = f"from nanoengine.api import hookimpl\n@hookimpl\ndef register_configs():\n    return ['pkg://{name}']\n"
        install(f"nanoengine-{name}", code)
    _, findings = examined(nanoengine("plugins", "doctor", "--json"))
    assert findings["config groups"]["level"] == "warning"
    assert "sampler=greedy is provided by" in findings["config groups"]["text"]
    (broken,) = [finding for name, finding in findings.items() if name.startswith("nanoengine-not_there")]
    assert "pkg://not_there" in broken["text"]
    assert broken["fix"] == "pip uninstall nanoengine-not_there"
