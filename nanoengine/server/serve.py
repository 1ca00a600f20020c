"""`nanoengine serve`: serves a model over HTTP. This process becomes the supervisor; it imports no torch."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import typer

from nanoengine.api.errors import ConfigError
from nanoengine.cli.common import FAILED, ConfigArgument, DebugOption, OverridesArgument, PluginOption, say, user_errors
from nanoengine.observe.logs import configure_logs
from nanoengine.server.auth import configured_keys
from nanoengine.server.config import ServerConfig, server_config, service_options
from nanoengine.server.listening import listen, url
from nanoengine.server.supervisor import Launch, ServerFailed, Supervisor
from nanoengine.service.source import EngineSource
from nanoengine.setup.config.config import RunConfig, load_config
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry
from nanoengine.text.sample_parser import reasoning_tags


def serve(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Serve a model over HTTP, by OpenAI's and Anthropic's APIs.

    Its settings are the section `server`, for example server.port=8001 server.workers=2.
    `nanoengine config show CONFIG server=default` lists them.

    Ctrl-C or SIGTERM lets running requests end; a second one ends at once.
    """
    with user_errors(debug):
        files = [path.absolute() for path in plugin or ()]
        registry = discover(files)
        composed = load_config(config, overrides or (), registry=registry)
        options = server_config(composed.sections)
        _check_installed(options)
        options = _checked(options, registry)
        try:
            status = run_server(composed, options, files)
        except ServerFailed as error:
            say(f"error: {error}")
            raise typer.Exit(FAILED) from error
        if status:
            raise typer.Exit(status)


def run_server(config: RunConfig, options: ServerConfig, plugin_files: Sequence[Path] = ()) -> int:
    """Runs the server until it is asked to end. The exit status.

    Raises `ConfigError` if the address cannot be bound, and what `Supervisor.run` raises.
    """
    service = service_options(options, config.model.source).to_json()
    source = replace(EngineSource.of_config(config, plugin_files), service=service)
    named = replace(options, served_model_name=options.served_model_name or (config.model.source,))
    with listen(options.host, options.port) as listener:
        configure_logs(options.log_format, options.log_level, "supervisor")
        launch = Launch(
            listener=listener,
            address=url(listener),
            model=named.served_model_name[0],
            engine={"source": source.to_json(), "log_format": options.log_format, "log_level": options.log_level},
            http={"config": asdict(named), "plugin_files": [str(path) for path in plugin_files]},
        )
        return asyncio.run(_run(options, launch))


async def _run(options: ServerConfig, launch: Launch) -> int:
    return await Supervisor(options, launch).run()


def _checked(options: ServerConfig, registry: Registry) -> ServerConfig:
    """The options, with all keys as hashes: every HTTP process has those of the start, whatever the file becomes.

    Raises `ConfigError` or `PluginError` for what would be wrong only in processes that start later.
    """
    if options.tool_parser not in (None, "auto"):
        registry.require("tool_parsers", options.tool_parser)
    reasoning_tags(options.reasoning_parser, template="")
    return replace(options, api_keys=configured_keys(options).entries, api_keys_file=None)


def _check_installed(options: ServerConfig) -> None:
    """Raises `ConfigError` for a library of an extra that is not there."""
    if options.traces.endpoint is not None and importlib.util.find_spec("opentelemetry") is None:
        raise ConfigError("server.traces.endpoint needs opentelemetry: pip install 'nanoengine[otel]'")
