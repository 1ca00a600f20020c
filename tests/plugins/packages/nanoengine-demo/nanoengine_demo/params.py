from dataclasses import dataclass
from typing import ClassVar

from nanoengine.api import ColumnSpec, ProcessorParams


@dataclass(frozen=True)
class EvenOnlyParams(ProcessorParams):
    """even_only: only even token ids may be drawn."""

    columns: ClassVar = {"even_only": ColumnSpec(dtype="bool", default=False)}

    even_only: bool = False
