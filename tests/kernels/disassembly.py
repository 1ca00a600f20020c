"""What is in compiled kernels, by the tools that come with Triton: registers, spilled bytes, and instructions by name.

A disassembler takes most of a second to start, more than ptxas needs for a kernel: one call reads the code of all."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/ +(.*?);")
COUNTED = re.compile(r"\b(LDG\.E[.\w]*|LDGSTS[.\w]*|[HQI]GMMA|UTMALDG|WARPGROUP\.DEPBAR|SHFL[.\w]*|STG\.E[.\w]*)\b")


def code(cubin: bytes) -> bytes:
    """The section of a kernel's instructions, of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    found = [
        cubin[start : start + length]
        for name, _, _, _, start, length in sections
        if cubin.startswith(b".text.", sections[names][4] + name)
    ]
    assert len(found) == 1
    return found[0]


def instructions(cubins: Sequence[bytes]) -> list[Counter[str]]:
    """Of each: how often those are in it that tests ask for."""
    parts = [code(cubin) for cubin in cubins]
    starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
    told = _asked("nvdisasm", b"".join(parts), "--binary", "SM90")
    found = [Counter[str]() for _ in parts]
    for place, text in LINE.findall(told):
        found[bisect_right(starts, int(place, 16)) - 1].update(COUNTED.findall(text))
    return found


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of its stack and of what is spilled."""
    told = _asked("cuobjdump", cubin, "-res-usage")
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


def _asked(tool: str, contents: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(contents)
        file.flush()
        return subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
