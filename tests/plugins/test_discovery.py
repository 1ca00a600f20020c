"""Discovery: isolation, provenance, clashes, and messages that name who, why and the fix."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from importlib.metadata import Distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoengine.api import (
    Model,
    ModelError,
    ModelSourceSpec,
    ModelSpec,
    PluginError,
    ProcessorParams,
    SamplerSpec,
    hookimpl,
)
from nanoengine.setup.plugins.discover import Failure, Registry, discover, load_checked, plugin_file
from nanoengine.setup.plugins.targets import TargetLoader

MODEL = """
@hookimpl
def register_models():
    return [ModelSpec(name={name!r}, architectures=({arch!r},), target="pkg.mod:Cls", api=1)]
"""


def model(name: str = "zeta", arch: str = "ZetaForCausalLM") -> str:
    return MODEL.format(name=name, arch=arch)


def processor(body: str) -> str:
    """A processor called "boost" whose parameters have `body`."""
    return f"""
@dataclass(frozen=True)
class Boost(ProcessorParams):
    {body}

@hookimpl
def register_samplers():
    return [SamplerSpec(name="boost", params=Boost, target="pkg.mod:Cls", api=1)]
"""


def failure_of(registry: Registry, distribution: str) -> Failure:
    found = [failure for failure in registry.failures if failure.origin.distribution == distribution]
    assert len(found) == 1, registry.failures
    return found[0]


def holder(**hooks: Callable[[], Any]) -> SimpleNamespace:
    return SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})


def test_an_installed_plugin_is_found_with_its_provenance(install: Any) -> None:
    install("nanoengine-zeta", model(), version="2.5")
    found = discover().models["zeta"]
    assert found.spec.architectures == ("ZetaForCausalLM",)
    assert (found.origin.distribution, found.origin.version, found.origin.plugin, found.origin.module) == (
        "nanoengine-zeta", "2.5", "plug", "nanoengine_zeta",
    )  # fmt: skip


def test_built_ins_come_first_and_by_the_same_entry_points(install: Any) -> None:
    install("nanoengine-aaa", model())
    origins = [origin.distribution for origin in discover().plugins]
    assert "nanoengine" in origins
    assert origins == sorted(origins, key=lambda name: (name != "nanoengine", name))


def test_the_registry_is_frozen() -> None:
    registry = discover(extra=[("x", holder(register_configs=lambda: ["pkg://email"]))])
    with pytest.raises(TypeError):
        registry.models["x"] = None  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        registry.failures = ()  # type: ignore[misc]


def test_two_discoveries_share_nothing(install: Any) -> None:
    first = discover(extra=[("x", holder(register_configs=lambda: ["pkg://json"]))])
    second = discover()
    assert "pkg://json" in [root for root, _ in first.config_roots]
    assert "pkg://json" not in [root for root, _ in second.config_roots]


@pytest.mark.parametrize(
    ("code", "at", "error_type", "text"),
    [
        ("import no_such_library_q", "import", "ModuleNotFoundError", "no_such_library_q"),
        ("import sys; sys.exit(3)", "import", "SystemExit", "3"),
        ("x = 1", "register", "PluginError", "implements no hook"),
        ("@hookimpl\ndef register_model(): ...", "register", "PluginError", "did you mean 'register_models'"),
        ("@hookimpl\ndef register_models(extra): ...", "register", "PluginValidationError", "extra"),
        ("@hookimpl(wrapper=True)\ndef register_models():\n    yield", "register", "PluginError", "wrapper"),
        ("@hookimpl\ndef register_models(): raise KeyError('boom')", "register_models", "KeyError", "boom"),
        ("@hookimpl\ndef register_models():\n    yield 1 / 0", "register_models", "ZeroDivisionError", "division"),
        ("@hookimpl\ndef register_models(): return None", "register_models", "PluginError", "returned None"),
        ("@hookimpl\ndef register_models(): return ['llama']", "register_models", "PluginError", "not a ModelSpec"),
        ("@hookimpl\ndef register_configs(): return 'pkg://x'", "register_configs", "PluginError", "list of str"),
        (model("two words"), "model 'two words'", "PluginError", "name must be"),
        (model().replace("mod:Cls", "mod"), "model 'zeta'", "PluginError", "package.module:Class"),
        (model().replace("('ZetaForCausalLM',)", "'Zeta'"), "model 'zeta'", "PluginError", "tuple of architecture"),
        (model().replace("api=1", "api=99"), "model 'zeta'", "PluginError", "api 99"),
        (
            processor("max_tokens: int = 1"),
            "logits processor 'boost'",
            "PluginError",
            "belongs to SamplingParams itself",
        ),
        (processor("boost: float"), "logits processor 'boost'", "PluginError", "without a default: boost"),
        (processor("boost: 'Flot' = 0"), "logits processor 'boost'", "PluginError", "unknown annotation"),
        (
            processor("columns = {'b': ColumnSpec(dtype='f8')}"),
            "logits processor 'boost'",
            "PluginError",
            "of dtype float32",
        ),
        (
            processor("columns = {'b': ColumnSpec(dtype='int32', default=.5)}"),
            "logits processor 'boost'",
            "PluginError",
            "int32",
        ),
        (
            processor("columns = {'b': ColumnSpec(dtype='bool', default='x')}"),
            "logits processor 'boost'",
            "PluginError",
            "'x'",
        ),
        (
            processor("columns = {'b': ColumnSpec(dtype='bool', op='top_k')}"),
            "logits processor 'boost'",
            "PluginError",
            "op must",
        ),
        (model().replace("api=1", "api=0"), "model 'zeta'", "PluginError", "upgrade the plugin"),
    ],
)
def test_a_broken_plugin_is_recorded_and_alone(install: Any, code: str, at: str, error_type: str, text: str) -> None:
    install("nanoengine-bad", code, version="0.7")
    install("nanoengine-good", model("good", "GoodForCausalLM"))
    registry = discover()
    failure = failure_of(registry, "nanoengine-bad")
    assert (failure.at, failure.error_type) == (at, error_type)
    assert text in failure.message
    assert "nanoengine-bad 0.7" in str(failure)
    assert failure.cause in str(failure)
    assert "good" in registry.models
    assert not [found for found in registry.models.values() if found.origin.distribution == "nanoengine-bad"]


def test_the_traceback_shows_the_plugins_own_frames_only(install: Any) -> None:
    install("nanoengine-bad", "def inner():\n    raise OSError('disk')\n\ninner()")
    tail = failure_of(discover(), "nanoengine-bad").traceback
    assert "nanoengine_bad.py" in tail
    assert "in inner" in tail
    assert "importlib" not in tail
    assert "plugins.py" not in tail


def test_one_failing_hook_leaves_the_plugins_other_hooks(install: Any) -> None:
    install("nanoengine-half", model() + "\n@hookimpl\ndef register_configs():\n    raise OSError('gone')\n")
    registry = discover()
    assert "zeta" in registry.models
    assert failure_of(registry, "nanoengine-half").at == "register_configs"


def test_an_optional_hook_of_a_later_engine_is_skipped(install: Any) -> None:
    install("nanoengine-z", model() + "\n@hookimpl(optionalhook=True)\ndef register_tomorrow(): return []\n")
    registry = discover()
    assert "zeta" in registry.models
    assert not [failure for failure in registry.failures if failure.origin.distribution == "nanoengine-z"]


def test_two_plugins_with_one_name_are_refused_by_both_distributions_when_needed(install: Any) -> None:
    install("nanoengine-a", model("same", "AForCausalLM"), version="1.1")
    install("nanoengine-b", model("same", "BForCausalLM"), version="2.2")
    registry = discover()
    assert [conflict.name for conflict in registry.conflicts] == ["same"]
    for look_up in (
        lambda: registry.require("models", "same"),
        lambda: registry.model_for(["AForCausalLM"], name="same"),
    ):
        with pytest.raises(PluginError, match=r"nanoengine-a 1\.1.* and nanoengine-b 2\.2.*pip uninstall nanoengine-a"):
            look_up()
    assert registry.model_for(["AForCausalLM"]).origin.distribution == "nanoengine-a"  # only one serves it


def test_a_built_in_name_can_clash_too() -> None:
    built_in = next(iter(discover().samplers.values()))
    double = SamplerSpec(name=built_in.spec.name, params=built_in.spec.params, target="a.b:C", api=1)
    registry = discover(extra=[("mine", holder(register_samplers=lambda: [double]))])
    with pytest.raises(PluginError, match=r"nanoengine \d.* and object 'mine'.*; rename yours, or do not pass 'm"):
        registry.processors()


def test_no_message_says_to_uninstall_the_engine(install: Any) -> None:
    found = discover()
    taken, served = next(iter(found.samplers.values())), next(iter(found.models.values()))
    parameter = next(iter(taken.spec.params.__dataclass_fields__))
    install("nanoengine-rival", processor(f"{parameter}: float = 0") + model("rival", served.spec.architectures[0]))
    registry = discover()
    for look_up in (registry.processors, lambda: registry.model_for(served.spec.architectures)):
        with pytest.raises(PluginError, match="pip uninstall nanoengine-rival") as caught:
            look_up()
        assert "pip uninstall nanoengine " not in f"{caught.value} "


def test_two_models_for_one_architecture_need_a_choice_by_name(install: Any) -> None:
    install("nanoengine-a", model("one", "SharedForCausalLM"))
    install("nanoengine-b", model("two", "SharedForCausalLM"))
    registry = discover()
    with pytest.raises(PluginError, match=r"'one' of nanoengine-a.*'two' of nanoengine-b.*pip uninstall nanoengine-a"):
        registry.model_for(["SharedForCausalLM"])
    assert registry.model_for(["SharedForCausalLM"], name="two").spec.name == "two"
    with pytest.raises(ModelError, match="supports SharedForCausalLM, not OtherForCausalLM"):
        registry.model_for(["OtherForCausalLM"], name="two")


def test_two_processors_may_not_share_a_parameter() -> None:
    @dataclass(frozen=True)
    class Boost(ProcessorParams):
        boost: float = 0.0

    def plugin(name: str) -> SimpleNamespace:
        spec = SamplerSpec(name=name, params=Boost, target="a.b:C", api=1)
        return holder(register_samplers=lambda: [spec])

    registry = discover(extra=[("first", plugin("processor_a")), ("second", plugin("processor_b"))])
    with pytest.raises(PluginError, match=r"'boost' is defined by .*'processor_a'.*'first'.*'processor_b'.*'second'"):
        registry.processors()


def test_an_unknown_architecture_names_the_nearest_all_served_and_who_failed(install: Any) -> None:
    install("nanoengine-zeta", model())
    install("nanoengine-bad", "import no_such_library_q", version="0.7")
    with pytest.raises(ModelError) as caught:
        discover().model_for(["ZetaForCausalML"])
    message = str(caught.value)
    assert "'ZetaForCausalML'" in message
    assert "did you mean 'ZetaForCausalLM'" in message
    assert "nanoengine-bad 0.7" in message
    assert "ModuleNotFoundError" in message


def test_what_is_not_installed_says_so_with_the_nearest_name(install: Any) -> None:
    install("nanoengine-zeta", model())
    with pytest.raises(PluginError, match=r"no model 'zetta' is installed; did you mean 'zeta'\?"):
        discover().require("models", "zetta")


def test_what_failed_is_named_when_it_is_needed(install: Any) -> None:
    install("nanoengine-zeta", model().replace("api=1", "api=99"), version="9.0")
    with pytest.raises(PluginError, match=r"model 'zeta' is not available: nanoengine-zeta 9\.0.*api 99.*api 1"):
        discover().require("models", "zeta")


def test_sources_are_in_order_and_list_their_models() -> None:
    def source(name: str, order: int, models: tuple[str, ...] = ()) -> ModelSourceSpec:
        return ModelSourceSpec(name=name, target="a.b:C", api=1, order=order, models=models)

    late, early = source("late", 10_000), source("early", -5, ("tiny-x",))
    registry = discover(extra=[("x", holder(register_model_sources=lambda: [late, early]))])
    names = [found.spec.name for found in registry.sources()]
    assert (names[0], names[-1]) == ("early", "late")
    assert "tiny-x" in registry.source_names()


def test_a_plugin_file_registers_under_a_name_of_its_own(plugin_py: Any) -> None:
    code = model().replace('"pkg.mod:Cls"', 'f"{__name__}:Zeta"') + "\nclass Zeta: ...\n"
    path = plugin_py(code)
    registry = discover([path])
    (file,) = registry.plugin_files
    assert file == plugin_file(path)
    assert file.module.startswith("nanoengine_plugin_my_plugin_")
    assert registry.models["zeta"].spec.target == f"{file.module}:Zeta"
    assert registry.models["zeta"].origin.file == str(path)


def test_files_of_one_name_in_two_folders_do_not_meet(plugin_py: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, two = plugin_py(model("one", "A")), plugin_py(model("two", "B"), "other/my-plugin.py")
    assert {"one", "two"} <= set(discover([one, two]).models)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("import no_such_library_q", r"my-plugin\.py failed at import: ModuleNotFoundError.*no_such_library_q"),
        ("def f(:", "SyntaxError"),
        ("x = 1", "implements no hook"),
        ("@hookimpl\ndef register_models(): raise KeyError('boom')", r"register_models: KeyError: 'boom'"),
        (model().replace("api=1", "api=99"), "api 99"),
    ],
)
def test_a_plugin_file_that_fails_is_fatal(plugin_py: Any, code: str, text: str) -> None:
    with pytest.raises(PluginError, match=text):
        discover([plugin_py(code)])


def test_a_plugin_file_must_be_a_python_file(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="does not exist"):
        discover([tmp_path / "none.py"])
    with pytest.raises(PluginError, match=r"does not exist .*; install a package instead, or name its module file"):
        discover(["nanoengine_mine"])
    with pytest.raises(PluginError, match=r"is a folder; install the package, or name its module file: __init__\.py"):
        discover([tmp_path])
    (tmp_path / "plugin.txt").write_text("")
    with pytest.raises(PluginError, match=r"not a \.py file"):
        discover([tmp_path / "plugin.txt"])


def test_an_object_handed_over_fails_at_once() -> None:
    bad = ModelSpec(name="bad", architectures=("A",), target="no colon", api=1)
    with pytest.raises(PluginError, match=r"object 'mine'.*package\.module:Class"):
        discover(extra=[("mine", holder(register_models=lambda: [bad]))])


def test_the_pages_of_a_distribution_are_parsed_once(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each question for its name or version: with nanoengine's README that was most of a discovery's time."""
    parsed: list[str] = []
    told = Distribution.metadata
    assert isinstance(told, property)

    def counted(distribution: Distribution) -> Any:
        found = told.fget(distribution)  # type: ignore[misc]
        parsed.append(found["Name"])
        return found

    monkeypatch.setattr(Distribution, "metadata", property(counted))
    install("nanoengine-zeta", model())
    assert len(discover().plugins) > 2
    assert sorted(parsed) == sorted(set(parsed))
    assert {"nanoengine", "nanoengine-zeta"} <= set(parsed)


def test_discovery_imports_no_torch() -> None:
    code = "import sys; from nanoengine.setup.plugins.discover import discover; r = discover(); r.processors()\n"
    code += "assert r.plugins; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_edited_plugin_file_is_loaded_anew_in_the_same_process(plugin_py: Any) -> None:
    old = discover([plugin_py(model("first"))])
    path = plugin_py(model("other"))  # of the same size, within the same second
    new = discover([path])
    assert ("first" in old.models, "other" in old.models) == (True, False)
    assert ("first" in new.models, "other" in new.models) == (False, True)
    assert discover([path]).plugin_files == new.plugin_files


def test_the_same_plugin_file_twice_is_said_to_be(plugin_py: Any, tmp_path: Path) -> None:
    path = plugin_py(model())
    with pytest.raises(PluginError, match=r"my-plugin\.py is given twice"):
        discover([path, tmp_path / "." / "my-plugin.py"])


def test_a_missing_class_of_a_plugin_file_names_the_file_and_the_nearest_class(plugin_py: Any) -> None:
    path = plugin_py("class Zeta: ...\n\nclass Far: ...\n\n" + model().replace('"pkg.mod:Cls"', 'f"{__name__}:Zetta"'))
    registry = discover([path])
    with pytest.raises(PluginError) as caught:
        load_checked(TargetLoader(registry.plugin_files), registry.models["zeta"].spec.target, Model)
    message = str(caught.value)
    assert f"'Zetta' of plugin file {path}" in message
    assert "did you mean 'Zeta'? Valid: Far, Zeta" in message
    assert "nanoengine_plugin_" not in message
    with pytest.raises(PluginError, match=rf"'Far' of plugin file {path} is .*not a class derived from .*Model"):
        load_checked(TargetLoader(registry.plugin_files), f"{registry.plugin_files[0].module}:Far", Model)


def test_a_plugin_file_that_cannot_be_imported_again_names_its_path(plugin_py: Any) -> None:
    path = plugin_py("raise OSError('disk')\n")
    file = plugin_file(path)
    with pytest.raises(PluginError, match=rf"'X' of plugin file {path}: OSError: disk"):
        TargetLoader((file,)).load(f"{file.module}:X")


def test_a_plugin_file_changed_since_discovery_is_not_loaded_by_a_worker(plugin_py: Any) -> None:
    file = plugin_file(plugin_py(model("first")))
    plugin_py(model("other"))
    with pytest.raises(PluginError, match=r"my-plugin\.py has changed since the engine read it"):
        TargetLoader((file,)).load(f"{file.module}:X")
