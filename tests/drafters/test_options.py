"""`speculation` in Python and in YAML, checked against the drafter that it names; mistakes name key and choices."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from named_params import Named

from nanoengine import LLM, SamplingParams
from nanoengine.api import ConfigError, DrafterContext, DrafterParams, DrafterSpec, HostDrafter, PluginError, hookimpl
from nanoengine.cli.config import render
from nanoengine.params.speculation import SpeculationOptions
from nanoengine.setup.config.config import RunConfig, load_config
from nanoengine.setup.config.engine_options import engine_options
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry
from nanoengine.setup.plugins.speculation import choose_speculation, make_drafter
from nanoengine.setup.plugins.targets import TargetLoader

NOTHING = "nowhere:Drafter"


def holder(*specs: Any) -> SimpleNamespace:
    return SimpleNamespace(register_drafters=hookimpl(lambda: list(specs)))


@pytest.fixture(scope="module")
def registry() -> Registry:
    return discover(extra=[("mine", holder(DrafterSpec(name="mine", target=NOTHING, api=1, params=Named)))])


# -- the mapping ------------------------------------------------------------------------------------------------------


def test_a_plan_has_the_engines_keys_and_the_drafters(registry: Registry) -> None:
    plan = choose_speculation(registry, {"method": "mine", "tokens": 6, "min_acceptance": 1, "depth": 2, "share": 1})
    assert plan is not None
    assert (plan.method, plan.tokens, plan.min_acceptance, plan.device) == ("mine", 6, 1.0, False)
    assert plan.params == {"depth": 2, "share": 1.0}
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_keys_have_defaults(registry: Registry) -> None:
    plan = choose_speculation(registry, {"method": "ngram"})
    assert plan is not None
    options = SpeculationOptions(method="ngram")
    assert (plan.tokens, plan.min_acceptance, plan.params) == (options.tokens, options.min_acceptance, {})


@pytest.mark.parametrize("given", [None, {"method": "none"}, {"method": "none", "tokens": 3, "whatever": 1}])
def test_speculation_is_off(registry: Registry, given: Any) -> None:
    assert choose_speculation(registry, given) is None


def test_a_name_alone_is_the_method() -> None:
    assert engine_options({"speculation": "ngram"}).speculation == {"method": "ngram"}
    with pytest.raises(ConfigError, match="speculation must be a mapping from strings to values, or None, not 5"):
        engine_options({"speculation": 5})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, r"needs a method, as in \{method: ngram, tokens: 4\}\. Valid: mine, ngram, none, suffix"),
    ({"tokens": 4}, "needs a method"),
    ({"method": 3}, "method must be a string, not 3"),
    ({"method": "ngram", "token": 4}, "'ngram' has no key 'token'; did you mean 'tokens'"),
    (
        {"method": "ngram", "depth": 4},
        "'ngram' has no key 'depth'; Valid: max_n, method, min_acceptance, min_n, step_tokens, tokens",
    ),
    ({"method": "ngram", "num_speculative_tokens": 4}, "here it is called 'tokens'"),
    ({"method": "ngram", "prompt_lookup_max": 4}, "here it is called 'max_n'"),
    ({"method": "ngram", "tokens": "4"}, r"speculation\.tokens must be an integer, not '4'"),
    ({"method": "ngram", "tokens": True}, r"speculation\.tokens must be an integer"),
    ({"method": "ngram", "tokens": 16}, r"speculation\.tokens must be from 0 to 15, not 16"),
    ({"method": "ngram", "tokens": -1}, r"speculation\.tokens must be from 0"),
    ({"method": "ngram", "min_acceptance": 30}, r"speculation\.min_acceptance is a share and must be from 0 to 1"),
    ({"method": "ngram", "step_tokens": 0}, r"speculation\.step_tokens must be at least 1, not 0"),
    ({"method": "ngram", "max_n": 1}, r"speculation\.max_n must be from min_n \(2\)"),
    ({"method": "mine", "depth": 0}, r"speculation\.depth must be at least 1, not 0"),
    ({"method": "mine", "share": "x"}, r"speculation\.share must be a number"),
]


@pytest.mark.parametrize(("given", "text"), WRONG)
def test_mistakes_name_the_key_and_the_choices(registry: Registry, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        choose_speculation(registry, given)


def test_an_unknown_method_names_the_nearest(registry: Registry) -> None:
    with pytest.raises(PluginError, match="no drafter 'n_gram' is installed; did you mean 'ngram'"):
        choose_speculation(registry, {"method": "n_gram"})


def test_a_drafter_that_two_plugins_have_is_refused_when_it_is_named() -> None:
    spec = DrafterSpec(name="twice", target=NOTHING, api=1)
    found = discover(extra=[("one", holder(spec)), ("two", holder(spec))])
    assert choose_speculation(found, {"method": "ngram"}) is not None
    with pytest.raises(PluginError, match=r"drafter 'twice' is registered by object 'one'.* and object 'two'"):
        choose_speculation(found, {"method": "twice"})


@dataclasses.dataclass(frozen=True)
class Bare(DrafterParams):
    depth: int = dataclasses.field()


@dataclasses.dataclass(frozen=True)
class TakesAKey(DrafterParams):
    tokens: int = 3


class NotADataclass(DrafterParams):
    depth: int = 3


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"name": "none"}, "not 'none'"),
        ({"name": "two words"}, "without white space"),
        ({"target": "nowhere"}, "target"),
        ({"api": 2}, "api"),
        ({"device": 1}, r"DrafterSpec\.device must be True or False, not 1"),
        ({"params": dict}, "a dataclass derived from DrafterParams"),
        ({"params": Bare}, "without a default: depth"),
        ({"params": TakesAKey}, "the engine's own keys: tokens"),
        ({"params": NotADataclass}, "must be a dataclass itself"),
    ],
)
def test_a_wrong_spec_is_refused(fields: dict[str, Any], text: str) -> None:
    spec = DrafterSpec(**{"name": "x", "target": NOTHING, "api": 1, **fields})
    with pytest.raises(PluginError, match=text):
        discover(extra=[("x", holder(spec))])


class Broken(HostDrafter):
    def __init__(self, ctx: DrafterContext, params: Any) -> None:
        raise OSError("no index")

    def start(self, prompt_token_ids: Any, sample: Any) -> Any: ...


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (NOTHING, "cannot load 'nowhere:Drafter'"),
        (f"{__name__}:Named", "not a class derived from nanoengine.api.HostDrafter"),
        (f"{__name__}:Broken", r"drafter 'x' \(Broken of .*\) failed in __init__: OSError: no index"),
    ],
)
def test_a_broken_drafter_is_named_at_the_start(target: str, text: str) -> None:
    registry = discover(extra=[("x", holder(DrafterSpec(name="x", target=target, api=1)))])
    plan = choose_speculation(registry, {"method": "x"})
    assert plan is not None
    with pytest.raises(PluginError, match=text):
        make_drafter(plan, TargetLoader(), vocab_size=9, max_model_len=9, max_slots=2, device="cpu")


# -- in Python --------------------------------------------------------------------------------------------------------


def test_the_engine_option_is_a_mapping_or_a_name() -> None:
    given = {"method": "ngram", "tokens": 2}
    assert engine_options({"speculation": given}).speculation == given
    assert engine_options({}).speculation is None
    assert engine_options({"speculation": "ngram"}).speculation == {"method": "ngram"}
    with pytest.raises(ConfigError, match="speculation must be a mapping from strings to values, or None, not 3"):
        engine_options({"speculation": 3})
    with pytest.raises(
        ConfigError, match=r"'speculative_config': write speculation=\{'method': 'ngram', 'tokens': 4\}"
    ):
        engine_options({"speculative_config": {}})


def test_a_mistake_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    from nanoengine.testing import mock_model

    folder = mock_model.write_mock_checkpoint(tmp_path / "mock")
    for given, error, text in [
        ({"method": "ngram", "k": 4}, ConfigError, "has no key 'k'"),
        ({"method": "engram"}, PluginError, "did you mean 'ngram'"),
    ]:
        with pytest.raises(error, match=text):
            LLM(folder, attention="mock", load_format="dummy", plugins=[mock_model], speculation=given)


def test_a_request_can_leave_speculation_out() -> None:
    assert SamplingParams().core.speculate is True
    assert SamplingParams(speculate=False).core.speculate is False
    with pytest.raises(ValueError, match="speculate must be True or False, not 0"):
        SamplingParams(speculate=0)


# -- in YAML ----------------------------------------------------------------------------------------------------------


def config(tmp_path: Path, text: str, *overrides: str, registry: Registry) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: ./folder\n{text}")
    return load_config(path, overrides, registry=registry)


@pytest.mark.parametrize(
    ("text", "overrides", "found"),
    [
        ("", (), None),
        ("", ("speculation=ngram",), {"method": "ngram"}),
        ("", ("speculation=mine",), {"method": "mine"}),  # no file: a drafter of that name
        ("", ("speculation=ngram", "speculation.tokens=6"), {"method": "ngram", "tokens": 6}),
        ("", ("engine.speculation={method: ngram}",), {"method": "ngram"}),
        ("", ("engine.speculation=ngram",), {"method": "ngram"}),
        ("engine:\n  speculation: suffix\n", (), {"method": "suffix"}),
        ("engine:\n  speculation: {method: ngram, tokens: 4}\n", (), {"method": "ngram", "tokens": 4}),
        ("speculation: {method: ngram, tokens: 4}\n", (), {"method": "ngram", "tokens": 4}),
        ("speculation: suffix\nengine: {seed: 3}\n", (), {"method": "suffix"}),
        ("defaults:\n  - speculation: suffix\n", ("speculation=ngram",), {"method": "ngram"}),
        ("defaults:\n  - speculation: suffix\n", ("~speculation",), None),
        ("defaults:\n  - speculation: suffix\n", ("speculation=none",), {"method": "none"}),
        ("speculation: null\n", (), None),
    ],
)
def test_yaml(tmp_path: Path, registry: Registry, text: str, overrides: tuple[str, ...], found: Any) -> None:
    composed = config(tmp_path, text, *overrides, registry=registry)
    assert composed.engine.speculation == found
    assert composed.engine.seed == (3 if "seed" in text else 0)
    shown = tmp_path / "shown.yaml"
    shown.write_text(render(composed))
    assert load_config(shown, registry=registry) == composed


@pytest.mark.parametrize(
    ("text", "overrides", "error", "message"),
    [
        ("speculation:\n  method: ngram\n  token: 4\n", (), ConfigError, r"yaml:4: speculation with method 'ngram'"),
        ("engine:\n  speculation:\n    method: ngram\n    tokens: 99\n", (), ConfigError, r"yaml:5: .*from 0 to 15"),
        ("", ("speculation=ngram", "speculation.max_n=0"), ConfigError, r"override 'speculation\.max_n=0': "),
        ("speculation:\n  method: engram\n", (), PluginError, r"yaml:3: speculation\.method: no drafter 'engram'"),
        ("", ("speculation=engram",), ConfigError, "no 'engram' in config group 'speculation'; did you mean 'ngram'"),
        ("speculation: 3\n", (), ConfigError, r"yaml:2: engine\.speculation must be a mapping"),
        ("speculation: {tokens: 3}\n", (), ConfigError, r"yaml:2: speculation needs a method"),
        ("engine: {speculation: {method: ngram}}\nspeculation: suffix\n", (), ConfigError, "leave out one of them"),
        ("speculations: ngram\n", (), ConfigError, "did you mean 'speculation'"),
    ],
)  # fmt: skip
def test_yaml_mistakes_name_file_and_line(
    tmp_path: Path, registry: Registry, text: str, overrides: tuple[str, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        config(tmp_path, text, *overrides, registry=registry)


# -- listings ---------------------------------------------------------------------------------------------------------


def test_drafters_are_listed(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from nanoengine.cli.app import app

    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from nanoengine.api import DrafterSpec, hookimpl\n\n@hookimpl\ndef register_drafters():\n"
        "    return [DrafterSpec(name='mine', target=f'{__name__}:Mine', api=1)]\n"
    )
    listed = CliRunner().invoke(app, ["plugins", "list", "--plugin", str(plugin)]).stdout
    assert [line.split()[1] for line in listed.splitlines() if line.startswith("drafter ")] == [
        "ngram",
        "suffix",
        "mine",
    ]
    options = CliRunner().invoke(app, ["config", "list", "speculation", "--plugin", str(plugin)]).stdout
    assert [line.split()[0] for line in options.splitlines()[1:]] == ["mine", "ngram", "none", "suffix"]
