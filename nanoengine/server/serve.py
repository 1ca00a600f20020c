"""`nanoengine serve`: serves a model over HTTP."""

from __future__ import annotations

from nanoengine.api.errors import ConfigError
from nanoengine.cli.common import ConfigArgument, DebugOption, OverridesArgument, PluginOption, user_errors
from nanoengine.server.config import server_config
from nanoengine.setup.config.config import load_config
from nanoengine.setup.plugins.discover import discover


def serve(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Serve a model over HTTP."""
    with user_errors(debug):
        composed = load_config(config, overrides or (), registry=discover(plugin or ()))
        options = server_config(composed.sections)
        raise ConfigError(f"cannot serve at {options.host}:{options.port}: the supervisor is not in this version yet")
