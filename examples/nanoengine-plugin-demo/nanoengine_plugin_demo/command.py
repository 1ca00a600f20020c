"""`nanoengine write-opt FOLDER` writes the tiny checkpoint. This module is imported only when the command is called."""

from pathlib import Path
from typing import Annotated

import typer

from nanoengine.api import ConfigError
from nanoengine_plugin_demo.checkpoint import write


def write_opt(
    folder: Annotated[Path, typer.Argument(help="Where to write it; it must not exist yet.")],
    layers: Annotated[int, typer.Option(min=1, help="Number of layers.")] = 2,
):
    """Write a tiny OPT with random weights."""
    if folder.exists():
        raise ConfigError(f"{folder} exists already; give another folder")
    print(f"wrote {write(folder, num_hidden_layers=layers)}")
