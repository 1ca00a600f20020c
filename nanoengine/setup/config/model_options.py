"""The hint for a name that only the config group `model` has: YAML chooses such options, Python takes sources."""

from __future__ import annotations

import difflib

from nanoengine.api.errors import NanoEngineError
from nanoengine.setup.config.composer import SearchPath, package_root
from nanoengine.setup.plugins.registry import Registry

_GROUP = "model"


def option_hint(source: str, registry: Registry) -> str:
    """Tail of a message on a model that no source has: the option that `source` is, or nearly is, and the source that
    the option means; "" where there is none.

    `source` may end with a revision. A broken config root gives "": another mistake is being reported.
    """
    name, at, revision = source.partition("@")
    try:
        roots = [root for where, origin in registry.config_roots for root in package_root(where, str(origin))]
        search = SearchPath(None, roots)
        close = difflib.get_close_matches(name, search.options(_GROUP), n=1, cutoff=0.8)
        file = search.find(_GROUP, close[0]) if close else None
    except NanoEngineError:
        return ""
    if file is None:
        return ""
    meant = file.data.get("source")
    if meant in registry.source_names():
        return ""  # a name in Python too, and named as such
    if not isinstance(meant, str) or "${" in meant:
        return f". In a configuration model={close[0]} chooses {file.label}"
    take = f"{meant}{at}{revision}" if "@" not in meant else meant
    is_one = "is an option" if close[0] == name else f"is near {close[0]!r}, an option"
    return f". {name!r} {is_one} of a configuration (model={close[0]}), where it means {take!r}: give that here"
