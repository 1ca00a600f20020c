"""Where files come from: recipes, the user's own folder, packages of plugins, and their clashes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from nanoengine.api import hookimpl
from nanoengine.api.errors import ConfigError, PluginError
from nanoengine.setup.config.config import load_config
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry

Folder = Callable[[Mapping[str, str]], Path]


class Configs:
    """A plugin that brings config roots."""

    def __init__(self, *roots: str) -> None:
        self.roots = list(roots)

    @hookimpl
    def register_configs(self) -> list[str]:
        return self.roots


@pytest.fixture
def packages(folder: Folder, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Folder:
    """Writes files of importable packages; "@" in a path becomes a package name unique to the test."""
    unique = f"pkg_{abs(hash(request.node.name))}"

    def write(files: Mapping[str, str]) -> Path:
        root = folder({name.replace("@", unique): text for name, text in files.items()})
        monkeypatch.syspath_prepend(root)
        return root / unique

    return write


def with_roots(*roots: tuple[str, str]) -> Registry:
    return discover(extra=[(name, Configs(root)) for name, root in roots])


def test_recipe_of_nanoengine(registry: Registry) -> None:
    config = load_config("quickstart", registry=registry)
    assert config.model.source == "smollm2-135m"
    assert config.sampler == {"temperature": 0.0, "max_tokens": 64}
    assert config.output == "results.jsonl"
    assert isinstance(config.prompts, tuple)
    assert len(config.prompts) >= 5


def test_every_shipped_file_is_valid(registry: Registry) -> None:
    import nanoengine.configs

    root = Path(nanoengine.configs.__file__).parent
    seen = 0
    for file in root.glob("*/*.yaml"):
        config = load_config("quickstart", [f"{file.parent.name}={file.stem}"], registry=registry)
        assert any(f"/{file.parent.name}/{file.name}" in origin for origin in config.provenance.values()), file
        seen += 1
    assert seen >= 10


def test_unknown_recipe_names_the_nearest(registry: Registry) -> None:
    with pytest.raises(
        ConfigError, match=r"no file, recipe or model is called 'quikstart'; .*did you mean 'quickstart'"
    ):
        load_config("quikstart", registry=registry)


@pytest.mark.parametrize("name", ["nope.yaml", "./nope", "a/b/c", "nope.yml"])
def test_missing_file(registry: Registry, name: str) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(name, registry=registry)


@pytest.mark.parametrize(("name", "meant"), [("run.yml", "run.yaml"), ("run", "run.yaml"), ("other.yaml", "other.yml")])
def test_a_missing_file_of_another_ending_is_named(
    folder: Folder, registry: Registry, monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.chdir(folder({"run.yaml": "model: a/b\n", "other.yml": "model: a/b\n"}))
    with pytest.raises(ConfigError, match=f"; did you mean {meant}, which is there"):
        load_config(name, registry=registry)


def test_a_file_without_suffix_beats_a_recipe(
    folder: Folder, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder({"quickstart": "model: a/b\n"}))
    assert load_config("quickstart", registry=registry).model.source == "a/b"


def test_a_folder_does_not_hide_a_recipe(folder: Folder, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder({"quickstart/x": ""}))
    assert load_config("quickstart", registry=registry).model.source == "smollm2-135m"


def test_a_shipped_file_by_its_path_is_no_second_provider(registry: Registry) -> None:
    import nanoengine.configs

    path = Path(nanoengine.configs.__file__).parent / "quickstart.yaml"
    assert load_config(path, registry=registry).provenance["sampler.temperature"].startswith("pkg://")


def test_own_folder_first(folder: Folder, registry: Registry) -> None:
    root = folder(
        {"run.yaml": "defaults: [sampler: greedy]\nmodel: a/b\n", "sampler/greedy.yaml": "temperature: 0.5\n"}
    )
    config = load_config(root / "run.yaml", registry=registry)
    assert config.sampler == {"temperature": 0.5}
    assert config.provenance["sampler.temperature"] == f"{root}/sampler/greedy.yaml:1"


def test_group_file_of_a_plugin(packages: Folder) -> None:
    pkg = packages({"@/__init__.py": "", "@/sampler/wild.yaml": "temperature: 2.0\n", "@/fast.yaml": "model: a/b\n"})
    registry = with_roots(("wild", f"pkg://{pkg.name}"))
    config = load_config("fast", ["sampler=wild"], registry=registry)
    assert config.sampler == {"temperature": 2.0}
    assert config.provenance["sampler.temperature"] == f"pkg://{pkg.name}/sampler/wild.yaml:1"
    assert config.provenance["model.source"] == f"pkg://{pkg.name}/fast.yaml:1"


def test_package_without_init(packages: Folder) -> None:
    pkg = packages({"@/sampler/wild.yaml": "temperature: 2.0\n"})
    config = load_config("quickstart", ["sampler=wild"], registry=with_roots(("wild", f"pkg://{pkg.name}")))
    assert config.sampler is not None
    assert config.sampler["temperature"] == 2.0


def test_two_providers_of_one_file_are_both_named(packages: Folder) -> None:
    pkg = packages({"@/__init__.py": "", "@/sampler/greedy.yaml": "temperature: 1.0\n", "@/sampler/mine.yaml": ""})
    registry = with_roots(("rival", f"pkg://{pkg.name}"))
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", registry=registry)
    for word in ("'sampler/greedy'", "'rival'", "nanoengine 0.1.0", str(pkg / "sampler/greedy.yaml")):
        assert word in str(caught.value)
    # Only what needs the file is refused.
    assert load_config("quickstart", ["sampler=mine"], registry=registry).sampler == {"max_tokens": 64}


def test_two_providers_of_one_recipe(packages: Folder) -> None:
    pkg = packages({"@/__init__.py": "", "@/quickstart.yaml": "model: a/b\n"})
    with pytest.raises(ConfigError, match=r"'quickstart' is provided by .* and "):
        load_config("quickstart", registry=with_roots(("rival", f"pkg://{pkg.name}")))


def test_own_folder_settles_a_clash(packages: Folder, tmp_path: Path) -> None:
    pkg = packages({
        "@/__init__.py": "", "@/sampler/greedy.yaml": "temperature: 1.0\n",
        "own/run.yaml": "defaults: [sampler: greedy]\nmodel: a/b\n", "own/sampler/greedy.yaml": "temperature: 0.25\n",
    })  # fmt: skip
    registry = with_roots(("rival", f"pkg://{pkg.name}"))
    assert load_config(tmp_path / "own/run.yaml", registry=registry).sampler == {"temperature": 0.25}


def test_one_root_registered_twice_is_no_clash(packages: Folder) -> None:
    root = f"pkg://{packages({'@/__init__.py': '', '@/sampler/wild.yaml': 'temperature: 2.0'}).name}"
    config = load_config("quickstart", ["sampler=wild"], registry=with_roots(("one", root), ("two", root)))
    assert config.sampler == {"temperature": 2.0, "max_tokens": 64}


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ("file:///tmp", "must be of the form pkg://"),
        ("nanoengine.configs", "must be of the form pkg://"),
        ("pkg://", "must be of the form pkg://"),
        ("pkg://no_such_package_at_all", "no importable package folder"),
        ("pkg://no_such_package_at_all.configs", "cannot be imported"),
        ("pkg://json.decoder", "no importable package folder"),
    ],
)
def test_root_that_is_none_names_its_provider(root: str, words: str) -> None:
    with pytest.raises(PluginError) as caught:
        load_config("quickstart", registry=with_roots(("culprit", root)))
    assert words in str(caught.value)
    assert "'culprit'" in str(caught.value)


def test_broken_group_file_of_a_plugin_is_named(packages: Folder) -> None:
    pkg = packages({"@/__init__.py": "", "@/sampler/wild.yaml": "temperature: [\n"})
    with pytest.raises(ConfigError, match=rf"pkg://{pkg.name}/sampler/wild\.yaml:2"):
        load_config("quickstart", ["sampler=wild"], registry=with_roots(("wild", f"pkg://{pkg.name}")))
