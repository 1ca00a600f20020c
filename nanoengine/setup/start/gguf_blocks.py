"""Blocks of a GGUF file that become plain weights while they are loaded: `quantization: none`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from nanoengine.api.errors import ModelError, WeightsError, shown
from nanoengine.kernels.gguf import BLOCK_TYPES, dequantise
from nanoengine.setup.start.packed import Join, PackedFormat, PackedTensor
from nanoengine.setup.start.weight_slices import TensorSlice


class BlockTensor(PackedTensor):
    """float32 [out, in], read from `blocks`, uint8 [out, bytes of a row]."""

    def __init__(self, blocks: Tensor, kind: str) -> None:
        self._blocks, self._kind = blocks, kind
        rows, row_bytes = blocks.shape
        self._shape, self.stored = [rows, BLOCK_TYPES[kind].width(row_bytes)], rows * row_bytes

    def get_shape(self) -> Sequence[int]:
        return self._shape

    def get_dtype(self) -> str:
        return "F32"

    def read(self, index: Any) -> tuple[list[Tensor], Join]:
        given = (index if isinstance(index, tuple) else (index,)) if index is not ... else ()
        rows, columns = [slice(*each.indices(size)) for each, size in zip(given, self._shape, strict=False)] + [
            slice(0, size) for size in self._shape[len(given) :]
        ]
        block, size = BLOCK_TYPES[self._kind].block, BLOCK_TYPES[self._kind].size
        first, last = columns.start // block, -(-columns.stop // block)  # blocks that are cut are read whole

        def join(pieces: Sequence[Tensor]) -> Tensor:
            return dequantise(pieces[0], self._kind)[:, columns.start - first * block : columns.stop - first * block]

        return [self._blocks[rows, first * size : last * size]], join


@dataclass(frozen=True, slots=True)
class BlockFormat(PackedFormat):
    """types: module -> type of its blocks."""

    method: str = "gguf"
    options: frozenset[str] = frozenset({"types", "expanded"})
    types: Mapping[str, str] = field(default_factory=dict)

    def reading(self, config: Mapping[str, Any]) -> BlockFormat:
        types = config.get("types", {})
        if not isinstance(types, Mapping) or not all(isinstance(kind, str) for kind in types.values()):
            raise ModelError(f"quantization_config.types of gguf maps modules to types, it is not {shown(types)}")
        return replace(self, types=types)

    def unpacked(self, tensors: Iterable[tuple[str, TensorSlice]]) -> Iterator[tuple[str, TensorSlice]]:
        for name, tensor in tensors:
            kind = self.types.get(name.removesuffix(".weight"), "") if name.endswith(".weight") else ""
            yield name, _checked(name, tensor, kind) if kind else tensor


def _checked(name: str, tensor: TensorSlice, kind: str) -> BlockTensor:
    shape, dtype = list(tensor.get_shape()), tensor.get_dtype()
    if kind not in BLOCK_TYPES:
        raise WeightsError(f"{name} has blocks of {shown(kind)}; valid: {', '.join(BLOCK_TYPES)}")
    if dtype != "U8" or len(shape) != 2 or shape[1] % BLOCK_TYPES[kind].size:
        raise WeightsError(
            f"{name} of {dtype} {shape} has no blocks of {kind}: U8 [out, n * {BLOCK_TYPES[kind].size}] is expected"
        )
    return BlockTensor(tensor[...], kind)  # mapped, not read


GGUF = BlockFormat()
