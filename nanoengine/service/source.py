"""What an engine's process is to run, as plain JSON: model, parts, options, plugins."""

from __future__ import annotations

import importlib
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoengine.api.errors import ConfigError, PluginError, described, is_failure, shown
from nanoengine.observe.files import user_path
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.config.config import AttentionSection, ModelSection, RunConfig
from nanoengine.setup.config.engine_options import engine_options
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry
from nanoengine.setup.start.clock import PHASES, Phase, StartClock
from nanoengine.setup.start.garbage import without_collections
from nanoengine.setup.start.wake import wake_gpu

if TYPE_CHECKING:
    from nanoengine.llm import LLM


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSource:
    """A choice of parts that another process can make an engine of. All fields are plain JSON.

    Attributes:
        model: with its revision; a path is absolute. implementation, attention: names of parts.
        options: fields of `EngineOptions`. sampler: default sampling parameters; None: the model's own.
        plugin_files: paths. plugin_modules: names of modules with hooks.
        service: fields of `ServiceOptions`.
    """

    model: str
    implementation: str | None = None
    attention: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    sampler: Mapping[str, Any] | None = None
    plugin_files: tuple[str, ...] = ()
    plugin_modules: tuple[str, ...] = ()
    service: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_config(cls, config: RunConfig, plugins: Sequence[Any] = ()) -> EngineSource:
        """Of a composed configuration. `plugins`: as of `LLM`. Raises `ConfigError` for what another process lacks."""
        return cls.of_parts(
            config.model.pinned, config.attention.backend, config.model.implementation, config.engine,
            config.sampler, plugins,
        )  # fmt: skip

    @classmethod
    def of_parts(
        cls,
        model: str,
        attention: object,
        implementation: str | None,
        options: EngineOptions,
        sampler: Mapping[str, Any] | None,
        plugins: Sequence[Any] = (),
    ) -> EngineSource:
        """Of the arguments of `LLM`. Raises `ConfigError` for what another process lacks."""
        if not isinstance(attention, str):
            raise ConfigError(
                f"attention is {shown(attention)}, which only this process has: register it with a plugin and give its "
                "name, or run the engine in this process (process=False)"
            )
        path = user_path(model, "model")
        files = [str(Path(p).expanduser().absolute()) for p in plugins if isinstance(p, str | Path)]
        return cls(
            model=str(path.absolute()) if path.exists() else model,
            implementation=implementation,
            attention=attention,
            options=asdict(options),
            sampler=None if sampler is None else dict(sampler),
            plugin_files=tuple(files),
            plugin_modules=tuple(_module(p) for p in plugins if not isinstance(p, str | Path)),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> EngineSource:
        lists = {name: tuple(found[name]) for name in ("plugin_files", "plugin_modules")}
        return cls(**{**found, **lists})

    def registry(self) -> Registry:
        """All plugins. Raises `PluginError` where one of these cannot be imported."""
        return discover(self.plugin_files, extra=[(name, _imported(name)) for name in self.plugin_modules])

    def config(self) -> RunConfig:
        """As a configuration. Raises what `engine_options` raises."""
        return RunConfig(
            model=ModelSection(source=self.model, implementation=self.implementation),
            attention=AttentionSection(backend=self.attention),
            engine=engine_options(self.options),
            sampler=self.sampler,
        )

    def build(self, phase: Callable[[str], None] | None = None) -> LLM:
        """Make and start the engine, in this process. Raises what `LLM` raises.

        `phase` is called with what is done next: a name of `clock.PHASES`, or a line of text.
        """
        clock = StartClock.of_process() if phase is None else _ReportingClock(phase)
        wake_gpu(engine_options(self.options))
        with without_collections():
            from nanoengine.llm import LLM

            clock.lap("import")
            registry = self.registry()
            clock.lap("plugins")
            return LLM.from_run_config(self.config(), registry=registry, say=phase, clock=clock)


def fits_a_process(attention: object, plugins: Sequence[Any]) -> bool:
    """Whether another process can have these parts: names, files and modules, and not objects of this one."""
    return isinstance(attention, str) and all(isinstance(each, str | Path) or _is_module(each) for each in plugins)


class _ReportingClock(StartClock):
    """Reports which phase comes next when one has ended."""

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__()
        self._report = report
        report(PHASES[0])

    def add(self, *phases: Phase) -> None:
        super().add(*phases)
        for phase in phases[-1:]:
            self._report(next(iter(PHASES[PHASES.index(phase.name) + 1 :]), phase.name))


def _is_module(plugin: Any) -> bool:
    """Whether it is a module that can be imported by its name."""
    return isinstance(plugin, types.ModuleType) and plugin.__spec__ is not None


def _module(plugin: Any) -> str:
    if _is_module(plugin):
        return str(plugin.__name__)
    raise ConfigError(
        f"plugin {shown(plugin)} is an object of this process: give the path of its file, or a module that can be "
        "imported, or run the engine in this process (process=False)"
    )


def _imported(name: str) -> object:
    try:
        return importlib.import_module(name)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise PluginError(
            f"plugin module {name} failed at import: {described(error)}; PYTHONPATH is "
            f"{os.environ.get('PYTHONPATH', '')}"
        ) from error
