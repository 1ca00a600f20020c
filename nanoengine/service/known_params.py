"""The parameters of requests from another process: most of them are those of a request before."""

from __future__ import annotations

from nanoengine.params.sampling_params import SamplingParams
from nanoengine.service.frames import params_from_json

_MOST = 256
_LONGEST = 1024  # bytes


class KnownParams:
    """Sampling parameters by the JSON that they came as. They are immutable, and what is computed of them (their key,
    their check) is computed once."""

    def __init__(self) -> None:
        self._known: dict[bytes, SamplingParams] = {}

    def of(self, data: bytes) -> SamplingParams:
        """As `params_from_json`, whose errors are not kept."""
        found = self._known.get(data)
        if found is None:
            found = params_from_json(data)
            if len(data) <= _LONGEST:
                if len(self._known) >= _MOST:
                    self._known.clear()
                self._known[data] = found
        return found
