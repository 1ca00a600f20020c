"""`tl.inline_asm_elementwise` in Triton's interpreter, for the instructions of `gguf_fragment_parts_triton` and
`eight_bit_streamed_triton`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def inline_asm_elementwise(asm: Any, constraints: str, args: list[Any], dtype: Any, *, pack: int = 1, **_: Any) -> Any:
    """Words are uint32, sums float32, so many of each a thread as are packed: lane = place // pack % 32."""
    kinds = dtype if isinstance(dtype, tuple) else (dtype,)
    first, shape = pack * len(kinds), args[0].handle.data.shape
    given = [_register(arg.handle.data).reshape(-1, pack)[:, i] for arg in args for i in range(pack)]
    values = {f"${first + i}": each for i, each in enumerate(given)}
    size = len(values[f"${first}"])
    values["laneid"] = np.arange(size, dtype=np.uint32) % 32
    for line in re.split(r";\s*", getattr(asm, "value", asm).strip("{}")):
        name, *operands = re.findall(r"[\w.$]+", line) or [".reg"]
        if name == ".reg":
            continue
        to, given = operands[0], [_operand(values, each, size) for each in operands[1:]]
        if name.startswith("mma.sync.aligned.m16n8k16.row.col.f32"):
            given = [_operand(values, each, size) for each in operands]
            values |= zip(operands[:4], _product(given, name.split(".")[7]), strict=True)
        elif name == "mov.b32" and len(operands) == 3:  # a word's halves
            word = _operand(values, operands[2], size)
            values |= {operands[0]: word & 0xFFFF, operands[1]: word >> 16}
        elif name == "cvt.rn.f16x2.e4m3x2":
            values[to] = _halves_of_codes(given[0])
        elif name == "lop3.b32":
            assert operands[4] in ("0xEA", "0x6A")
            cut = given[0] & given[1]
            values[to] = cut | given[2] if operands[4] == "0xEA" else cut ^ given[2]
        else:
            values[to] = {
                "shr.u32": lambda a, by: a >> by, "shl.b32": lambda a, by: a << by,
                "mov.b32": lambda a: a, "mov.f32": lambda a: a, "mov.u32": lambda a: a,
                "and.b32": lambda a, b: a & b, "add.u32": lambda a, b: a + b, "setp.eq.u32": lambda a, b: a == b,
                "selp.f32": lambda a, b, wanted: np.where(wanted, a, b),
            }[name](*given)  # fmt: skip
    made = []
    for at, kind in enumerate(kinds):
        data = np.stack([values[f"${pack * at + i}"] for i in range(pack)], -1).reshape(shape)
        if kind == tl.int32:
            data = data.astype(np.uint32).view(np.int32)
        made.append(tl.tensor(TensorHandle(data, kind), tl.block_type(kind, list(shape))))
    return tuple(made) if isinstance(dtype, tuple) else made[0]


def _register(data: Any) -> Any:
    return data.astype(np.float32) if data.dtype.kind == "f" else data.astype(np.int32).view(np.uint32)


def _operand(values: dict[str, Any], name: str, size: int) -> Any:
    """A register, or a number; zeros for registers that are not written yet."""
    if name.startswith("0f"):
        return np.full(size, int(name[2:], 16), np.uint32).view(np.float32)
    if name in values or not name[0].isdigit():
        return values.get(name, np.zeros(size, np.float32))
    return np.full(size, int(name, 0), np.uint32)


def _product(operands: list[Any], kind: str) -> list[Any]:
    """d, a, b, c in the registers of a warp's threads, as PTX says for mma.m16n8k16 -> d."""
    warps = len(operands[0]) // 32
    a, b = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
    for i, register in enumerate(operands[4:8]):
        row, k = i % 2 * 8, i // 2 * 8
        a[:, row : row + 8, k : k + 8] = _two(register, kind).reshape(warps, 8, 8)
    for i, register in enumerate(operands[8:10]):
        b[:, 8 * i : 8 * i + 8] = _two(register, kind).reshape(warps, 8, 8).transpose(0, 2, 1)
    made = (a @ b).reshape(warps, 2, 8, 4, 2)
    return [
        (made[:, i // 2, ..., i % 2].reshape(-1) + register).astype(np.float32)
        for i, register in enumerate(operands[10:14])
    ]


def _halves_of_codes(words: Any) -> Any:
    """Two codes of FP8 in the lowest bytes -> two float16."""
    codes = torch.from_numpy(np.stack([words & 0xFF, words >> 8 & 0xFF], -1).astype(np.uint8))
    bits = codes.view(torch.float8_e4m3fn).half().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return bits[:, 0] | bits[:, 1] << 16


def _two(words: Any, kind: str) -> Any:
    halves = np.stack([words & 0xFFFF, words >> 16], -1)
    if kind == "bf16":
        return (halves << 16).astype(np.uint32).view(np.float32)
    return halves.astype(np.uint16).view(np.float16).astype(np.float32)
