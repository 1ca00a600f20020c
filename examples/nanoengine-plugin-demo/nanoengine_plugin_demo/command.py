"""`nanoengine write-opt FOLDER`: the tiny checkpoint. This module is imported only when the command is called."""

from pathlib import Path
from typing import Annotated

import typer

from nanoengine.api import ConfigError
from nanoengine_plugin_demo.checkpoint import write


def write_opt(
    folder: Annotated[Path, typer.Argument(help="Where to write it; it must not be there yet.")],
    layers: Annotated[int, typer.Option(min=1, help="How many layers it has.")] = 2,
):
    """Write a tiny OPT of random weights."""
    if folder.exists():
        raise ConfigError(f"{folder} is there already; give another folder")
    print(f"wrote {write(folder, num_hidden_layers=layers)}")
