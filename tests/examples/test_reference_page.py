"""docs/reference.md has every option, parameter and method; its examples run; editors complete the same names."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import nanoengine
from nanoengine import LLM, AsyncLLM, ParamsError, SamplingParams
from nanoengine.cli.app import app
from nanoengine.lab.facts import facts, meanings
from nanoengine.params.arguments import ChatOptions
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.sampling_fields import CORE_TYPES
from nanoengine.setup.keywords import sampling_names
from nanoengine.setup.plugins.discover import discover

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference.md").read_text("utf-8")
PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from nanoengine.api import ColumnSpec, LogitsProcessor, Phase, ProcessorParams, SamplerSpec, hookimpl

@dataclass(frozen=True)
class Params(ProcessorParams):
    own_parameter: float = 0.0
    columns: ClassVar = {"own_parameter": ColumnSpec(dtype="float32", default=0.0)}

class Own(LogitsProcessor):
    phase = Phase.MASK

    def apply(self, logits, rows):
        return logits + rows.column("own_parameter")[:, None]

@hookimpl
def register_samplers():
    return [SamplerSpec(name="own", params=Params, target=f"{__name__}:Own", api=1)]
"""


@pytest.fixture(scope="module", autouse=True)
def generator() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs" / "generate"))
        yield


def sampling_facts() -> Any:
    return import_module("reference_facts").sampling_facts()


def names(heading: str) -> set[str]:
    """The names in the tables of a section."""
    section = re.split(r"^## ", PAGE.partition(f"\n## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    cells = re.findall(r"^\| ((?:`[\w.]+`(?:, )?)+) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)}


def test_every_option_parameter_and_method_is_on_the_page() -> None:
    options = {field.name for field in dataclasses.fields(EngineOptions)}
    assert options <= names("Engine options") | {"structured_outputs"}
    assert set(sampling_names(discover())) <= names("Sampling parameters")
    assert set(ChatOptions.__annotations__) <= names("`LLM`")
    for cls in (LLM, AsyncLLM):
        methods = {name for name in vars(cls) if not name.startswith("_")}
        assert methods == set(re.findall(rf"^### `{cls.__name__}\.(\w+)`", PAGE, re.MULTILINE))
    public = [(name, getattr(nanoengine, name)) for name in nanoengine.__all__]
    errors = [name for name, value in public if isinstance(value, type) and issubclass(value, Exception)]
    assert errors == re.findall(r"^### `(\w+)`", PAGE.partition("\n## Errors\n")[2], re.MULTILINE)


def test_ranges_are_those_of_the_checks() -> None:
    rules = {each.name: each.rules for each in facts(EngineOptions)}
    assert rules["max_num_seqs"] == "at least 1; at most 65,536"
    assert rules["gpu_memory_utilization"] == "above 0 and at most 1"
    sampling = {each.name: each.rules for _, rows in sampling_facts() for each in rows}
    assert sampling["presence_penalty"] == "from -2 to 2"
    assert sampling["stop"] == "strings that are not empty"


def test_a_field_without_a_meaning_is_refused() -> None:
    @dataclasses.dataclass
    class Options:
        """Some options.

        Attributes:
            said: what it does, with a colon: here.
            first, second: of the two.
        """

        said: int = 0
        first: int = 0
        second: int = 0

    assert meanings(Options) == {
        "said": "what it does, with a colon: here",
        "first": "of the two",
        "second": "of the two",
    }

    @dataclasses.dataclass
    class More(Options):
        """Attributes:
        said: this one alone.
        """

    with pytest.raises(LookupError, match="does not describe first, second"):
        meanings(More)


# -- in a terminal -----------------------------------------------------------------------------------------------------


def explained(*words: str) -> Any:
    return CliRunner().invoke(app, ["config", "explain", *words])


def test_a_command_explains_every_key(tmp_path: Path) -> None:
    listed = {line.partition(": ")[0] for line in explained().stdout.splitlines()}
    assert {f"engine.{field.name}" for field in dataclasses.fields(EngineOptions)} <= {
        *listed, "engine.structured_outputs",
    }  # fmt: skip
    assert {f"sampler.{name}" for name in sampling_names(discover())} <= listed
    assert {"server.port", "speculation.max_n", "prompts.field", "output", "chat", "model.source"} <= listed
    (tmp_path / "own.py").write_text(PLUGIN)
    assert "sampler.own_parameter: float = 0.0" in explained("--plugin", str(tmp_path / "own.py")).stdout


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("presence_penalty", "sampler.presence_penalty: float = 0.0\n  Subtracted from the logits"),
        ("engine.kv_dtype", "engine.kv_dtype: Literal['auto', 'fp8', 'int8'] = \"auto\"\n  "),
        ("structured_outputs", "engine.structured_outputs.timeout: float = 10.0\n"),
        ("server.", "It must be from 0 to 65,535."),
    ],
)
def test_a_key_is_explained_with_type_default_and_range(name: str, text: str) -> None:
    assert text in explained(name).stdout


def test_a_mistyped_key_is_named() -> None:
    result = explained("presense_penalty")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no key is called 'presense_penalty'; did you mean 'presence_penalty'?" in result.stderr


# -- what an editor sees -----------------------------------------------------------------------------------------------


def test_signatures_name_every_keyword() -> None:
    sampling = inspect.signature(SamplingParams).parameters
    assert set(sampling) == {*sampling_names(discover()), "of_plugins"}
    assert sampling["max_tokens"].default == 16
    options = {field.name for field in dataclasses.fields(EngineOptions)}
    assert options <= set(inspect.signature(LLM).parameters)
    assert options | {"process", "log_level"} <= set(inspect.signature(AsyncLLM).parameters)
    assert "temperature: 0 takes the likeliest token" in (SamplingParams.__init__.__doc__ or "")
    assert set(CORE_TYPES) <= set(inspect.signature(SamplingParams.replace).parameters)


@pytest.mark.parametrize(
    ("call", "some"),
    [
        ("SamplingParams(", {"temperature=", "max_tokens=", "bad_words="}),
        ("SamplingParams().replace(", {"temperature=", "seed="}),
        ("LLM('m', ", {"max_model_len=", "quantization=", "plugins="}),
        ("AsyncLLM('m', ", {"max_model_len=", "process="}),
    ],
)
def test_an_editor_completes_the_keywords(call: str, some: set[str]) -> None:
    jedi = pytest.importorskip("jedi", reason="pip install -e '.[test]'")
    found = jedi.Script(f"from nanoengine import LLM, AsyncLLM, SamplingParams\n{call}").complete()
    assert some <= {each.name for each in found}


def test_a_parameter_of_a_plugin_is_taken(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "own.py").write_text(PLUGIN)
    params = SamplingParams(own_parameter=0.5, max_tokens=1)
    with LLM(tiny, plugins=[tmp_path / "own.py"], max_model_len=64) as llm:
        assert "own_parameter" in llm.sampling_names
        assert llm.generate([[1, 2]], params, use_tqdm=False)[0].error is None
        with pytest.raises(ParamsError, match="own_parametre"):
            llm.generate([[1, 2]], SamplingParams(own_parametre=0.5), use_tqdm=False)


# -- the examples ------------------------------------------------------------------------------------------------------


def test_the_examples_run(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("nanoengine.llm.find_model", lambda *arguments: tiny)
    examples = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(examples) == 3
    for code in examples:
        exec(compile(code, "docs/reference.md", "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    assert "temperature=0.0" in printed
    assert "seed=7" in printed
    assert re.search(r"^\(\d+,\) 0$", printed, re.MULTILINE)


def test_every_python_name_of_the_page_is_one() -> None:
    """Names in code of the shape `LLM.name` that the page mentions exist."""
    for cls, name in re.findall(r"`(LLM|AsyncLLM|SamplingParams|RequestOutput)\.(\w+)", PAGE):
        found = getattr(nanoengine, cls)
        assert hasattr(found, name) or name in {f.name for f in dataclasses.fields(found)}, (cls, name)
