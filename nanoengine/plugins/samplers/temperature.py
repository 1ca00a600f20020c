"""temperature: divides logits by the temperature."""

from __future__ import annotations

from torch import Tensor

from nanoengine.api import LogitsProcessor, Phase, ProcessorRows
from nanoengine.kernels.sampling import scale_by_temperature_


class Temperature(LogitsProcessor):
    phase = Phase.TEMPERATURE
    argmax_invariant = True
    sharded = True

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return scale_by_temperature_(logits, rows.column("temperature"))
