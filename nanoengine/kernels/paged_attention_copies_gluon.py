"""The warp that feeds `paged_attention_prefill_gluon`: it chooses tiles of queries, and asks the copy engine for them
and for their rows' keys and values, block by block."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment,attr-defined"
# ruff: noqa: N803, RUF005 - constants of a kernel are in capitals, and Triton knows no starred tuple
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from nanoengine.kernels.pdl_triton import release_dependents, wait_for_inputs

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # by its name in Triton 3.6, and behind it
HEAD = 128
D = gl.constexpr(HEAD)
HALF = gl.constexpr(HEAD // 2)  # what a row of 128 bytes holds, as the copy engine and the tensor cores take it
M = gl.constexpr(64)  # (query, head) pairs of a warpgroup
FACTS = gl.constexpr(8)  # numbers that describe a tile of queries, as `fact` reads them
FIRST, STOP, LOWEST, LENGTH, END, KV_HEAD = (gl.constexpr(i) for i in range(6))


@gluon.jit
def _rows_with_tokens(starts, num_rows, stop):
    """How many rows begin before token `stop`: rows of padding stand behind the last one, and have none."""
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        if gl.load(starts + middle) < stop:
            low = middle + 1
        else:
            high = middle
    return low


@gluon.jit
def _row_of_tile(starts, origin, tile, last, BLOCK_Q: gl.constexpr):
    """As in `paged_attention_prefill_triton`, among rows 0..last."""
    low = 0
    high = last
    while low < high:
        middle = (low + high + 1) // 2
        if (gl.load(starts + middle) - origin) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@gluon.jit
def _put(facts, at: gl.constexpr, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    facts.index(at).store(gl.full([1], 0, gl.int32, layout=layout) + value)


@gluon.jit
def fact(facts, at: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(facts.index(at).load(layout), 0)


@gluon.jit
def _copy_tile(desc, boxes, ready, stage, rows, BOX: gl.constexpr, TILE: gl.constexpr):
    """Asks for a tile of keys or values; rows: where its blocks begin in the cache."""
    count: gl.constexpr = TILE // BOX
    mbarrier.expect(ready.index(stage), TILE * D * 2)
    for half in gl.static_range(2):
        for i in gl.static_range(count):
            place = boxes.index((stage * 2 + half) * count + i)
            tma.async_copy_global_to_shared(desc, [rows[i], half * HALF], ready.index(stage), place)


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, tables, seq_lens, starts, counter, num_rows, num_tokens, table_stride,
    boxes, facts, ready, free,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """One warp: chooses tiles of queries, describes them, and has all copied. boxes, ready, free: of queries, keys and
    values."""
    queries, keys, values = boxes
    q_ready, k_ready, v_ready = ready
    q_free, k_free, v_free = free
    tokens: gl.constexpr = M // GROUP  # of a warpgroup
    block_q: gl.constexpr = tokens * CONSUMERS
    box: gl.constexpr = min(BLOCK, TILE)
    wait_for_inputs(True)
    release_dependents(True)
    origin = gl.load(starts)
    padding = gl.load(starts + num_rows)  # token
    filled = _rows_with_tokens(starts, num_rows, padding)
    tiles = (padding - origin) // block_q + filled
    items = (tiles + gl.cdiv(num_tokens - padding, block_q)) * KV_HEADS
    item = gl.program_id(0)
    taken = 0  # tiles of queries
    at = 0  # tiles of keys
    while item < items:
        tile = tiles - 1 - item // KV_HEADS  # a row's longest tiles first
        head = item % KV_HEADS
        first = padding + (-1 - tile) * block_q  # token
        stop = num_tokens
        row = 0
        length = 0
        lowest = 0
        end = 0
        if tile >= 0:  # else padding: no keys
            row = _row_of_tile(starts, origin, tile, filled - 1, block_q)
            start = gl.load(starts + row)
            first = start + (tile - ((start - origin) // block_q + row)) * block_q
            stop = gl.load(starts + row + 1)
            length = gl.load(seq_lens + row)
            lowest = length - stop + first  # position of the tile's first query
            end = gl.minimum(lowest + block_q, length)
        if first < stop:
            table = tables + row.to(gl.int64) * table_stride
            mbarrier.wait(q_free.index(0), (taken & 1) ^ 1)
            _put(facts, FIRST, first)
            _put(facts, STOP, stop)
            _put(facts, LOWEST, lowest)
            _put(facts, LENGTH, length)
            _put(facts, END, end)
            _put(facts, KV_HEAD, head)
            barrier()
            mbarrier.expect(q_ready.index(0), CONSUMERS * M * D * 2)
            for i in gl.static_range(2 * CONSUMERS):
                place = [first + i // 2 * tokens, head * GROUP, i % 2 * HALF]
                tma.async_copy_global_to_shared(q_desc, place, q_ready.index(0), queries.index(i))
            last = (length - 1) // BLOCK  # block of the row: one behind it may be anyone's
            for begin in range(0, end, TILE):
                rows = ()
                for i in gl.static_range(TILE // box):
                    key = begin + i * box
                    block = gl.load(table + gl.minimum(key // BLOCK, last))
                    rows = rows + ((block * KV_HEADS + head) * BLOCK + key % BLOCK,)
                stage = at % STAGES
                phase = (at // STAGES & 1) ^ 1
                mbarrier.wait(k_free.index(stage), phase)
                _copy_tile(k_desc, keys, k_ready, stage, rows, box, TILE)
                mbarrier.wait(v_free.index(stage), phase)
                _copy_tile(v_desc, values, v_ready, stage, rows, box, TILE)
                at += 1
            taken += 1
        asked = gl.atomic_add(counter, 1, sem="relaxed")  # as often as there are items, over all programs
        item = gl.num_programs(0) + asked
        if asked == items - 1:
            gl.store(counter, 0)  # for the next launch
    mbarrier.wait(q_free.index(0), (taken & 1) ^ 1)
    _put(facts, END, -1)
    barrier()
    mbarrier.arrive(q_ready.index(0))
