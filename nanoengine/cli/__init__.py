"""The command line, one file a command. Torch is imported only by what runs a model.

Exit status: 0; 1 if any request failed; 2 for a mistake of usage or configuration; 130 when interrupted.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of `nanoengine`."""
    from nanoengine.cli.app import app

    app(prog_name="nanoengine")
