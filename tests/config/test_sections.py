"""Sections that commands register: `server`, and one of a plugin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nanoengine.api import CommandSpec, hookimpl
from nanoengine.api.errors import ConfigError, PluginError
from nanoengine.cli.config import plain, render
from nanoengine.server.config import ServerConfig, server_config
from nanoengine.setup.config.config import load_config
from nanoengine.setup.config.sections import section_names
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry

Folder = Callable[[Mapping[str, str]], Path]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tune:
    depth: int = 3

    def __post_init__(self) -> None:
        if self.depth == 7:
            raise RuntimeError("seven")


class Tuner:
    def __init__(self, target: str = f"{__name__}:Tune", name: str = "tune", key: Any = "tuning") -> None:
        self.spec = CommandSpec(name=name, target="nowhere:tune", help="Tune.", api=1, sections={key: target})

    @hookimpl
    def register_commands(self) -> list[CommandSpec]:
        return [self.spec]


def test_a_section_is_checked_against_the_dataclass_of_its_command(folder: Folder, registry: Registry) -> None:
    path = folder({"c.yaml": "model: a/b\nserver:\n  port: 8123\n  restart: {max_restarts: 2}\n"}) / "c.yaml"
    config = load_config(path, ["server.workers=3"], registry=registry)
    found = server_config(config.sections)
    assert (found.port, found.workers, found.restart.max_restarts) == (8123, 3, 2)
    assert server_config(load_config(path, ["~server"], registry=registry).sections) == ServerConfig()
    assert "server" not in plain(config)  # what a run records and compares
    again = folder({"again.yaml": render(config)}) / "again.yaml"
    assert load_config(again, registry=registry) == config
    assert f"  port: 8123  # {path}:3" in render(config)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("server.prot=1", "unknown key 'server.prot'; did you mean 'port'?"),
        ("server.restart.polcy=never", "server.restart has no key 'polcy'; did you mean 'policy'?"),
        ("server.restart.policy=no", "server.restart.policy must be 'always' or 'never' or 'on-failure'"),
        ("server.restart.backoff=-1", "override 'server.restart.backoff=-1': server.restart.backoff must be from 0 to"),
        ("server.port=70000", "override 'server.port=70000': server.port must be from 0 to 65,535, not 70,000"),
        ("server.port=abc", "server.port must be an integer"),
        ("server.workers=0", "server.workers must be from 1 to"),
        ("server.drain_timeout=.inf", "server.drain_timeout must be from 0 to"),
        ("server.host=", "server.host must be"),
        ("port=8000", "unknown key 'port'; did you mean 'server.port'?"),
        ("sevrer.port=8000", "unknown key 'sevrer'; did you mean 'server'?"),
        ("server=nix", "no 'nix' in config group 'server'"),
    ],
)
def test_a_mistake_in_a_section_is_named(folder: Folder, registry: Registry, override: str, says: str) -> None:
    path = folder({"c.yaml": "model: a/b\nserver: {log_format: json}\n"}) / "c.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override], registry=registry)
    assert says in str(caught.value)


def test_a_plugin_may_have_a_section(folder: Folder) -> None:
    registry = discover(extra=[("tuner", Tuner())])
    path = folder({"c.yaml": "model: a/b\n"}) / "c.yaml"
    assert load_config(path, ["tuning.depth=4"], registry=registry).sections == {"tuning": Tune(depth=4)}
    assert {"server", "tuning"} <= set(section_names(registry))
    with pytest.raises(PluginError, match="Tune failed: RuntimeError: seven"):
        load_config(path, ["tuning.depth=7"], registry=registry)


def test_a_section_is_of_one_plugin_and_never_one_of_the_runs_own(folder: Folder) -> None:
    path = folder({"c.yaml": "model: a/b\n"}) / "c.yaml"
    both = discover(extra=[("tuner", Tuner()), ("rival", Tuner("json:JSONDecoder", "rival"))])
    assert load_config(path, registry=both).sections == {}  # no error for who does not use it
    with pytest.raises(PluginError, match=r"section 'tuning' is of command 'tune' .* and of command 'rival'"):
        load_config(path, ["tuning.depth=4"], registry=both)
    with pytest.raises(PluginError, match="not a dataclass"):
        load_config(path, ["tuning.depth=4"], registry=discover(extra=[("bad", Tuner("json:JSONDecoder"))]))
    for key in ("engine", "two words", 3):
        with pytest.raises(PluginError, match=r"CommandSpec\.sections must be"):
            discover(extra=[("bad", Tuner(key=key))])
