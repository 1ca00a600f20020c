"""`config show` and `plugins list`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import Result

from nanoengine.cli.config import render
from nanoengine.setup.config.config import ModelSection, RunConfig, load_config
from nanoengine.setup.plugins.discover import discover

Run = Callable[..., Result]
REGISTRY = discover()

ODD = """\
model: a/b
attention: torch
engine:
  max_num_seqs: 7
sampler:
  stop: ["a: b", "# c", "'", "\\n", "null"]
  logit_bias: {5: -1.5}
  seed: 3
prompts:
  - "two\\nlines\\n  indented"
  - - {role: user, content: "a\\n\\nb: ${model.source}"}
  - 日本 é
output: "x # y.jsonl"
"""


def test_show_composes_to_the_same_configuration(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(ODD, "utf-8")
    config = load_config(tmp_path / "run.yaml", ["sampler.min_p=0.5", "engine.seed=9"])
    (tmp_path / "again.yaml").write_text(render(config), "utf-8")
    assert load_config(tmp_path / "again.yaml") == config


@given(st.lists(st.text(st.sampled_from("ab ${}\\:#'\"\n\t-[],&*!|>%@`~0é日\x1b\u2028🙂")), min_size=1, max_size=4))
def test_any_text_survives_show(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "shown.yaml"
    path.write_text(render(RunConfig(model=ModelSection(source="a/b"), prompts=tuple(texts))), "utf-8", newline="\n")
    assert load_config(path, registry=REGISTRY).prompts == tuple(texts)


def test_show_names_the_origin_of_each_value(nanoengine: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("defaults: [sampler: top_p]\nmodel: a/b\nengine:\n  seed: 5\nprompts: [a]\n")
    result = nanoengine("config", "show", "run.yaml", "engine.max_num_seqs=3", "+sampler.n=2")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for line in (
        "  source: a/b  # run.yaml:2",
        "  seed: 5  # run.yaml:4",
        "  max_num_seqs: 3  # override 'engine.max_num_seqs=3'",
        "  top_p: 0.9  # pkg://nanoengine.configs/sampler/top_p.yaml:2",
        "  n: 2  # override '+sampler.n=2'",
        "  overlap: true  # default",
        "output: null  # default",
        "prompts:  # run.yaml:5",
    ):
        assert line in lines
    assert yaml.safe_load(result.stdout)["engine"]["seed"] == 5


def test_show_names_an_override_that_changed_a_part_of_a_value(nanoengine: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: a/b\nsampler:\n  logit_bias: {5: 1}\nprompts: {file: p.jsonl}\n")
    result = nanoengine("config", "show", "run.yaml", "prompts.field=q", "sampler.logit_bias={7: 2}")
    lines = result.stdout.splitlines()
    assert "prompts:  # run.yaml:4, override 'prompts.field=q'" in lines
    assert "  logit_bias:  # run.yaml:3, override 'sampler.logit_bias={7: 2}'" in lines
    assert yaml.safe_load(result.stdout)["sampler"]["logit_bias"] == {5: 1.0, 7: 2.0}


def test_override_of_several_lines_stays_a_comment(nanoengine: Run) -> None:
    result = nanoengine("config", "show", "quickstart", "prompts=['a\n\nb']")
    assert yaml.safe_load(result.stdout)["prompts"] == ["a\nb"]


def test_show_without_sampler(nanoengine: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: a/b\n")
    assert "sampler: null  # default" in nanoengine("config", "show", "run.yaml").stdout.splitlines()


PLUGIN = """\
from nanoengine.api import AttentionSpec, hookimpl

@hookimpl
def register_attention_backends():
    return [AttentionSpec(name="mirror", target="mine:Mirror", api=1)]
"""


def test_list_as_json(nanoengine: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    found = json.loads(nanoengine("plugins", "list", "--json", "--plugin", "mine.py").stdout)
    parts = {(part["kind"], part["name"]): part for part in found["plugins"]}
    top_k = parts["sampler", "top_k"]
    assert (top_k["distribution"], top_k["api"], top_k["version"]) == ("nanoengine", 1, "0.1.0")
    assert top_k["origin"] == "nanoengine.plugins.samplers"
    assert top_k["target"] == "nanoengine.plugins.samplers.top_k:TopK"
    mirror = parts["attention_backend", "mirror"]
    assert mirror["origin"] == str((tmp_path / "mine.py").resolve())
    assert mirror["distribution"] is None
    assert ("configs", "pkg://nanoengine.configs") in parts
    assert found["conflicts"] == []


def test_list_shows_the_architectures_of_models(nanoengine: Run, tmp_path: Path) -> None:
    two = 'ModelSpec(name="pair", architectures=("OneForCausalLM", "TwoForCausalLM"), target="pair:Pair", api=1)'
    hook = f"@hookimpl\ndef register_models():\n    return [{two}]\n"
    (tmp_path / "pair.py").write_text(f"from nanoengine.api import ModelSpec, hookimpl\n\n{hook}")
    lines = nanoengine("plugins", "list", "--plugin", "pair.py").stdout.splitlines()
    assert ["pair:Pair", "OneForCausalLM,", "TwoForCausalLM"] in [line.split()[-3:] for line in lines]
    rows = json.loads(nanoengine("plugins", "list", "--json", "--plugin", "pair.py").stdout)["plugins"]
    shown = {(row["kind"], row["name"]): row["architectures"] for row in rows}
    assert shown["model", "pair"] == ["OneForCausalLM", "TwoForCausalLM"]
    assert shown["model", "gpt2"] == ["GPT2LMHeadModel"]
    assert shown["sampler", "top_k"] is None
    assert all((architectures is None) == (kind != "model") for (kind, _), architectures in shown.items())


@pytest.mark.parametrize("arguments", [["plugins"], ["plugins", "list"]])
def test_list_as_a_table(nanoengine: Run, arguments: list[str]) -> None:
    result = nanoengine(*arguments)
    assert result.exit_code == 0
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["kind", "name", "distribution", "version", "origin", "api", "target", "architectures"]
    assert [line.split()[:4] for line in lines if " top_k " in line] == [["sampler", "top_k", "nanoengine", "0.1.0"]]


def test_list_shows_conflicts_and_failures(nanoengine: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An installed plugin that fails at import: a distribution of two files on the path.
    info = tmp_path / "nanoengine_broken-3.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nanoengine-broken\nVersion: 3.2\n")
    (info / "entry_points.txt").write_text("[nanoengine]\nbroken = nanoengine_broken_module\n")
    (tmp_path / "nanoengine_broken_module.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(PLUGIN.replace("mirror", "torch"))
    text = nanoengine("plugins", "list", "--plugin", "mine.py")
    assert text.exit_code == 0
    assert "nanoengine-broken 3.2 (plugin 'broken') failed at import: ModuleNotFoundError" in text.stdout
    assert "attention backend 'torch' is registered by nanoengine" in text.stdout
    found = json.loads(nanoengine("plugins", "list", "--json", "--plugin", "mine.py").stdout)
    [failure] = found["failures"]
    assert (failure["distribution"], failure["version"], failure["at"]) == ("nanoengine-broken", "3.2", "import")
    assert "a_module_that_is_not_there" in failure["cause"]
    assert [(c["kind"], c["name"], len(c["origins"])) for c in found["conflicts"]] == [
        ("attention_backend", "torch", 2)
    ]
