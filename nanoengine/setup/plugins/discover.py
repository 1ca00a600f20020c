"""Discovery: entry points, plugin files and objects -> `Registry`. Runs once at start-up; imports no torch.

Each plugin is imported separately, and each of its hooks is called separately. If an installed plugin fails, this is
recorded with its cause. If a plugin fails that the user named (a file, an object), an error is raised.
"""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pluggy

from nanoengine.api import hooks as hookspecs
from nanoengine.api.errors import PluginError, described, is_failure, nearest, shown, text_of
from nanoengine.api.specs import PROJECT, Origin, PluginFile, Spec
from nanoengine.observe.files import user_path
from nanoengine.setup.config.composer.search_path import package_root
from nanoengine.setup.plugins.choose import choose_attention, from_class, load_checked
from nanoengine.setup.plugins.registry import KIND_WORDS, Conflict, Failure, Kind, Registered, Registry
from nanoengine.setup.plugins.targets import load_plugin_file
from nanoengine.setup.plugins.validation import HOOKS, SPEC_HOOKS, check_spec, checked_list

__all__ = [
    "Conflict",
    "Failure",
    "Origin",
    "Registered",
    "Registry",
    "choose_attention",
    "discover",
    "discover_given",
    "from_class",
    "load_checked",
    "plugin_file",
]


def discover(plugin_files: Sequence[str | Path] = (), *, extra: Sequence[tuple[str, object]] = ()) -> Registry:
    """Registers all plugins: installed ones, `plugin_files` (`--plugin`), and `extra` (name, object with hooks).

    Raises `PluginError` if a file or an object fails. Failures of installed plugins are in `Registry.failures`.
    """
    search = _Search()
    for entry, origin in _installed():
        search.entry_point(entry, origin)
    for path in plugin_files:
        search.file(Path(path))
    for name, plugin in extra:
        search.register(plugin, Origin(plugin=name), fatal=True)
    return search.registry()


def discover_given(plugins: Any) -> Registry:
    """`discover` with what `LLM(plugins=...)` takes: one or several of: a path, an object with hooks."""
    if isinstance(plugins, str | Path):
        plugins = [plugins]
    plugins = plugins or ()
    files = [p for p in plugins if isinstance(p, str | Path)]
    extra = [(getattr(p, "__name__", type(p).__name__), p) for p in plugins if not isinstance(p, str | Path)]
    return discover(files, extra=extra)


def _installed() -> list[tuple[EntryPoint, Origin]]:
    """nanoengine's own first, then by distribution and name: the order of processors must not depend on sys.path."""
    said: dict[Distribution | None, tuple[str | None, str | None]] = {None: (None, None)}  # name and version

    def origin(entry: EntryPoint) -> Origin:
        if entry.dist is not None and entry.dist not in said:
            metadata = entry.dist.metadata  # parses pages, the README in them, each time
            said[entry.dist] = (metadata["Name"], metadata["Version"])
        name, version = said[entry.dist]
        return Origin(plugin=entry.name, distribution=name, version=version, module=entry.value)

    def order(found: tuple[EntryPoint, Origin]) -> tuple[bool, str, str]:
        name = found[1].distribution or ""
        return (name != PROJECT, name, found[1].plugin)

    return sorted([(entry, origin(entry)) for entry in entry_points(group=PROJECT)], key=order)


@dataclass
class _Search:
    """What one call of `discover` has found so far."""

    manager: pluggy.PluginManager = field(default_factory=lambda: _manager())
    claims: dict[tuple[Kind, str], list[Registered[Any]]] = field(default_factory=dict)
    roots: list[tuple[str, Origin]] = field(default_factory=list)
    plugins: list[Origin] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    files: list[PluginFile] = field(default_factory=list)

    def entry_point(self, entry: EntryPoint, origin: Origin) -> None:
        try:
            plugin = entry.load()
        except BaseException as error:  # noqa: BLE001 - `_fail` raises Ctrl-C again
            self._fail(origin, "import", error)
            return
        self.register(plugin, origin, fatal=False)

    def file(self, path: Path) -> None:
        file = plugin_file(path)
        if file in self.files:
            raise PluginError(f"plugin file {path} is given twice; leave one out")
        origin = Origin(plugin=path.stem, module=file.module, file=file.path)
        try:
            plugin = load_plugin_file(file)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise PluginError(f"{origin} failed at import: {described(error)}\n{_tail(error)}".rstrip()) from error
        self.files.append(file)
        self.register(plugin, origin, fatal=True)

    def register(self, plugin: object, origin: Origin, *, fatal: bool) -> None:
        """Registers everything that one plugin provides. A failure is recorded, or raised if `fatal`."""
        before = len(self.failures)
        name = f"{origin.distribution or origin.file or 'object'}:{origin.plugin}"
        try:
            implementations = _implementations(self.manager, plugin, name)
        except BaseException as error:  # noqa: BLE001 - `_fail` raises Ctrl-C again
            self._fail(origin, "register", error)
        else:
            self.plugins.append(origin)
            for hook, implementation in implementations:
                self._call(hook, implementation, origin)
        if fatal and len(self.failures) > before:
            raise PluginError("\n".join(f"{f}\n{f.traceback}".rstrip() for f in self.failures[before:]))

    def _call(self, hook: str, implementation: pluggy.HookImpl, origin: Origin) -> None:
        """Calls one hook implementation and registers its values. If one has a wrong type, none is registered."""
        try:
            values = checked_list(hook, implementation.function())
        except BaseException as error:  # noqa: BLE001 - `_fail` raises Ctrl-C again
            self._fail(origin, hook, error)
            return
        if hook == "register_configs":
            for root in values:
                self._config_root(root, origin)
            return
        kind = SPEC_HOOKS[hook][0]
        for spec in values:
            try:
                check_spec(spec)
                self._claim(kind, spec, origin)
            except BaseException as error:  # noqa: BLE001 - `_fail` raises Ctrl-C again
                self._fail(origin, f"{KIND_WORDS[kind]} {shown(spec.name)}", error, provides=(kind, spec.name))

    def _claim(self, kind: Kind, spec: Spec, origin: Origin) -> None:
        """Records that a plugin registers `spec`. Raises `PluginError` for a command that nanoengine itself has."""
        claims = self.claims.setdefault((kind, spec.name), [])
        if kind == "commands" and claims and claims[0].origin.distribution == PROJECT:
            raise PluginError(f"{spec.name!r} is already a command of {claims[0].origin}; rename yours")
        claims.append(Registered(spec, origin))

    def _config_root(self, root: str, origin: Origin) -> None:
        try:
            package_root(root, str(origin))
        except BaseException as error:  # noqa: BLE001 - `_fail` raises Ctrl-C again
            self._fail(origin, f"config root {root!r}", error, provides=("configs", root))
        else:
            self.roots.append((root, origin))

    def _fail(self, origin: Origin, at: str, error: BaseException, *, provides: tuple[str, str] | None = None) -> None:
        """Records a failure of a plugin. Raises `error` again if it is not one (e.g. Ctrl-C)."""
        if not is_failure(error):
            raise error
        own = isinstance(error, PluginError)  # raised by our checks: no traceback is needed
        self.failures.append(
            Failure(
                origin=origin,
                at=at,
                error_type=type(error).__name__,
                message=text_of(error),
                traceback="" if own else _tail(error),
                provides=provides,
            )
        )

    def registry(self) -> Registry:
        def of(kind: Kind) -> Mapping[str, Registered[Any]]:
            return MappingProxyType({n: c[0] for (k, n), c in self.claims.items() if k == kind and len(c) == 1})

        return Registry(
            models=of("models"),
            samplers=of("samplers"),
            attention_backends=of("attention_backends"),
            model_sources=of("model_sources"),
            grammars=of("grammars"),
            commands=of("commands"),
            drafters=of("drafters"),
            tool_parsers=of("tool_parsers"),
            policies=of("policies"),
            quantizations=of("quantizations"),
            config_roots=tuple(self.roots),
            plugins=tuple(self.plugins),
            failures=tuple(self.failures),
            conflicts=tuple(
                Conflict(kind=kind, name=name, claims=tuple(claims))
                for (kind, name), claims in self.claims.items()
                if len(claims) > 1
            ),
            plugin_files=tuple(self.files),
        )


def plugin_file(path: Path) -> PluginFile:
    """The file with its digest and a module name made of both, so an edited file is another module in every process.

    Raises `PluginError` if it is not a file or cannot be read; `ConfigError` if it cannot be the name of a file.
    """
    resolved = user_path(path, "plugin file").resolve()
    if resolved.is_dir():
        raise PluginError(f"plugin file {path} is a folder; install the package, or name its module file: __init__.py")
    if not resolved.is_file():
        hint = "" if resolved.suffix == ".py" else "; install a package instead, or name its module file"
        raise PluginError(f"plugin file {path} does not exist (looked for {resolved}){hint}")
    if resolved.suffix != ".py":
        raise PluginError(f"plugin file {path} is not a .py file; install a package instead, or name its module file")
    try:
        content = resolved.read_bytes()
    except OSError as error:
        raise PluginError(f"cannot read plugin file {path}: {error}") from error
    stem = re.sub(r"\W", "_", resolved.stem)
    tag = hashlib.sha256(str(resolved).encode(errors="surrogateescape") + b"\0" + content).hexdigest()[:12]
    return PluginFile(
        module=f"nanoengine_plugin_{stem}_{tag}", path=str(resolved), digest=hashlib.sha256(content).hexdigest()
    )


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _implementations(manager: pluggy.PluginManager, plugin: object, name: str) -> list[tuple[str, pluggy.HookImpl]]:
    """Registers `plugin` and returns its hook implementations as (hook, implementation).

    Raises `PluginError` for unknown hooks, for wrappers (hooks are called one by one) and for a plugin without hooks;
    then the plugin is not registered.
    """
    if manager.get_name(plugin) is not None:
        raise PluginError(f"the same plugin object is registered already, as {manager.get_name(plugin)!r}")
    try:
        manager.register(plugin, name)
        return _own_hooks(manager, plugin)
    except BaseException:
        if manager.has_plugin(name):
            manager.unregister(name=name)
        raise


def _own_hooks(manager: pluggy.PluginManager, plugin: object) -> list[tuple[str, pluggy.HookImpl]]:
    callers = manager.get_hookcallers(plugin) or []
    own = [(caller, impl) for caller in callers for impl in caller.get_hookimpls() if impl.plugin is plugin]
    for caller, impl in own:
        if not caller.has_spec() and not impl.optionalhook:
            raise PluginError(f"unknown hook {caller.name!r}; {nearest(caller.name, HOOKS)}")
        if impl.hookwrapper or impl.wrapper:
            raise PluginError(f"hook {caller.name!r} is a wrapper; nanoengine's hooks only return values")
    if not own:
        raise PluginError(f"it implements no hook: decorate functions with @hookimpl. {nearest('', HOOKS)}")
    return [(caller.name, impl) for caller, impl in own if caller.has_spec()]


def _tail(error: BaseException, frames: int = 3) -> str:
    """The last frames of the plugin's code in the traceback, without those of nanoengine and Python's import system."""
    return "".join(traceback.format_list(list(_own_frames(error))[-frames:])).rstrip()


def _own_frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    here = str(Path(__file__).parent)
    for frame in traceback.extract_tb(error.__traceback__):
        machinery = frame.filename.startswith("<frozen") or "/importlib/" in frame.filename
        if not machinery and not frame.filename.startswith(here):
            yield frame
