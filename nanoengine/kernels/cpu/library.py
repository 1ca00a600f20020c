"""The C kernels as functions of tensors. Calls release the interpreter's lock, and use torch's threads."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.cpu.build import Built, NotBuilt, built

KINDS: Mapping[str, int] = {
    name: i for i, name in enumerate(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "I8", "I4"))
}
"""The kinds of weights, numbered as in products.h: a GGUF file's blocks, codes of 8 or 4 bits with float32 scales."""
GATES: Mapping[str, int] = {"silu": 1, "gelu_tanh": 2, "swiglu_clamped": 3}
LANES = 16

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES: Mapping[str, tuple[object, tuple[object, ...]]] = {
    "ne_start": (_I, ()),
    "ne_path": (ctypes.c_char_p, ()),
    "ne_tile_bytes": (_L, (_I, _L)),
    "ne_pack": (None, (_P, _P, _P, _L, _L, _L, _I, _P, _I)),
    "ne_product": (_I, (_P, _L, _L, _L, _P, _I, _P, _F, _P, _I, _P, _P, _I)),
    "ne_rows": (None, (_P, _L, _L, _P, _I, _P)),
    "ne_act_and_mul": (None, (_P, _L, _L, _I, _P, _I)),
    "ne_add_rms_norm": (None, (_P, _P, _P, _F, _L, _L, _P, _P, _I)),
    "ne_attend": (_I, (_P, _I)),
}


class Library:
    """The kernels of one shared library.

    Attributes:
        path: the instructions that it uses ("AVX-512 VNNI", "plain C").
        threaded: whether it has found torch's threads; else it runs on the caller's alone.
    """

    def __init__(self, file: Path) -> None:
        """Raises `OSError` for what cannot be loaded."""
        library = ctypes.CDLL(str(file))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._c = library
        self.threaded = bool(library.ne_start())
        self.path: str = library.ne_path().decode()

    def pack(self, blocks: Tensor, kind: str, inputs: int) -> Tensor:
        """A weight in the order that `product` reads, of as many bytes (those of K types 1 to 3% more).

        Args:
            blocks: uint8 [out, bytes of a row], blocks of the type `kind` as a GGUF file has them.
            inputs: weights of a row.

        Returns:
            uint8 [ceil(out / 16), bytes of a tile].
        """
        return self._pack(blocks.contiguous(), None, None, inputs, len(blocks), inputs, kind)

    def inputs(self, tile_bytes: int, kind: str) -> int:
        """How many inputs a tile of so many bytes has."""
        size: int = self._c.ne_tile_bytes(KINDS[kind], 256)
        return 256 * tile_bytes // size

    def pack_codes(self, codes: Tensor, scales: Tensor, minima: Tensor | None = None) -> Tensor:
        """As `pack`: values are code * scale + minimum.

        Args:
            codes: int8 [out, in] (the kind "I8"), or with minima uint8 [out, in], below 16 (the kind "I4").
            scales, minima: [out, in / group], group a multiple of 32 (or the whole row: [out, 1]).
        """
        outputs, inputs = codes.shape
        group, kind = inputs // scales.shape[1], "I8" if minima is None else "I4"
        assert group % 32 == 0 and codes.dtype is (torch.int8 if minima is None else torch.uint8)
        low = None if minima is None else minima.float().contiguous()
        return self._pack(codes.contiguous(), scales.float().contiguous(), low, group, outputs, inputs, kind)

    def _pack(
        self, blocks: Tensor, scales: Tensor | None, minima: Tensor | None,
        group: int, outputs: int, inputs: int, kind: str,
    ) -> Tensor:  # fmt: skip
        size = self._c.ne_tile_bytes(KINDS[kind], inputs)
        tiles = torch.empty(-(-outputs // LANES), size, dtype=torch.uint8)
        self._c.ne_pack(
            blocks.data_ptr(), _at(scales), _at(minima), group, outputs, inputs, KINDS[kind], tiles.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return tiles

    def product(
        self,
        x: Tensor,
        tiles: Tensor,
        kind: str,
        outputs: int,
        bias: Tensor | None = None,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        gate: Activation | None = None,
        add: Tensor | None = None,
    ) -> Tensor:
        """The product of x, quantised to signed bytes with a scale for each 32 inputs, with a packed weight.

        Args:
            x: [T, in], of any float dtype. tiles: of `pack`. outputs: of the weight. bias: [out].
            norm: [in], x is normalised by its root mean square times this before. eps: added to the mean square.
            gate: the first half of the outputs gates the second, in the same call if it is a multiple of 16.
            add: [T, result], added last.

        Returns:
            [T, out], or [T, out / 2] with a gate, of x's dtype; computed in float32, rounded once.
        """
        if gate and outputs // 2 % LANES:
            y = self.act_and_mul(self.product(x.float(), tiles, kind, outputs, bias, norm=norm, eps=eps), gate)
            return (y if add is None else y + add.float()).to(x.dtype)
        rows, inputs = x.shape
        assert inputs % 32 == 0, inputs
        y = torch.empty(rows, outputs // 2 if gate else outputs, dtype=torch.float32)
        # names keep what is converted alive until the call has ended
        wide, by, plus, more = _wide(x), _of(norm), _of(bias), _of(add)
        status = self._c.ne_product(
            wide.data_ptr(), rows, inputs, outputs, tiles.data_ptr(), KINDS[kind], _at(by), eps, _at(plus),
            GATES[gate] if gate else 0, _at(more), y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if status:
            raise MemoryError(f"no memory for {rows} quantised rows of {inputs}")
        return y if x.dtype is torch.float32 else y.to(x.dtype)

    def norm_product(
        self,
        x: Tensor,
        residual: Tensor | None,
        tiles: Tensor,
        kind: str,
        outputs: int,
        bias: Tensor | None,
        *,
        norm: Tensor,
        eps: float,
        gate: Activation | None,
    ) -> tuple[Tensor, Tensor]:
        """`product` behind a norm of the residual stream -> (result, stream): `LinearMethod.apply_normed`."""
        total = x if residual is None else x + residual
        return self.product(total, tiles, kind, outputs, bias, norm=norm, eps=eps, gate=gate), total

    def rows(self, ids: Tensor, tiles: Tensor, kind: str, inputs: int, dtype: torch.dtype) -> Tensor:
        """Rows of a packed weight: int [T] -> [T, in]. Values are those of its blocks, exactly."""
        out = torch.empty(len(ids), inputs, dtype=torch.float32)
        wanted = ids.long().contiguous()
        self._c.ne_rows(wanted.data_ptr(), len(ids), inputs, tiles.data_ptr(), KINDS[kind], out.data_ptr())
        return out.to(dtype)

    def act_and_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """float32 [T, 2 I], gates first, contiguous -> [T, I]."""
        rows, width = gate_up.shape
        out = torch.empty(rows, width // 2)
        self._c.ne_act_and_mul(
            gate_up.data_ptr(), rows, width // 2, GATES[activation], out.data_ptr(), torch.get_num_threads()
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """float32 [T, H], [T, H], [H], contiguous -> (normalised, sum): `rms_norm.add_rms_norm`."""
        y, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
        self._c.ne_add_rms_norm(
            x.data_ptr(), _at(residual), weight.data_ptr(), eps, *x.shape, total.data_ptr(), y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return y, total

    def attend(self, call: int, rows: int) -> None:
        """`ne_attend` of the structure at this address, see `attention.py`."""
        if self._c.ne_attend(call, torch.get_num_threads()):
            raise MemoryError(f"no memory for the attention of {rows} rows")


def load(cache: Path) -> Library | NotBuilt:
    """The library in this cache folder, built where it has to be; or why there is none."""
    found = built(cache)
    if not isinstance(found, Built):
        return found
    try:
        return Library(found.path)
    except (OSError, AttributeError) as error:
        return NotBuilt(f"{found.path} cannot be loaded: {error}", "delete that file, then it is built again")


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _of(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _wide(tensor)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float32 and tensor.is_contiguous() else tensor.float().contiguous()
