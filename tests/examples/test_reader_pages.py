"""Pages that answer one question: their code runs, their configurations compose, their tables are those of the code."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nanoengine.cli.app import app
from nanoengine.cli.results import KEYS
from nanoengine.setup.config.config import load_config

ROOT = Path(__file__).parents[2]
TEXTS = {path.stem: path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md")}
LOG_PROBS = ("sampler.logprobs=1", "sampler.prompt_logprobs=1")
TESTED = {
    **dict.fromkeys(("results", "from-vllm", "chat", "models", "quantization", "tools"), "this file"),
    **dict.fromkeys(
        ("request", "blocks", "scheduler", "step", "attention", "sampling", "graphs", "tensor-parallelism"),
        "test_pages.py",
    ),
    "reference": "test_reference_page.py",
    "async": "test_async_page.py",
    "embeddings": "test_embeddings_page.py",
    "speculation": "test_speculation_page.py",
    "structured-output": "test_structured_output.py",
    "cli": "tests/cli/test_docs.py",
    "serving": "tests/server/test_docs.py",
    "http-api": "tests/server/test_docs.py",
    "plugin-api": "tests/architecture/test_plugin_api_doc.py",
    "layers": "tests/architecture/test_layers_doc.py",
    "writing-a-plugin": "tests/plugins/test_writing_a_plugin.py",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory where every model is the tiny one."""
    for home in ("llm", "build"):
        monkeypatch.setattr(f"nanoengine.{home}.find_model", lambda *arguments: tiny)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def execute(page: str) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for code in blocks(page, "python"):
        exec(compile(code, f"docs/{page}.md", "exec"), names)


def test_every_page_with_code_has_a_test() -> None:
    with_code = {page for page, text in TEXTS.items() if re.search(r"^```(python|sh|yaml)\n", text, re.MULTILINE)}
    assert with_code == set(TESTED)


@pytest.mark.parametrize("page", ["chat", "from-vllm"])
def test_code_runs(page: str, folder: Path) -> None:
    execute(page)


def test_commands_of_the_page_of_quantisation_run(folder: Path) -> None:
    lines = "".join(blocks("quantization", "sh")).splitlines()
    assert len(lines) == 2
    for line in lines:
        result = CliRunner().invoke(app, [*shlex.split(line, comments=True)[1:], "sampler.max_tokens=2"])
        assert result.exit_code == 0, f"{line}: {result.stderr}"


@pytest.mark.parametrize("page", ["models", "quantization", "tools", "scheduler"])
def test_configurations_compose(page: str, folder: Path) -> None:
    assert blocks(page, "yaml")
    for text in blocks(page, "yaml"):
        (folder / "page.yaml").write_text(text)
        load_config("page.yaml", [] if re.search("^model:", text, re.MULTILINE) else ["model=smollm2-135m"])


def test_options_of_vllm_become_keys_that_exist(folder: Path) -> None:
    rows = re.findall(r"^\| `(?:vllm|--)[^|]*` \| `([^`]+)`", TEXTS["from-vllm"], re.MULTILINE)
    assert len(rows) == 8
    for row in rows:
        words = shlex.split(row)
        config, *overrides = words[2:] if words[0] == "nanoengine" else ["quickstart", *words]
        load_config(config, overrides)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(folder: Path) -> list[dict[str, object]]:
    for line in "".join(blocks("results", "sh")).splitlines():
        program, *words = shlex.split(line)
        result = CliRunner().invoke(app, [*words, *LOG_PROBS, "sampler.max_tokens=2"])
        assert program == "nanoengine"
        assert result.exit_code == 0, result.stderr
    return [json.loads(row) for row in Path("results.jsonl").read_text("utf-8").splitlines()]


def keys(after: str) -> list[str]:
    """The first cells of the table that follows this text."""
    table = TEXTS["results"].partition(after)[2].partition("\n\n|")[2].partition("\n\n")[0]
    return re.findall(r"^\| `(\w+)`", f"|{table}", re.MULTILINE)


def test_every_key_of_the_results_is_on_the_page(results: list[dict[str, object]]) -> None:
    row = results[0]
    assert keys("## A row") == list(KEYS)
    assert set(row) == set(KEYS)
    assert row["outputs"]
    for sample in row["outputs"]:  # type: ignore[attr-defined]
        assert set(keys("Each of `outputs` has:")) == set(sample)
    assert set(keys("`metrics` has seconds")) == set(row["metrics"])  # type: ignore[call-overload]
    record = json.loads(Path("results.jsonl.run.json").read_text("utf-8"))
    said = TEXTS["results"].partition("## The record")[2]
    assert set(record) <= set(re.findall(r"`(\w+)`", said))


def test_the_results_are_read(results: list[dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    pandas_code, plain = blocks("results", "python")
    exec(compile(plain, "docs/results.md", "exec"), {})
    assert capsys.readouterr().out.count("->") == len(results)
    pytest.importorskip("pandas", reason="pip install -e '.[test]'")
    names: dict[str, object] = {}
    exec(compile(pandas_code, "docs/results.md", "exec"), names)
    table = names["rows"]
    assert list(table.index) == list(range(len(results)))  # type: ignore[attr-defined]
    texts = {row["index"]: row["outputs"][0]["text"] for row in results}  # type: ignore[index]
    assert table["text"].to_dict() == texts  # type: ignore[index]
    assert "0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_links(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        name, _, anchor = link.partition("#")
        if name.startswith("http"):
            continue
        assert not name or (ROOT / "docs" / name).exists(), link
        if not anchor:
            continue
        text = (ROOT / "docs" / name).read_text("utf-8") if name else TEXTS[page]
        heads = [
            re.sub(r"[^\w -]", "", head).lower().replace(" ", "-")
            for head in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        ]
        assert anchor in heads, link
