"""Writes vectors.json from the numpy reference: `python -m sampling.make_vectors` in tests/. The draw is a promise:
a change of these numbers changes what every seeded request answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from . import reference

PATH = Path(__file__).with_name("vectors.json")
ROWS = [(0, 0, 0), (1, 5, 0), (1, 5, 1), (1, 6, 0), (-1, 17, 0), (2**63 - 1, 4096, 3), (-(2**63), 2**33 + 7, 0)]
IDS = [0, 1, 2, 3, 255, 4095, 49151, 151935, 262143]


def logits(vocab: int) -> np.ndarray:
    """float32 [vocab], exact in any arithmetic: quarters from -4 to 4 in a fixed disorder."""
    return ((np.arange(vocab) * 7919 % 33) / 4 - 4).astype(np.float32)


def vectors() -> list[dict[str, Any]]:
    out = []
    for seed, position, sample_index in ROWS:
        key = reference.draw_key(seed, position, sample_index)
        tokens = {}
        for vocab in (8, 1000, 49152):
            scores = logits(vocab) + reference.gumbel(reference.noise_bits(key, np.arange(vocab)))
            second, best = np.sort(scores)[-2:]
            assert best - second > 1e-3, "too close for float32 arithmetic to be sure"
            tokens[str(vocab)] = int(scores.argmax())
        noise = [int(b) for b in reference.noise_bits(key, np.array(IDS))]
        row = {"seed": seed, "position": position, "sample_index": sample_index}
        out.append(row | {"key": list(key), "noise_bits": noise, "tokens": tokens})
    return out


if __name__ == "__main__":
    body = ",\n".join("  " + json.dumps(v) for v in vectors())
    PATH.write_text('{"ids": ' + json.dumps(IDS) + ', "rows": [\n' + body + "\n]}\n")
