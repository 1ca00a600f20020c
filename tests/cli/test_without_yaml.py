"""What the command line understands besides a YAML file: a model, an option that is an override, sizes, completion."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nanoengine.api.errors import ConfigError, ParamsError
from nanoengine.cli.app import app
from nanoengine.cli.completion import configurations, overrides
from nanoengine.params.field_types import Bytes, conform, conform_text
from nanoengine.setup.config.config import load_config

Run = Callable[..., Result]


@pytest.mark.parametrize("command", [["run", "model=a/b"], ["run", "a/b"], ["run", "bare", "model=a/b"]])
def test_a_run_needs_no_yaml(fake: Any, nanoengine: Run, tmp_path: Path, command: list[str]) -> None:
    result = nanoengine(*command, "prompts=[hi]", "sampler.max_tokens=3")
    assert result.exit_code == 0, result.stderr
    [llm] = fake.made
    assert (llm.config.model.source, llm.config.output) == ("a/b", None)
    assert llm.config.sampler == {"max_tokens": 3}
    assert "[0] hi" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_name_a_folder_and_a_file_are_models_of_the_recipe_bare(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").touch()
    (tmp_path / "x.gguf").touch()
    for model in ("smollm2-135m", "owner/name", "owner/name@v1", str(tmp_path / "folder"), str(tmp_path / "x.gguf")):
        config = load_config(model, ["sampler.temperature=0"])
        assert (config.model.source, config.output, config.prompts) == (model, None, None)


@pytest.mark.parametrize("name", ["smollm2-135", "./no/such", "no-such.yaml", "owner/name.yaml", "quickstrat"])
def test_a_mistyped_name_is_no_model(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no file, recipe or model is called|no configuration file"):
        load_config(name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-tokens", "5"], "Write sampler.max_tokens=5"),
        (["--temperature=0.5"], "Write sampler.temperature=0.5"),
        (["--max-tokens", "prompts=[hi]"], "Write sampler.max_tokens=VALUE"),
        (["--max-num-seqs", "8"], "Write engine.max_num_seqs=8"),
        (["--model", "owner/name"], "Write model=owner/name"),
        (["--cfg", "job"], "nanoengine config show CONFIG"),
        (["--nonsense"], "No such option: --nonsense\n"),
        (["--temp", "0.2"], "Write sampler.temperature=0.2"),
        (["--temprature=0.2"], "Write sampler.temperature=0.2"),
        (["--sampler", "greedy"], "Write sampler=greedy"),
        (["--api-key", "x"], "Write server.api_keys=x"),
        (["--seed", "1"], "Write engine.seed=1 or sampler.seed=1"),
        (["--kv-cache-dtype", "fp8"], "Its name is kv_dtype: kv_dtype='fp8', or engine.kv_dtype=fp8"),
        (["--best-of", "2"], "Request n samples and choose by cumulative_logprob"),
    ],
)
def test_an_unknown_option_names_the_override(nanoengine: Run, words: list[str], message: str) -> None:
    result = nanoengine("run", "quickstart", *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_commands_of_a_group_name_the_override_too(nanoengine: Run) -> None:
    result = nanoengine("config", "show", "quickstart", "--max-tokens", "5")
    assert (result.exit_code, "Write sampler.max_tokens=5" in result.stderr) == (2, True)
    assert "config show CONFIG" in nanoengine("config", "show", "--resolve", "quickstart").stderr


@pytest.mark.parametrize("command", ["run", "chat", "serve", "sweep", "config show"])
def test_a_command_without_a_configuration_names_one(nanoengine: Run, command: str) -> None:
    result = nanoengine(*command.split())
    assert result.exit_code == 2
    assert re.search(rf"Missing argument 'CONFIG.*MODEL'. For example: \w+ {command} smollm2-135m", result.stderr)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("chat=null", "chat must be true or false, not null"),
        ("chat=1", "chat must be true or false, not 1"),
        ("engine.max_model_len=true", "engine.max_model_len must be an integer, or null, not true"),
        ("engine.max_num_seqs=None", "engine.max_num_seqs must be an integer, not 'None'"),
        ("seed=5", "did you mean 'engine.seed' or 'sampler.seed'? Valid: attention, "),
        ("max_tokens=5", "did you mean 'sampler.max_tokens'? Valid: attention, "),
        ("output='${now}.jsonl'", "there is no now; the time is ${now:%Y-%m-%d}. "),
    ],
)
def test_messages_about_yaml_have_its_words(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config("smollm2-135m", [override])


def test_a_mistyped_model_is_named(nanoengine: Run) -> None:
    assert "'smollm2-135'; did you mean 'smollm2-135m'? Valid: bare" in nanoengine("chat", "smollm2-135").stderr


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("1GB", 10**9), ("1GiB", 2**30), ("1.5 MiB", 3 * 2**19), ("512k", 512_000), ("7", 7), ("None", None),
        ("none", None), (8, 8), (1e9, 10**9), (None, None),
    ],
)  # fmt: skip
def test_sizes_and_none_are_understood(given: Any, value: int | None) -> None:
    assert conform_text("engine.kv_cache_memory", given, Bytes | None) == value
    shown = f"'{given}'" if isinstance(given, str) else json.dumps(given)
    config = load_config("smollm2-135m", [f"engine.kv_cache_memory={shown}", "sampler.seed=None", "output=None"])
    assert config.engine.kv_cache_memory == value
    assert (config.sampler, config.output) == ({"seed": None}, None)


@pytest.mark.parametrize("given", ["1 potato", "GB", "-1GB", True, 1.5, "None"])
def test_what_is_no_size_is_refused_in_words(given: Any) -> None:
    with pytest.raises(ParamsError, match="a size such as 1GB or 512MiB, not "):
        conform("max_bytes", given, Bytes)


def test_now_is_the_time_of_the_configuration() -> None:
    config = load_config("bare", ["model=a/b", "output='${now:%Y-%m-%d}-${now:%S%f}-${now:%S%f}.jsonl'"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-(\d{8})-\1\.jsonl", str(config.output))


@pytest.mark.parametrize(
    ("words", "incomplete", "found"),
    [
        ([], "sampler.tempe", ["sampler.temperature="]),
        ([], "model=smol", ["model=smollm2-135m"]),
        (["model", "="], "smol", ["smollm2-135m"]),  # bash
        ([], "server.po", ["server.port="]),
        ([], "out", ["output="]),
        ([], "nonsense", []),
    ],
)
def test_a_shell_completes_groups_and_keys(words: list[str], incomplete: str, found: list[str]) -> None:
    assert overrides(words, incomplete) == found


def test_a_shell_completes_recipes_models_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quiz.yaml", "quiz.txt", "sub/mine.yml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert configurations("qui") == ["quickstart", "quiz.yaml"]
    assert configurations("sub/") == ["sub/mine.yml"]
    assert configurations("smol") == ["smollm2-135m"]
    assert configurations("model=smol") == ["model=smollm2-135m"]


def test_completion_is_installed_by_an_option_and_goes_through_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout
    words = {"COMP_WORDS": "nanoengine config show quickstart sampler.tempe", "COMP_CWORD": "4"}
    asked = {**words, "_NANOENGINE_COMPLETE": "complete_bash"}
    assert CliRunner().invoke(app, [], prog_name="nanoengine", env=asked).stdout.split() == ["sampler.temperature="]
    for words, found in (("list mod", ["model"]), ("explain kv_d", ["kv_dtype"])):
        asked |= {"COMP_WORDS": f"nanoengine config {words}", "COMP_CWORD": "3"}
        assert CliRunner().invoke(app, [], prog_name="nanoengine", env=asked).stdout.split() == found
