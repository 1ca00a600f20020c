"""The schema: what a file may hold; every mistake is reported with file, key and nearest name."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nanoengine.api.errors import ConfigError, PluginError
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.config.config import RunConfig, load_config
from nanoengine.setup.config.prompts import PromptFile
from nanoengine.setup.plugins.registry import Registry

Folder = Callable[[Mapping[str, str]], Path]
Load = Callable[..., RunConfig]
Refused = Callable[..., str]

ISSUE = """\
defaults:
  - model: smollm2-135m
  - sampler: greedy          # greedy, temperature, top_k, top_p, min_p
  - attention: auto
  - _self_
sampler:
  max_tokens: 64
engine:
  max_num_seqs: 64
prompts:                     # a list, or {file: prompts.jsonl, field: prompt}
  - Tell me the capital of France.
output: results.jsonl
"""


@pytest.fixture
def load(folder: Folder, registry: Registry) -> Load:
    def run(text: str, *overrides: str, **more: str) -> RunConfig:
        files = {name.replace("__", "/") + ".yaml": content for name, content in more.items()}
        path = folder({"run.yaml": text, **files}) / "run.yaml"
        return load_config(path, overrides, registry=registry)

    return run


@pytest.fixture
def refused(load: Load) -> Refused:
    def run(text: str, *overrides: str, **more: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides, **more)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def test_the_issue_s_own_file(load: Load, tmp_path: Path) -> None:
    config = load(ISSUE)
    assert config == RunConfig(
        model=config.model,
        sampler={"temperature": 0.0, "max_tokens": 64},
        engine=EngineOptions(max_num_seqs=64),
        prompts=("Tell me the capital of France.",),
        output="results.jsonl",
    )
    assert config.model.source == "smollm2-135m"
    assert config.attention.backend == "auto"
    assert config.chat is True
    assert config.provenance["sampler.temperature"] == "pkg://nanoengine.configs/sampler/greedy.yaml:1"
    assert config.provenance["sampler.max_tokens"] == f"{tmp_path}/run.yaml:7"
    assert config.provenance["prompts[0]"] == f"{tmp_path}/run.yaml:11"


def test_provenance_names_the_override_that_won(load: Load) -> None:
    config = load(ISSUE, "engine.max_num_seqs=3", "engine.max_num_seqs=4", "sampler=top_p", "model=./x")
    assert config.provenance["engine.max_num_seqs"] == "override 'engine.max_num_seqs=4'"
    assert config.provenance["sampler.top_p"] == "pkg://nanoengine.configs/sampler/top_p.yaml:2"
    assert config.provenance["model.source"] == "override 'model=./x'"
    assert config.engine.max_num_seqs == 4


def test_frozen(load: Load) -> None:
    config = load(ISSUE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.output = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.sampler["top_p"] = 1  # type: ignore[index]


MODELS: list[tuple[str, str | None]] = [
    ("smollm2-135m", "smollm2-135m"),  # a group file
    ("tiny-shelf-model", "tiny-shelf-model"),  # a source's own name
    ("./not/there", "./not/there"),
    ("org/name", "org/name"),
    ("/abs/x.gguf", "/abs/x.gguf"),
    ("here", "here"),  # an existing folder
    ("'here'", "here"),
    ("nowhere", None),
    ("smollm2-135n", None),
    ("tiny-shelf-modle", None),
    ("x.gguf", None),
]


@pytest.mark.parametrize(("option", "source"), MODELS)
def test_model_on_the_command_line(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str, source: str | None
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for text in (ISSUE, "prompts: [a]\n", "model: else\n"):
        if source is None:
            with pytest.raises(ConfigError, match=rf"override 'model={option}': no '{option}' in config group 'model'"):
                load(text, f"model={option}")
        else:
            assert load(text, f"model={option}").model.source == source


def test_nearest_model_is_a_group_file_or_a_source_s_name(refused: Refused) -> None:
    assert "did you mean 'smollm2-135m'?" in refused(ISSUE, "model=smollm2-135n")
    message = refused("defaults:\n  - model: tiny-shelf-modle\n")
    assert "run.yaml:2" in message
    assert "did you mean 'tiny-shelf-model'?" in message


def test_attention_by_file_by_name_and_not_at_all(load: Load, refused: Refused) -> None:
    assert load(ISSUE, "attention=torch").attention.backend == "torch"
    assert load(ISSUE, "attention=mirror").attention.backend == "mirror"
    assert "did you mean 'mirror'? Valid: auto, " in refused(ISSUE, "attention=miror")


@pytest.mark.parametrize(
    "text", ["model: some/where\n", "model: {source: some/where}\n", "defaults: [model: some/where]\n"]
)
def test_model_as_text_or_section(load: Load, text: str) -> None:
    assert load(text).model.source == "some/where"


def test_attention_as_text(load: Load) -> None:
    assert load("model: a/b\nattention: mirror\n").attention.backend == "mirror"
    assert load("model: a/b\nattention: {backend: mirror}\n").attention.backend == "mirror"


def test_backend_that_is_not_installed_is_a_plugin_error_with_its_place(load: Load, tmp_path: Path) -> None:
    with pytest.raises(PluginError) as caught:
        load("model: a/b\nattention: miror\n")
    assert f"{tmp_path}/run.yaml:2: attention.backend: no attention backend 'miror' is installed" in str(caught.value)
    assert "did you mean 'mirror'?" in str(caught.value)


def test_implementation_that_is_not_installed(load: Load, tmp_path: Path) -> None:
    assert load("model: {source: a/b, implementation: llama}\n").model.implementation == "llama"
    assert load("model: {source: a/b, revision: v1}\n").model.pinned == "a/b@v1"
    assert load("model: a/b\n", "model=c/d@refs/pr/3").model.pinned == "c/d@refs/pr/3"
    assert load("defaults: [{model: c/d@v1}, _self_]\n").model.pinned == "c/d@v1"
    with pytest.raises(PluginError, match=rf"{tmp_path}/run\.yaml:1: model\.implementation: .*did you mean 'llama'"):
        load("model: {source: a/b, implementation: lama}\n")


def test_absent_sampler_is_none_and_an_empty_one_is_not(load: Load) -> None:
    assert load("model: a/b\n").sampler is None
    assert load("model: a/b\nsampler:\n").sampler is None
    assert load("model: a/b\nsampler: {}\n").sampler == {}
    assert load(ISSUE, "~sampler", "~sampler.max_tokens").sampler == {}


def test_empty_sections_are_defaults(load: Load) -> None:
    config = load("model: a/b\nengine:\nattention:\nprompts:\noutput:\n")
    assert config.engine == EngineOptions()
    assert (config.attention.backend, config.prompts, config.output) == ("auto", None, None)


def test_interpolation_may_name_a_default(load: Load) -> None:
    config = load(
        "model: a/b\nengine:\n  max_num_seqs: 8\nsampler:\n  seed: ${engine.seed}\n  n: ${engine.max_num_seqs}\n"
    )
    assert config.sampler == {"seed": 0, "n": 8}


def test_values_keep_the_types_of_the_schema(load: Load) -> None:
    config = load(
        "model: a/b\n",
        "sampler.temperature=1",
        "sampler.top_p=1e-3",
        "sampler.logit_bias={5: -1}",
        "sampler.stop=[a,'b c']",
    )
    assert config.sampler == {"temperature": 1.0, "top_p": 0.001, "logit_bias": {5: -1.0}, "stop": ["a", "b c"]}
    assert type(config.sampler["temperature"]) is float


MISTAKES: list[tuple[str, list[str], list[str]]] = [
    # unknown keys, everywhere
    ("modl: x\n", [], ["run.yaml:1", "'modl'", "did you mean 'model'?"]),
    (
        "model: a/b\nengine:\n  max_num_seq: 3\n",
        [],
        ["run.yaml:3", "engine.max_num_seq'", "mean 'max_num_seqs'?"],
    ),
    (
        "model: {source: a/b, version: x}\n",
        [],
        ["run.yaml:1", "'model.version'", "Valid: implementation, revision, source"],
    ),
    ("model: {source: a/b@x, revision: x}\n", [], ["run.yaml:1", "model.revision", "names one: leave out one"]),
    ("model: a/b\nattention: {backen: x}\n", [], ["run.yaml:2", "did you mean 'backend'?"]),
    ("model: a/b\nsampler:\n  topp: 1\n", [], ["run.yaml:3", "'sampler.topp'", "did you mean 'top_p'?"]),
    ("model: a/b\nsampler:\n  best_of: 1\n", [], ["run.yaml:3", "'sampler.best_of'", "not supported"]),
    ("model: a/b\nprompts: {fil: x}\n", [], ["run.yaml:2", "'prompts.fil'", "did you mean 'file'?"]),
    ("model: a/b\nmax_num_seqs: 3\n", [], ["run.yaml:2", "did you mean 'engine.max_num_seqs'?"]),
    ("model: a/b\n1: 3\n", [], ["run.yaml:2", "unknown key '1'"]),
    ("model: a/b\nprovenance: {}\n", [], ["run.yaml:2", "unknown key 'provenance'"]),
    ("model: a/b\n", ["+engine.foo=1"], ["+engine.foo=1", "'engine.foo'"]),
    ("model: a/b\n", ["++foo.bar=1"], ["++foo.bar=1", "unknown key 'foo'"]),
    ("model: a/b\n", ["engine={foo: 1}"], ["engine={foo: 1}", "'engine.foo'"]),
    ("model: a/b\n", ["engine.seed.x=1"], ["engine.seed"]),
    # ... even where it was later deleted or replaced
    ("model: a/b\nengine: {foo: 1}\n", ["~engine.foo"], ["run.yaml:2", "'engine.foo'"]),
    ("model: a/b\nengine: {foo: 1}\n", ["++engine=null"], ["null chooses no option of engine", "or ~engine"]),
    # wrong types
    (
        "model: a/b\nengine:\n  max_num_seqs: many\n",
        [],
        ["run.yaml:3", "max_num_seqs must be an integer, not 'many'"],
    ),
    ("model: a/b\nengine:\n  max_num_seqs: 1.0\n", [], ["run.yaml:3", "must be an integer"]),
    ("model: a/b\nengine:\n  max_num_seqs: true\n", [], ["run.yaml:3", "must be an integer"]),
    ("model: a/b\nengine:\n  max_num_seqs: null\n", [], ["run.yaml:3", "must be an integer"]),
    ("model: a/b\nengine:\n  max_num_seqs: '8'\n", [], ["run.yaml:3", "must be an integer"]),
    ("model: a/b\nengine:\n  seed: [1]\n", [], ["run.yaml:3", "engine.seed"]),
    ("model: a/b\nengine:\n  overlap: 1\n", [], ["run.yaml:3", "engine.overlap"]),
    ("model: a/b\nengine:\n  dtype: float8\n", [], ["run.yaml:3", "engine.dtype", "float32", "'float8'"]),
    ("model: a/b\nengine: fast\n", [], ["run.yaml:2", "engine must be a mapping"]),
    ("model: a/b\nengine: [1]\n", [], ["run.yaml:2", "engine must be a mapping"]),
    ("model: 5\n", [], ["run.yaml:1", "model must be a mapping"]),
    ("model: {source: 5}\n", [], ["run.yaml:1", "model.source must be a string"]),
    ("model: {source: ''}\n", [], ["model.source must be given"]),
    ("model: a/b\nsampler: greedy\n", [], ["run.yaml:2", "sampler must be a mapping"]),
    ("model: a/b\nsampler: {temperature: hot}\n", [], ["run.yaml:2", "sampler.temperature must be a number"]),
    ("model: a/b\nsampler: {stop: [1]}\n", [], ["run.yaml:2", "sampler.stop"]),
    ("model: a/b\nsampler: {logit_bias: {a: 1}}\n", [], ["run.yaml:2", "sampler.logit_bias"]),
    ("model: a/b\nchat: maybe\n", [], ["run.yaml:2", "chat must be"]),
    ("model: a/b\noutput: 5\n", [], ["run.yaml:2", "output must be"]),
    ("model: a/b\noutput: ''\n", [], ["run.yaml:2", "output: is empty"]),
    # out of range
    (
        "model: a/b\nengine:\n  seed: 1\n  max_num_seqs: 0\n",
        [],
        ["run.yaml:4", "max_num_seqs must be at least 1"],
    ),
    ("model: a/b\nengine:\n  device: tpu\n", [], ["run.yaml:3", "engine.device"]),
    ("model: a/b\nsampler:\n  n: 1\n  top_p: 2\n", [], ["run.yaml:4", "sampler.top_p"]),
    ("model: a/b\nsampler:\n  max_tokens: 0\n", [], ["run.yaml:3", "sampler.max_tokens"]),
    (
        "model: a/b\nsampler:\n  max_tokens: 4\n  min_tokens: 5\n",
        [],
        ["run.yaml:4", "min_tokens", "max_tokens (4)"],
    ),
    # prompts
    ("model: a/b\nprompts: hello\n", [], ["run.yaml:2", "prompts must be a list"]),
    ("model: a/b\nprompts:\n  - fine\n  - Translate: hello\n", [], ["run.yaml:4", "prompts[1]", "quotes"]),
    ("model: a/b\nprompts:\n  - 42\n", [], ["run.yaml:3", "prompts[0]", "quotes"]),
    ("model: a/b\nprompts:\n  - yes\n", [], ["run.yaml:3", "prompts[0]", "quotes"]),
    ("model: a/b\nprompts:\n  -\n", [], ["run.yaml:3", "prompts[0]", "None"]),
    ("model: a/b\nprompts:\n  - [a, b]\n", [], ["run.yaml:3", "prompts[0]"]),
    (
        "model: a/b\nprompts:\n  - [{role: user, contents: x}]\n",
        [],
        ["run.yaml:3", "'contents'", "mean 'content'?"],
    ),
    ("model: a/b\nprompts:\n  - [{role: user}]\n", [], ["run.yaml:3", "needs 'content'"]),
    ("model: a/b\nprompts:\n  - 'say ${x}'\n", [], ["run.yaml:3", "prompts[0]", "\\${"]),
    ("model: a/b\nprompts:\n  - 'say ${'\n", [], ["run.yaml:3", "prompts[0]", "\\${"]),
    ("model: a/b\nprompts: {field: x}\n", [], ["run.yaml:2", "prompts.file must be given"]),
    ("model: a/b\nprompts: {file: 3}\n", [], ["run.yaml:2", "prompts.file must be"]),
    ("model: a/b\nprompts: {file: x, format: xml}\n", [], ["run.yaml:2", "prompts.format must be", "'csv'"]),
    ("model: a/b\nchat: false\nprompts:\n  - [{role: user, content: x}]\n", [], ["run.yaml:4", "chat is false"]),
    ("model: a/b\nprompts:\n  - {role: user, content: x}\n", [], ["run.yaml:3: prompts[0]", "is a list of messages"]),
    (
        "model: a/b\nprompts: [a, b]\n",
        ["prompts.file=x.jsonl"],
        ["'prompts.file=x.jsonl': prompts is a list, which has no key 'file'", "write 'prompts={file: x.jsonl}'"],
    ),
    (
        "model: a/b\nprompts: [a, b]\n",
        ["prompts.3=c"],
        ["'prompts.3': an item of a list cannot be overridden: set prompts as a whole"],
    ),
    ("model: a/b\nprompts: [[{role: user, content: x}]]\n", ["prompts[0].role=x"], ["set prompts as a whole"]),
    ("model: a/b\nengine: {dtype: half}\n", [], ["run.yaml:2: engine.dtype must be", "did you mean 'float16'?"]),
    ("model: a/b\n", ["engine.dtype=bf16"], ["not 'bf16'; did you mean 'bfloat16'?"]),
    # a group's file in the body
    ("model: a/b\nsampler: greedy\n", [], ["run.yaml:2: sampler must be a mapping", "'- sampler: greedy'"]),
    ("model: a/b\nengine: small\n", [], ["run.yaml:2: engine must be a mapping", "'- engine: small'"]),
    # no model
    ("prompts: [a]\n", [], ["run.yaml: no model is chosen", "smollm2-135m"]),
    ("", [], ["no model is chosen"]),
    ("model:\n", [], ["no model is chosen"]),
]


@pytest.mark.parametrize(("text", "overrides", "words"), MISTAKES)
def test_mistakes(refused: Refused, text: str, overrides: list[str], words: list[str]) -> None:
    message = refused(text, *overrides)
    assert [word for word in words if word not in message] == [], message


def test_unknown_key_in_a_group_file_names_that_file(refused: Refused, tmp_path: Path) -> None:
    message = refused("defaults:\n  - engine: mine\nmodel: a/b\n", engine__mine="seed: 1\nsede: 2\n")
    assert message.startswith(f"{tmp_path}/engine/mine.yaml:2: unknown key 'engine.sede'; did you mean 'seed'?")


def test_wrong_value_in_a_group_file_names_that_file(refused: Refused, tmp_path: Path) -> None:
    message = refused("defaults:\n  - sampler: mine\nmodel: a/b\n", sampler__mine="top_k: few\n")
    assert message.startswith(f"{tmp_path}/sampler/mine.yaml:1: sampler.top_k must be an integer")


def test_yaml_error_names_the_line(refused: Refused) -> None:
    assert "run.yaml:2" in refused("model: a/b\n  engine: 3\n")


PROMPTS: list[tuple[str, Any]] = [
    ("[a, 'b: c', 'x = y # z']", ("a", "b: c", "x = y # z")),
    ("['cost \\${5}', \"tab\\there\"]", ("cost ${5}", "tab\there")),
    ("['about ${model.source}']", ("about a/b",)),
    ("[[{role: system, content: s}, {role: user, content: u}], plain]",
     (({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), "plain")),
    ("{file: p.jsonl}", PromptFile(file="p.jsonl")),
    ("{file: p.jsonl, field: q}", PromptFile(file="p.jsonl", field="q")),
    ("{file: '-', format: csv}", PromptFile(file="-", format="csv")),
    ("questions.csv", PromptFile(file="questions.csv")),
    ("'-'", PromptFile(file="-")),
    ("[]", ()),
    ("['']", ("",)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), PROMPTS)
def test_prompts(load: Load, text: str, expected: Any) -> None:
    assert load(f"model: a/b\nprompts: {text}\n").prompts == expected
    assert load("model: a/b\nprompts: [old]\n", f"prompts={text}").prompts == expected


def test_a_lone_dash_on_the_command_line_is_standard_input(load: Load) -> None:
    assert load("model: a/b\nprompts: [old]\n", "prompts=-").prompts == PromptFile(file="-")


def test_a_folder_of_yaml_next_to_the_file_does_not_make_a_group_of_a_value(load: Load) -> None:
    config = load("model: a/b\n", "output=x.jsonl", "prompts=[a]", output__old="{}", prompts__old="{}")
    assert (config.output, config.prompts) == ("x.jsonl", ("a",))


def test_environment_variables(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOENGINE_TEST_FOLDER", "/somewhere")
    assert load("model: ${oc.env:NANOENGINE_TEST_FOLDER}/m\n").model.source == "/somewhere/m"
    assert load("model: a/b\n", "output=${oc.env:NANOENGINE_TEST_FOLDER}/x").output == "/somewhere/x"


def test_loading_a_configuration_imports_no_torch() -> None:
    code = "import sys, nanoengine; nanoengine.load_config('quickstart'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
