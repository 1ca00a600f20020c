from dataclasses import dataclass
from typing import ClassVar

from nanoengine.api import ColumnSpec, ParamsError, ProcessorParams


@dataclass(frozen=True)
class TopNSigmaParams(ProcessorParams):
    """top_n_sigma: only tokens whose logit is within so many standard deviations of the highest; 0: all."""

    columns: ClassVar = {"top_n_sigma": ColumnSpec(dtype="float32")}

    top_n_sigma: float = 0.0

    def __post_init__(self):
        if not self.top_n_sigma >= 0:
            raise ParamsError(f"top_n_sigma must be 0 or more, not {self.top_n_sigma}")
