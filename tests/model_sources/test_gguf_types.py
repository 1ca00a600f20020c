"""Every type of tensor that a GGUF file may hold: kept in its blocks, converted to what the gguf package reads, or
refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf_zoo import HIDDEN, TinyGGUF
from safetensors import safe_open

from nanoengine.api import ModelSourceError
from nanoengine.kernels.gguf import BLOCK_TYPES, dequantise
from nanoengine.plugins.model_sources.gguf_convert import KEPT, convert

QUANTISABLE = (Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.TQ1_0, Q.TQ2_0, Q.MXFP4)  # gguf has the way there, too
READ_ONLY = (
    Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ1_S, Q.IQ1_M, Q.IQ2_XXS, Q.IQ2_XS, Q.IQ2_S, Q.IQ3_XXS, Q.IQ3_S,
    Q.IQ4_NL, Q.IQ4_XS,
)  # fmt: skip
WIDTH = 256  # the block of the K and IQ types
NAMES = ("attn_q.weight", "ffn_gate.weight", "ffn_up.weight")


class WideGGUF(TinyGGUF):
    """Rows of 256, and any type in the three matrices that read them; `raw` replaces what quantising gives."""

    def __init__(self, kind: Q) -> None:
        super().__init__("qwen3", "qwen2")
        self.kind = kind
        rng = np.random.default_rng(7)
        self.keys["qwen3.embedding_length"] = WIDTH
        for name, (values, stored) in self.weights.items():
            writes = "attn_output" in name or "ffn_down" in name  # to the residual stream, which the others read
            shape = tuple(
                WIDTH if size == HIDDEN and (writes or axis == values.ndim - 1) else size
                for axis, size in enumerate(values.shape)
            )
            kept = stored if stored in (Q.F32, Q.F16, Q.BF16) else Q.Q8_0
            self.weights[name] = (rng.normal(0, 0.3, shape).astype(np.float32), kept)

    def blocks(self, name: str) -> np.ndarray:
        """Bytes of a matrix of the type: quantised where gguf can, else drawn, with finite scales: each is a code."""
        values, _ = self.weights[name]
        if self.kind in QUANTISABLE:
            return gguf.quantize(values, self.kind)
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        raw = np.random.default_rng(len(name)).integers(0, 256, (values.shape[0], WIDTH // block * size), np.uint8)
        scales = np.float16([0.01, -0.02]).view(np.uint8)
        for row in raw.reshape(-1, size):
            for at in SCALES.get(self.kind, ()):
                row[at : at + 2] = scales[:2] if at == 0 else scales[2:]
        if self.kind == Q.IQ1_M:  # its scale is spread over the high nibbles of four words: 0x2022, about 0.008
            words = raw.reshape(-1, size)[:, 48:56].view("<u2")
            words[...] = (words & 0x0FFF) | np.uint16([0x2000, 0x2000, 0x0000, 0x2000])
        return raw

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.arch)
        self._write_keys(writer)
        for name, (values, kind) in self.weights.items():
            if name.endswith(NAMES):
                writer.add_tensor(name, self.blocks(name), raw_dtype=self.kind)
            else:
                writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        self._finish(writer)
        return path


# Where in a block its float16 scales lie (ggml-common.h).
SCALES = {
    Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,), Q.IQ1_S: (0,), Q.IQ1_M: (),
    Q.IQ2_XXS: (0,), Q.IQ2_XS: (0,), Q.IQ2_S: (0,), Q.IQ3_XXS: (0,), Q.IQ3_S: (0,), Q.IQ4_NL: (0,), Q.IQ4_XS: (0,),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*QUANTISABLE, *READ_ONLY], ids=lambda kind: kind.name)
def test_type_becomes_the_values_that_gguf_reads(kind: Q, tmp_path: Path) -> None:
    tiny = WideGGUF(kind)
    convert(tiny.write(tmp_path / "tiny.gguf"), tmp_path, lambda text: None)
    found, given = tensors(tmp_path), json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for short, long in {"attn_q": "self_attn.q_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}.items():
        values, blocks = found[f"model.layers.1.{long}.weight"], tiny.blocks(f"blk.1.{short}.weight")
        expected = gguf.dequantize(blocks, kind)
        assert given["types" if kind.name in KEPT else "expanded"][f"model.layers.1.{long}"] == kind.name
        if kind.name in KEPT:
            assert np.array_equal(values, blocks)
            values = dequantise(torch.from_numpy(values), kind.name).numpy()
        assert values.dtype == np.float32
        assert np.array_equal(values, expected)
        assert np.isfinite(values).all()
        assert values.std() > 0
        assert len(np.unique(values)) > 3 or kind in (Q.TQ1_0, Q.TQ2_0)
    if kind in QUANTISABLE:  # and these are the ones that were meant
        original = tiny.weights["blk.1.ffn_up.weight"][0]
        assert np.corrcoef(values.ravel(), original.ravel())[0, 1] > 0.7


def test_types_that_are_kept_have_products() -> None:
    assert set(BLOCK_TYPES) == KEPT


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """The float32 and uint8 tensors of the written file (numpy has no bfloat16)."""
    with safe_open(folder / "model.safetensors", "np") as file:
        names = [name for name in file.keys() if file.get_slice(name).get_dtype() in ("F32", "U8")]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def test_every_type_that_gguf_reads_is_tried() -> None:
    """A newer gguf package may read more: they are to be added here."""
    readable = set()
    for kind in Q:
        _, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        readable.add(kind)
    assert readable == {*QUANTISABLE, *READ_ONLY, Q.F32, Q.F16, Q.BF16, Q.NVFP4}


def test_type_that_gguf_cannot_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"\.weight is of type Q8_1, which is not supported; valid: F32, F16"):
        convert(WideGGUF(Q.Q8_1).write(tmp_path / "tiny.gguf"), tmp_path, lambda text: None)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
