"""Temperature: logits / temperature."""

from __future__ import annotations

from torch import Tensor

from nanoengine.api import Phase, SamplerStage, StageRows
from nanoengine.kernels.sampling import scale_by_temperature_


class Temperature(SamplerStage):
    phase = Phase.TEMPERATURE
    argmax_invariant = True
    sharded = True

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        return scale_by_temperature_(logits, rows.column("temperature"))
