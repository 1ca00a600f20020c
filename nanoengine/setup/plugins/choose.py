"""Chooses attention backends (`auto`), and checks the classes of parts, also those that are passed in Python."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from nanoengine.api.attention import AttentionBackend, AttentionCapabilities, AttentionNeed, GraphSupport, wrong_feature
from nanoengine.api.errors import PluginError, UnsupportedError, shown
from nanoengine.api.grammars import GrammarBackend
from nanoengine.api.plugin_calls import name_of, place_and_fix, plugin_call
from nanoengine.api.specs import AttentionSpec, CommandSpec, GrammarSpec
from nanoengine.setup.plugins.registry import Registered, Registry
from nanoengine.setup.plugins.targets import TargetLoader

C = TypeVar("C")
_CAPABILITIES: Mapping[str, tuple[str, type[Any]]] = {
    "devices": ("a frozenset of torch device types", str),
    "dtypes": ("None or a frozenset of torch dtype names", str),
    "head_sizes": ("None or a frozenset of integers", int),
    "features": ("a frozenset of nanoengine.api.AttentionFeature and texts 'package.feature'", str),
}
Skipped = list[tuple[str, list[str]]]


def load_checked(loader: TargetLoader, target: str, base: type[C]) -> type[C]:
    """Imports the class of `target`. Raises `PluginError` if that fails, or if it is not a complete `base`."""
    return check_class(loader.load(target), base, loader.describe(target))


def check_class(found: Any, base: type[C], what: str) -> type[C]:
    """Returns `found` if it is a complete subclass of `base`. Raises `PluginError` that names what is missing."""
    if not isinstance(found, type) or not issubclass(found, base):
        raise PluginError(f"{what} is {found!r}, not a class derived from nanoengine.api.{base.__name__}")
    methods = sorted(getattr(found, "__abstractmethods__", ()))
    if methods:
        raise PluginError(f"{what} does not implement {base.__name__}.{', '.join(methods)}")
    # A ClassVar without a value in the base class must be set by the subclass.
    declared = [n for n, kind in inspect.get_annotations(base).items() if str(kind).startswith("ClassVar")]
    missing = [name for name in declared if not hasattr(found, name)]
    if missing:
        raise PluginError(f"{what} does not set the class attribute {base.__name__}.{', '.join(missing)}")
    return found


def from_class(cls: Any, base: type[C]) -> tuple[str, Mapping[str, type[C]]]:
    """The target of a class that is passed in Python, and the entry that it needs in `TargetLoader.local`.

    The entry is empty if the class can be imported by its name, so that another process can import it too. Raises
    `PluginError` as `load_checked` does.
    """
    name = f"{getattr(cls, '__module__', '?')}:{getattr(cls, '__qualname__', cls)}"
    checked = check_class(cls, base, name)
    return name, {} if _importable(checked) else {name: checked}


def _importable(cls: type[Any]) -> bool:
    """Whether another process gets the same class by importing its name."""
    if cls.__module__ == "__main__":
        return False
    found: Any = sys.modules.get(cls.__module__)
    if getattr(found, "__spec__", None) is None:
        return False
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls


def choose_attention(
    registry: Registry, need: AttentionNeed, name: str = "auto", loader: TargetLoader | None = None
) -> tuple[Registered[AttentionSpec], Skipped]:
    """The backend `name`; for "auto" the supported backend of the highest preference (if equal, the first by name).

    Returns it with the backends that "auto" skipped and the reasons. Raises `UnsupportedError` with every reason if the
    named backend, or no backend, supports `need`; `PluginError` if the named one does not exist or is broken.
    """
    loader = loader or TargetLoader(registry.plugin_files)
    if name != "auto":
        found = registry.attention(name)
        reasons = attention_reasons(found.spec, need, loader)
        if reasons:
            raise refused(f"attention backend {name!r}", reasons, registry, need, loader)
        return found, []
    skipped: Skipped = [(c.name, [str(c)]) for c in registry.conflicts if c.kind == "attention_backends"]
    for candidate, reasons in ranked_backends(registry, need, loader):
        if not reasons:
            return candidate, skipped
        skipped.append((candidate.spec.name, reasons))
    failed = [str(failure) for failure in registry.failures]
    raise UnsupportedError(
        "no attention backend supports this model here",
        [f"{each}: {', '.join(why)}" for each, why in skipped] + failed or ["none is installed"],
    )


def refused(
    what: str, reasons: list[str], registry: Registry, need: AttentionNeed, loader: TargetLoader
) -> UnsupportedError:
    """The error of a chosen backend that does not support `need`. It names the backends that do, or says of each why it
    does not."""
    ranked = [(each.spec.name, against) for each, against in ranked_backends(registry, need, loader)]
    others = [name for name, against in ranked if not against]
    if not others:
        reasons = [*reasons, *(f"{name}: {', '.join(why)}" for name, why in ranked if why != reasons)]
    fix = f"attention=auto takes {others[0]!r}" if others else "no installed backend does"
    fix += f"; {', '.join(others[1:])} would do too" if others[1:] else ""
    return UnsupportedError(f"{what} does not support this model here ({fix})", reasons)


def ranked_backends(
    registry: Registry, need: AttentionNeed, loader: TargetLoader
) -> Iterator[tuple[Registered[AttentionSpec], list[str]]]:
    """Each backend with the reasons why it does not support `need`, in the order of "auto". Loads one at a time."""
    for candidate in sorted(registry.attention_backends.values(), key=_preference):
        try:
            yield candidate, attention_reasons(candidate.spec, need, loader)
        except PluginError as error:
            yield candidate, [str(error)]


def attention_reasons(spec: AttentionSpec, need: AttentionNeed, loader: TargetLoader) -> list[str]:
    """The reasons why the backend does not support `need`; empty if it does.

    Its class is imported only if the required modules are installed. Raises `PluginError` if the class is broken.
    """
    missing = missing_modules(spec)
    if missing:
        return [missing]
    return unsupported_reasons(load_checked(loader, spec.target, AttentionBackend), need)


def unsupported_reasons(cls: type[AttentionBackend], need: AttentionNeed) -> list[str]:
    """What `cls.unsupported` returns. Raises `PluginError` if it raises, or does not return a list of strings."""
    check_capabilities(cls)
    with plugin_call(f"{name_of(cls)}.unsupported failed", cls):
        reasons: object = cls.unsupported(need)
    if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
        text = f"{name_of(cls)}.unsupported must return a list of strings, not {shown(reasons)}"
        raise PluginError(text + place_and_fix(None, cls.unsupported, text))
    return reasons


def check_capabilities(cls: type[AttentionBackend]) -> None:
    """Raises `PluginError` if `cls.capabilities`, or a field of it, has a wrong type."""
    found: object = cls.capabilities
    if not isinstance(found, AttentionCapabilities):
        text = f"{name_of(cls)}.capabilities must be a nanoengine.api.AttentionCapabilities, not {shown(found)}"
        raise PluginError(text + place_and_fix(None, cls, text))
    for name, (wanted, kind) in _CAPABILITIES.items():
        value = getattr(found, name)
        if not (isinstance(value, frozenset) and all(isinstance(each, kind) for each in value)):
            if value is None and name in ("dtypes", "head_sizes"):
                continue
            text = f"{name_of(cls)}.capabilities.{name} must be {wanted}, not {shown(value)}"
            raise PluginError(text + place_and_fix(None, cls, text))
    for feature in found.features:
        wrong = wrong_feature(feature)
        if wrong:
            text = f"{name_of(cls)}.capabilities.features: {wrong}"
            raise PluginError(text + place_and_fix(None, cls, text))
    for name in ("block_multiple", "decode_queries"):
        number = getattr(found, name)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            text = f"{name_of(cls)}.capabilities.{name} must be an integer of at least 1, not {shown(number)}"
            raise PluginError(text + place_and_fix(None, cls, text))
    if not isinstance(found.graphs, GraphSupport):
        text = f"{name_of(cls)}.capabilities.graphs must be a nanoengine.api.GraphSupport, not {shown(found.graphs)}"
        raise PluginError(text + place_and_fix(None, cls, text))


def choose_grammars(registry: Registry, name: str, loader: TargetLoader) -> type[GrammarBackend]:
    """The grammar backend `name`; for "auto" the installed one of the highest preference (if equal, the first by name).

    Raises `UnsupportedError` with the command to type if what it needs is not installed; `PluginError` if it does not
    exist or is broken.
    """
    ranked = sorted(registry.grammars.values(), key=_preference)
    candidates = ranked if name == "auto" else [registry.require("grammars", name)]
    reasons = []
    for found in candidates:
        missing = missing_modules(found.spec)
        if not missing:
            return load_checked(loader, found.spec.target, GrammarBackend)
        reasons.append(f"{found.spec.name} {missing}")
    what = "no grammar backend can be used, so output cannot be constrained"
    raise UnsupportedError(what if name == "auto" else f"grammar backend {name!r}", reasons or ["none is installed"])


def _preference(found: Registered[Any]) -> tuple[int, str]:
    """What "auto" sorts candidates by: the highest preference first; if equal, the first by name."""
    return -found.spec.preference, found.spec.name


def missing_modules(spec: AttentionSpec | GrammarSpec | CommandSpec) -> str:
    """ "needs x, not installed here (how to install it)"; "" if all that the part requires is installed."""
    missing = [module for module in spec.requires if not _is_there(module)]
    hint = f" ({spec.install})" if spec.install else ""
    return f"needs {', '.join(missing)}, not installed here{hint}" if missing else ""


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a missing parent package; a module without a spec
        return False
