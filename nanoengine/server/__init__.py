"""The HTTP server. This module is the plugin that registers its command, `serve`, and its section, `server`."""

from __future__ import annotations

from nanoengine.api.hooks import hookimpl
from nanoengine.api.specs import CommandSpec


@hookimpl
def register_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="serve",
            target=f"{__name__}.serve:serve",
            help="Serve a model over HTTP, by OpenAI's and Anthropic's APIs.",
            api=1,
            sections={"server": f"{__name__}.config:ServerConfig"},
            requires=("fastapi", "uvicorn", "httptools", "msgspec", "prometheus_client"),
            install="pip install 'nanoengine[server]'",
        )
    ]
