"""The kernels of experts, of a layer's products, of eight-bit weights, and attention of rows with drafts, compiled for
a Hopper GPU without one: no register is spilled, and weights and keys are read by 16 bytes a thread, or by the copy
engine. How fast they are only a GPU shows. Without one, half of what has rows, heads or stages is compiled; all of it
beside a GPU, and by `python tests/kernels/compile_for_hopper.py --all`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import uninterpreted

pytest.importorskip("triton")
EVERY = torch.cuda.is_available()


@pytest.fixture(scope="module")
def kernels(compiled_before: str) -> dict[str, dict[str, Any]]:
    """In a process of its own: in this one Triton interprets."""
    told = uninterpreted.run("compile_for_hopper.py", *["--all"] * EVERY, TRITON_CACHE_DIR=compiled_before)
    found: dict[str, dict[str, Any]] = json.loads(told)
    return found


def test_nothing_is_spilled(kernels: dict[str, dict[str, Any]]) -> None:
    """But six words of a kernel that holds 96 registers of weight a thread: measured, it is the fastest."""
    assert len(kernels) == (76 if EVERY else 61)
    for name, kernel in kernels.items():
        # a rotation by a large angle takes 32 bytes of its own
        assert kernel["STACK"] <= (
            24 if name == "few down" else 32 if name.startswith(("slices", "from qkv")) else 0
        ), name
        assert kernel["LOCAL"] == 0, name
        assert kernel["REG"] <= (
            255
            if name.startswith(("layer", "half of", "from qkv")) or name == "int4 x64"
            else 200
            if name.startswith("drafts")
            else 168
        ), name


def test_programs_of_a_few_tokens_ask_for_their_weights_at_once(kernels: dict[str, dict[str, Any]]) -> None:
    """16 bytes a thread of one warp: a row of gate and one of up, 4 KiB each; of down a row of 8 experts, 12 KiB; of
    the router 4 rows by four warps."""
    for name, loads in (("few gate_up", 16), ("few down", 24), ("norm_router", 8)):
        assert kernels[name]["instructions"]["LDG.E.128"] >= loads, name


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_codes_of_gguf_blocks_are_read_by_16_bytes(kernels: dict[str, dict[str, Any]], kind: str) -> None:
    """And x: no byte is loaded alone but scales of Q6_K, one for 16 weights."""
    found = kernels[f"gguf one {kind}"]["instructions"]
    assert found["LDG.E.128"] >= 8
    assert sum(n for op, n in found.items() if op.startswith("LDG.E.U8")) <= (16 if kind == "Q6_K" else 0)
    tiled = kernels["gguf tiled Q4_K"]["instructions"]
    assert tiled["HGMMA"] > 0
    assert not any(op.startswith("LDG.E.U8") for op in tiled)


@pytest.mark.parametrize("rows", [64, 2048])
@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_tiles_of_weights_and_tokens_are_copied_ahead(kernels: dict[str, dict[str, Any]], name: str, rows: int) -> None:
    """By 16 bytes, also of tokens that are gathered; two programs of a decode step fit a multiprocessor."""
    kernel = kernels[f"grouped {name} x{rows}"]
    copies = {op: n for op, n in kernel["instructions"].items() if op.startswith("LDGSTS")}
    assert copies
    assert all(op.endswith(".128") for op in copies)
    assert not any(op.endswith((".U16", ".U8")) for op in kernel["instructions"])
    assert kernel["instructions"]["HGMMA"] > 0
    assert kernel["shared"] <= (113_000 if rows == 64 else 227_000)


def test_three_warpgroups_share_a_multiprocessor(kernels: dict[str, dict[str, Any]]) -> None:
    """Each multiplies four times a step, from four stages of shared memory; halves of sums stay where they are."""
    kernel = kernels["wide gate_up x256"]
    assert kernel["instructions"]["HGMMA"] == 3 * 4
    assert kernel["REG"] * 3 * 128 <= 65536
    assert kernel["shared"] <= 227 << 10
    assert not any(op.startswith("SHFL") for op in kernel["instructions"])


_OF_A_LAYER = [
    *(
        f"{name} x{rows}"
        for i, rows in enumerate((64, 128, 256, 512))
        for j, name in enumerate(("qkv", "o", "gate_up", "down"))
        if EVERY or (i + j) % 2
    ),
    "gate_up x704", "gate_up x1088", "down x704",
]  # fmt: skip


@pytest.mark.parametrize("name", _OF_A_LAYER)
def test_products_of_a_layer_are_read_by_the_copy_engine(kernels: dict[str, dict[str, Any]], name: str) -> None:
    """And not by threads; one program of the tiles fits a multiprocessor."""
    kernel = kernels[f"layer {name}"]
    assert kernel["instructions"]["UTMALDG"] >= 4
    assert kernel["instructions"]["HGMMA"] > 0
    assert not any(op.startswith("LDGSTS") for op in kernel["instructions"])
    assert kernel["shared"] <= 227 << 10


def test_products_of_two_ranks(kernels: dict[str, dict[str, Any]]) -> None:
    """Of few rows, two programs of gate and up fit a multiprocessor. What goes to the other rank goes by 16 bytes, and
    what comes is read past the multiprocessor's own cache; rings for one row are as without ranks."""
    for name in ("qkv x64", "gate_up x64", "down x64", "down x128", "down x256"):
        kernel, programs = kernels[f"half of {name}"], 2 if name == "gate_up x64" else 1
        assert (kernel["shared"] + 1024) * programs <= 228 << 10
        assert kernel["REG"] * 128 * programs <= 65536
        assert kernel["STACK"] == kernel["LOCAL"] == 0
        if name.startswith("down"):
            assert kernel["instructions"]["LDG.E.128.STRONG.GPU"] >= 2
            assert kernel["stores"]["STG.E.128"] >= 4
            assert not any(op in kernel["stores"] for op in ("STG.E.U16", "STG.E.64"))
    kernel = kernels["streamed half of down"]
    assert kernel["instructions"]["LDG.E.64.STRONG.SYS"] == 1  # a thread has one word, and waits for no other
    assert kernel["stores"]["STG.E.64"] == 1
    assert 4 * (kernel["shared"] + 1024) <= 228 << 10
    assert 4 * kernel["threads"] * kernel["REG"] <= 65536


@pytest.mark.parametrize("name", ["qkv", "gate_up"])
def test_two_programs_of_the_widest_products_are_one_wave(kernels: dict[str, dict[str, Any]], name: str) -> None:
    """Of 512 rows, 256 and 192 of them: two to a multiprocessor."""
    kernel, threads = kernels[f"layer {name} x512"], 256 if name == "gate_up" else 128
    assert (kernel["shared"] + 1024) * 2 <= 228 << 10
    assert kernel["REG"] * threads * 2 <= 65536


@pytest.mark.parametrize(
    ("name", "programs"),
    [
        ("64 x 5, 16", 5),
        ("64 x 16, 32", 1),
        ("1 x 5, 16", 3),
        *[("64 x 16, 16", 4), ("64 x 5, 32", 2)] * EVERY,
    ],
)
def test_a_multiprocessor_holds_enough_programs_of_rows_with_drafts(
    kernels: dict[str, dict[str, Any]], name: str, programs: int
) -> None:
    """As many as keep the memory busy: 64 rows of 8 KV heads are then about one wave of programs, as with one query."""
    kernel, threads = kernels[f"drafts {name} heads"], 256 if name == "64 x 16, 32" else 128
    assert kernel["REG"] * threads * programs <= 65536
    assert (kernel["shared"] + 1024) * programs <= 228 << 10
    copies = [op for op in kernel["instructions"] if op.startswith("LDGSTS") and op != "LDGSTS.E"]  # of keys and values
    assert copies
    assert all(op.endswith(".128") for op in copies)
    assert ("HGMMA" in kernel["instructions"]) is name.endswith("32")  # from 64 (query, head) pairs on


@pytest.mark.parametrize("name", ["fp8, 2 heads", "int8, 2 heads", *["fp8, 8 heads"] * EVERY])
def test_a_multiprocessor_holds_four_programs_of_keys_in_eight_bits(
    kernels: dict[str, dict[str, Any]], name: str
) -> None:
    """Tensor cores read them as they are; they are copied by 16 bytes."""
    kernel = kernels[f"codes {name}"]
    assert kernel["REG"] * 128 * 4 <= 65536
    assert (kernel["shared"] + 1024) * 4 <= 228 << 10
    assert kernel["instructions"]["IGMMA" if name.startswith("int8") else "QGMMA"] >= 8
    assert kernel["instructions"]["LDGSTS.E.BYPASS.128"] >= 8


@pytest.mark.parametrize(("name", "keys", "programs"), [("fp8, 2 heads", 64, 8), ("int8, 2 heads", 128, 6)])
def test_a_multiprocessor_is_full_of_slices_of_codes(
    kernels: dict[str, dict[str, Any]], name: str, keys: int, programs: int
) -> None:
    """One product has both columns of a head of the query: four of 64 keys."""
    kernel = kernels[f"slices of {name}"]
    assert kernel["REG"] * 128 * programs <= 65536
    assert (kernel["shared"] + 1024) * programs <= 228 << 10
    assert kernel["instructions"]["IGMMA" if name.startswith("int8") else "QGMMA"] == keys // 16
    assert kernel["instructions"]["LDGSTS.E.BYPASS.128"] == keys // 4


@pytest.mark.parametrize(
    ("name", "ring", "programs"),
    [
        ("streamed qkv", 64, 2),
        ("streamed o", 48, 4),
        ("streamed gate_up", 96, 2),
        ("streamed down", 96, 2),
        ("streamed half of down", 48, 4),
        ("eight-bit streamed qkv", 64, 2),
        ("eight-bit streamed gate_up", 48, 4),
        ("eight-bit streamed down", 96, 2),
    ],
)
def test_rings_of_large_weights_are_filled_before_the_wait(
    kernels: dict[str, dict[str, Any]], name: str, ring: int, programs: int
) -> None:
    """KiB of each of the programs that a multiprocessor is to hold, by copies of 16 bytes a thread; beside rings of 96
    the next kernel's find no room."""
    kernel = kernels[name]
    assert kernel["ring"] == ring << 10
    assert kernel["in_front"]["waits"] == 0
    copies = [op for op in kernel["instructions"] if op.startswith("LDGSTS")]
    assert copies
    assert all(op.endswith(".128") for op in copies)
    taken = kernel["shared"] + 1024
    assert programs * taken <= 228 << 10
    assert ring < 96 or 3 * taken > 228 << 10
    assert programs * kernel["threads"] * kernel["REG"] <= 65536


@pytest.mark.parametrize(("stages", "registers"), [(1, 240), *[(2, 168)] * EVERY])
def test_attention_of_one_row_from_qkv_takes_little_shared_memory(
    kernels: dict[str, dict[str, Any]], stages: int, registers: int
) -> None:
    kernel = kernels[f"from qkv, {stages} stages"]
    assert kernel["shared"] <= 36 << 10
    assert kernel["REG"] <= registers


@pytest.mark.parametrize("rows", [1, 256, *[8, 16] * EVERY])
def test_attention_by_slices_leaves_room_for_others(kernels: dict[str, dict[str, Any]], rows: int) -> None:
    """Few rows: for programs of the products in front and behind, each with 80 KiB and 256 threads of 64 registers, so
    that keys are asked for while a product runs. Many: for six programs."""
    kernel = kernels[f"slices x{rows}"]
    if rows == 256:
        assert 6 * (kernel["shared"] + 1024) <= 228 << 10
        assert 6 * 128 * kernel["REG"] <= 65536
    else:
        assert kernel["shared"] <= (146 << 10)
        assert kernel["REG"] * 128 + 2 * 64 * 256 <= 65536
    copies = [op for op in kernel["instructions"] if op.startswith("LDGSTS")]
    assert copies == ["LDGSTS.E.BYPASS.128"]
    assert kernel["instructions"]["HGMMA"] >= 32


def test_one_row_times_eight_bit_weights_asks_for_them_at_once(kernels: dict[str, dict[str, Any]]) -> None:
    """256 bytes a thread, of which three programs of 128 fit a multiprocessor."""
    kernel = kernels["eight-bit gemv, group"]
    assert kernel["instructions"]["LDG.E.128"] >= 16
    assert kernel["REG"] * 384 <= 65536


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("fp8 x16, token", "QGMMA"),
        ("fp8 x64, group", "QGMMA"),
        ("int8 x256, token", "IGMMA"),
        ("int8 x16, plain", "HGMMA"),
    ],
)
def test_tiles_of_eight_bit_weights_are_multiplied_as_such(
    kernels: dict[str, dict[str, Any]], name: str, op: str
) -> None:
    """By the tensor cores' own eight bits, or in sixteen where the inputs are not quantised; copied ahead."""
    kernel = kernels[f"eight-bit {name}"]
    assert kernel["instructions"][op] > 0
    assert kernel["instructions"]["LDGSTS.E.BYPASS.128"] > 0
    assert kernel["shared"] <= 227_000


def test_products_of_codes_do_not_wait_for_each_other(kernels: dict[str, dict[str, Any]]) -> None:
    """Those of a step of 128 inputs are in flight at once, of each of two warpgroups: the compiler waits behind each
    product if it cannot place their registers."""
    kernel = kernels["int4 roles"]
    assert kernel["instructions"]["HGMMA"] == 16
    assert kernel["instructions"]["WARPGROUP.DEPBAR"] == 2
    assert kernel["instructions"]["UTMALDG"] >= 4
    assert kernel["shared"] <= 227 << 10


@pytest.mark.parametrize(("rows", "programs"), [(1, 8), (16, 7), (64, 1)])
def test_a_multiprocessor_holds_programs_of_four_bits_that_work_while_others_wait(
    kernels: dict[str, dict[str, Any]], rows: int, programs: int
) -> None:
    """Codes are copied by 16 bytes, and cut in the registers from which tensor cores take them: those of 64 rows of the
    weight at once, from 16 tokens on."""
    kernel, threads = kernels[f"int4 x{rows}"], 256 if rows == 64 else 128
    assert kernel["REG"] * threads * programs <= 65536
    assert (kernel["shared"] + 1024) * programs <= 228 << 10
    assert kernel["instructions"]["LDGSTS.E.BYPASS.128"] >= 6
    assert ("HGMMA" in kernel["instructions"]) is (rows > 8)
