"""The draw's pinned bits and tokens in plain torch on a GPU; tests/kernels has the same of the Triton kernels."""

from __future__ import annotations

import pytest
import torch
from sampling.make_vectors import logits
from sampling.test_draw import VECTORS, unsigned

from nanoengine.kernels import sampling
from nanoengine.kernels.philox import draw_keys, noise_bits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("row", VECTORS["rows"], ids=lambda r: f"{r['seed']}-{r['position']}-{r['sample_index']}")
def test_vectors(row: dict[str, object]) -> None:
    one = (torch.tensor([row[name]], device="cuda") for name in ("seed", "position", "sample_index"))
    key = draw_keys(*one)
    ids = torch.tensor(VECTORS["ids"], dtype=torch.int32, device="cuda")
    assert unsigned(key.cpu())[0].tolist() == row["key"]
    assert unsigned(noise_bits(key, ids).cpu())[0].tolist() == row["noise_bits"]
    for vocab, token in row["tokens"].items():  # type: ignore[attr-defined]
        values = torch.from_numpy(logits(int(vocab)))[None].cuda()
        assert sampling.draw(values, key)[0].item() == token


def test_another_key_gives_other_bits() -> None:
    """The comparison above sees one bit of a seed."""
    zero = torch.zeros(1, dtype=torch.int64, device="cuda")
    assert VECTORS["rows"][0]["seed"] == 0
    assert unsigned(draw_keys(zero + 2, zero, zero).cpu())[0].tolist() != VECTORS["rows"][0]["key"]
