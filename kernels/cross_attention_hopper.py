"""Cross-attention for Hopper (sm_90a), in Gluon: to text, to concepts, or to both, each with its own softmax.

Letters: B batch, S video tokens, T text tokens, C concept tokens, A heads, E head width.

A program for each multiprocessor stays for the whole call. It takes the same share of every batch row, a run
of (head, tile of 128 queries), in three partitions of warps:

* one warp brings queries, keys and values to shared memory by TMA;
* two warpgroups take 64 queries of each tile: while one is at its softmax, the other's products keep the
  tensor cores busy. Inside a warpgroup a block's first product runs beside the softmax of the one before.

Keys and values come in blocks of 64 through a ring of stages. Where all of a head's blocks fit into the ring
(`RESIDENT`) they stay until the head changes, as those of a prompt whose padding is one key do. Otherwise
they come again for every tile, out of the second-level cache. One piece of code does both: a stage is
released after its head's last tile, or after every tile.

A tile's output is written over its queries in shared memory, and leaves by TMA while the next tile, whose
queries lie in the other slot, begins. Rows and keys behind the end are read as zeros and never written.

Each mbarrier has one kind of waiter. With n the number of times a slot or stage has been filled, who fills
it waits for phase 1 - n % 2 of "empty" (a new mbarrier has passed phase 1), who reads it for phase n % 2 of
"full". Both count what they meet in the same order, so nothing is waited for that comes later.

Online softmax: Milakov and Gimelshein, arXiv 1805.02867; the overlap: FlashAttention-3, arXiv 2407.08608.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .common import launch, power_of_two

# Triton 3.9 has given TMA's copies these names.
async_load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
async_store = getattr(tma, "async_store", tma.async_copy_shared_to_global)

ROWS = gl.constexpr(64)
"""Queries of a warpgroup's tile, and keys of a block."""

SLOTS = gl.constexpr(2)
"""Tiles of queries that a warpgroup has in shared memory."""

ABSENT, ALL, ENDS, BIASED = (gl.constexpr(kind) for kind in range(4))
"""What a set's keys are: none, whole blocks, cut off at the end, with a bias; a mask is one of 0 and -inf."""

LOG2_E = gl.constexpr(math.log2(math.e))

NUMBERS = ["B", "S", "A", "first_count", "second_count"]
"""The kernel's whole numbers: it is compiled once for all of them."""


@gluon.jit
def _run(S, A):
    """Tiles of a head, and this program's run of (head, tile), the same in every batch row."""
    tiles = (S + 2 * ROWS - 1) // (2 * ROWS)
    programs, program = gl.num_programs(0), gl.program_id(0)
    return tiles, A * tiles * program // programs, A * tiles * (program + 1) // programs


@gluon.jit
def _blocks(table, count, layout: gl.constexpr, KIND: gl.constexpr):
    """Blocks of a set, up to its last key whose bias is finite. table: of this batch row."""
    last = count
    if KIND == ABSENT:
        last = 0
    if KIND == BIASED:
        last = 0
        for first in range(0, count, ROWS):
            keys = first + gl.arange(0, ROWS, layout=layout)
            kept = gl.load(table + keys, mask=keys < count, other=-float("inf")) > -float("inf")
            last = gl.maximum(last, gl.max(gl.where(kept, keys + 1, 0), 0))
    return (last + ROWS - 1) // ROWS


# The warp that copies.


@gluon.jit
def _put(desc, full, smem, batch, row, column, E: gl.constexpr):
    """Copies rows row … row + 63 of a head to shared memory; `full` tells when they are there."""
    mbarrier.expect(full, ROWS * E * 2)
    async_load(desc, [batch, row, column], full, smem)


@gluon.jit
def _put_blocks(k, v, ring, place, blocks, batch, column, E: gl.constexpr, STAGES: gl.constexpr):
    """Puts a set's blocks into the ring, from `place` on; gives the place behind them."""
    keys, values, k_full, v_full, empty = ring
    for block in range(blocks):
        stage = place % STAGES
        mbarrier.wait(empty.index(stage), place // STAGES & 1 ^ 1)
        _put(k, k_full.index(stage), keys.index(stage), batch, block * ROWS, column, E)
        _put(v, v_full.index(stage), values.index(stage), batch, block * ROWS, column, E)
        place += 1
    return place


@gluon.jit
def _produce(
    q, sources, queries, ring, tables, sizes,
    E: gl.constexpr, STAGES: gl.constexpr, RESIDENT: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr,
):  # fmt: skip
    """Every tile's queries, and the blocks that it is the first to need."""
    first_k, first_v, second_k, second_v = sources
    slots, q_full, q_empty = queries
    first_table, second_table, _ = tables
    B, S, A, first_count, second_count = sizes
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    tiles, begin, end = _run(S, A)
    turn = 0
    place = 0
    for batch in range(B):
        first_blocks = _blocks(first_table + batch * first_count, first_count, layout, FIRST)
        second_blocks = _blocks(second_table + batch * second_count, second_count, layout, SECOND)
        for item in range(begin, end):
            tile, column = item % tiles, item // tiles * E
            for group in gl.static_range(2):
                slot = SLOTS * group + turn % SLOTS
                mbarrier.wait(q_empty.index(slot), turn // SLOTS & 1 ^ 1)
                _put(q, q_full.index(slot), slots.index(slot), batch, (2 * tile + group) * ROWS, column, E)
            if not RESIDENT or (item == begin) | (tile == 0):
                place = _put_blocks(first_k, first_v, ring, place, first_blocks, batch, column, E, STAGES)
                place = _put_blocks(second_k, second_v, ring, place, second_blocks, batch, column, E, STAGES)
            turn += 1


# The warpgroups that compute.


@gluon.jit
def _logits(q, ring, place, E: gl.constexpr, STAGES: gl.constexpr):
    """Begins the product of the queries with the keys at `place`."""
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    keys, _, k_full, _, _ = ring
    stage = place % STAGES
    mbarrier.wait(k_full.index(stage), place // STAGES & 1)
    block = keys.index(stage).reshape([ROWS, E]).permute((1, 0))
    nothing = gl.zeros([ROWS, ROWS], gl.float32, by_key)
    return warpgroup_mma(q, block, nothing, use_acc=False, is_async=True)


@gluon.jit
def _weighed(weights, ring, place, acc, E: gl.constexpr, STAGES: gl.constexpr):
    """Begins adding the values at `place`, weighed."""
    by_column: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    _, values, _, v_full, _ = ring
    stage = place % STAGES
    mbarrier.wait(v_full.index(stage), place // STAGES & 1)
    weights = gl.convert_layout(weights.to(values.dtype), gl.DotOperandLayout(0, by_column, 2))
    return warpgroup_mma(weights, values.index(stage).reshape([ROWS, E]), acc, is_async=True)


@gluon.jit
def _offsets(table, first, count, layout: gl.constexpr, KIND: gl.constexpr):
    """What is added to a block's logits to base 2: minus infinity for a key that is not there or masked."""
    if KIND == BIASED:
        keys = first + gl.arange(0, ROWS, layout=gl.BlockedLayout([1], [32], [4], [0]))
        offsets = gl.load(table + keys, mask=keys < count, other=-float("inf")) * LOG2_E
        return gl.convert_layout(offsets, layout)
    keys = first + gl.arange(0, ROWS, layout=layout)
    return gl.where(keys < count, 0.0, -float("inf"))


@gluon.jit
def _softmax(logits, row_scale, top, total, offsets, KIND: gl.constexpr):
    """One more block: its weights, the new maxima and sums, and what shrinks all that was before."""
    if KIND == ALL:
        higher = gl.maximum(top, gl.max(logits, 1) * row_scale)
        finite = higher
        weights = gl.exp2(logits * row_scale[:, None] - finite[:, None])
    else:
        logits = logits * row_scale[:, None] + offsets[None, :]
        higher = gl.maximum(top, gl.max(logits, 1))
        finite = gl.where(higher == -float("inf"), 0.0, higher)  # no key so far
        weights = gl.exp2(logits - finite[:, None])
    shrink = gl.exp2(top - finite)
    return weights, higher, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _attend(
    q, ring, place, blocks, table, count, row_scale, release,
    KIND: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention to a set of keys, float32 [64,E]; zero where none is left."""
    empty = ring[4]
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    by_column: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    key: gl.constexpr = gl.SliceLayout(0, by_key)
    row: gl.constexpr = gl.SliceLayout(1, by_key)
    out_row: gl.constexpr = gl.SliceLayout(1, by_column)
    acc = gl.zeros([ROWS, E], gl.float32, by_column)
    top = gl.full([ROWS], -float("inf"), gl.float32, row)
    total = gl.zeros([ROWS], gl.float32, row)
    if blocks > 0:
        logits = _logits(q, ring, place, E, STAGES)
        offsets = _offsets(table, 0, count, key, KIND)
        logits = warpgroup_mma_wait(0, deps=[logits])
        weights, top, total, _ = _softmax(logits, row_scale, top, total, offsets, KIND)
        for block in range(1, blocks):
            logits = _logits(q, ring, place + 1, E, STAGES)
            acc = _weighed(weights, ring, place, acc, E, STAGES)
            offsets = _offsets(table, block * ROWS, count, key, KIND)
            logits = warpgroup_mma_wait(1, deps=[logits])
            weights, top, total, shrink = _softmax(logits, row_scale, top, total, offsets, KIND)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(place % STAGES), count=1, pred=release)
            acc = acc * gl.convert_layout(shrink, out_row)[:, None]
            place += 1
        acc = _weighed(weights, ring, place, acc, E, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(place % STAGES), count=1, pred=release)
    gain = 1.0 / gl.where(total > 0.0, total, 1.0)
    return acc * gl.convert_layout(gain, out_row)[:, None]


@gluon.jit
def _add_block(
    acc, q, ring, place, blocks, table, count, row_scale, release,
    KIND: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """acc + attention to a set of one block: normalised before it is added, it needs no accumulator."""
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    row: gl.constexpr = gl.SliceLayout(1, by_key)
    if blocks > 0:
        logits = _logits(q, ring, place, E, STAGES)
        offsets = _offsets(table, 0, count, gl.SliceLayout(0, by_key), KIND)
        logits = warpgroup_mma_wait(0, deps=[logits])
        top, total = gl.full([ROWS], -float("inf"), gl.float32, row), gl.zeros([ROWS], gl.float32, row)
        weights, top, total, _ = _softmax(logits, row_scale, top, total, offsets, KIND)
        acc = _weighed(weights * (1.0 / total)[:, None], ring, place, acc, E, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(ring[4].index(place % STAGES), count=1, pred=release)
    return acc


@gluon.jit
def _consume(
    out, logit_scale, GROUP: gl.constexpr, queries, ring, tables, sizes,
    E: gl.constexpr, STAGES: gl.constexpr, RESIDENT: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr,
    HAS_RMS: gl.constexpr,
):  # fmt: skip
    """Warpgroup 0 or 1: 64 queries of every tile."""
    slots, q_full, q_empty = queries
    first_table, second_table, inverse_rms = tables
    B, S, A, first_count, second_count = sizes
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    key: gl.constexpr = gl.SliceLayout(0, by_key)
    row: gl.constexpr = gl.SliceLayout(1, by_key)
    tiles, begin, end = _run(S, A)
    turn = 0
    place = 0
    for batch in range(B):
        first_keys, second_keys = first_table + batch * first_count, second_table + batch * second_count
        first_blocks = _blocks(first_keys, first_count, key, FIRST)
        second_blocks = _blocks(second_keys, second_count, key, SECOND)
        for item in range(begin, end):
            tile = item % tiles
            start = (2 * tile + GROUP) * ROWS
            release = True
            if RESIDENT:
                release = (item == end - 1) | (tile == tiles - 1)
            # What the tile before wrote has left its slot: the next queries may come there.
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(SLOTS * GROUP + (turn + 1) % SLOTS), count=1, pred=turn > 0)
            row_scale = gl.full([ROWS], logit_scale, gl.float32, row)
            if HAS_RMS:
                rows = start + gl.arange(0, ROWS, layout=row)
                row_scale *= gl.load(inverse_rms + batch * S + rows, mask=rows < S, other=0.0)
            slot = SLOTS * GROUP + turn % SLOTS
            mbarrier.wait(q_full.index(slot), turn // SLOTS & 1)
            q = slots.index(slot).reshape([ROWS, E])
            acc = _attend(
                q, ring, place, first_blocks, first_keys, first_count, row_scale, release, FIRST, E, STAGES
            )
            if SECOND != ABSENT:
                acc = _add_block(
                    acc, q, ring, place + first_blocks, second_blocks, second_keys, second_count, row_scale,
                    release, SECOND, E, STAGES,
                )  # fmt: skip
            if release:
                place += first_blocks + second_blocks
            q.store(acc.to(slots.dtype))
            fence_async_shared()
            async_store(out, [batch, start, item // tiles * E], slots.index(slot))
            turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=NUMBERS)
def hopper_attention_kernel(
    q, out, first_k, first_v, second_k, second_v, first_table, second_table, inverse_rms,
    B, S, A, first_count, second_count, logit_scale,
    E: gl.constexpr, STAGES: gl.constexpr, RESIDENT: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr,
    HAS_RMS: gl.constexpr,
):  # fmt: skip
    """Tensors are descriptors of [B, tokens, A*E] in blocks [1,64,E]; tables the mask or bias of each set,
    contiguous as `inverse_rms` is."""
    slots = gl.allocate_shared_memory(q.dtype, [2 * SLOTS, 1, ROWS, E], q.layout)
    keys = gl.allocate_shared_memory(q.dtype, [STAGES, 1, ROWS, E], q.layout)
    values = gl.allocate_shared_memory(q.dtype, [STAGES, 1, ROWS, E], q.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2 * SLOTS):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both warpgroups
    queries, ring = (slots, q_full, q_empty), (keys, values, k_full, v_full, empty)
    tables = (first_table, second_table, inverse_rms)
    sizes = (B, S, A, first_count, second_count)
    sources = (first_k, first_v, second_k, second_v)
    gl.warp_specialize(
        [
            (_consume, (out, logit_scale, 0, queries, ring, tables, sizes,
                        E, STAGES, RESIDENT, FIRST, SECOND, HAS_RMS)),
            (_consume, (out, logit_scale, 1, queries, ring, tables, sizes,
                        E, STAGES, RESIDENT, FIRST, SECOND, HAS_RMS)),
            (_produce, (q, sources, queries, ring, tables, sizes, E, STAGES, RESIDENT, FIRST, SECOND)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# The launch.

WIDTHS = {64: 8, 128: 4}
"""Head width -> the most stages, a power of two: what shared memory holds beside the queries."""

MOST_BESIDE = ROWS.value
"""Concept tokens beside text: one block. More take a launch of their own."""

REGISTERS = 168
"""Of each of 384 threads; the kernel gives 240 to those that compute, and 24 to those that copy."""


def takes(q: Tensor, text: tuple[Tensor, Tensor] | None, concepts: tuple[Tensor, Tensor] | None) -> bool:
    """Whether the kernel takes these dtypes, widths, counts and strides: TMA wants the heads beside each
    other, steps of 16 bytes, and no step of zero."""
    width = q.shape[3]
    if q.dtype not in (torch.float16, torch.bfloat16) or width not in WIDTHS:
        return False
    if text is not None and concepts is not None and concepts[0].shape[1] > MOST_BESIDE:
        return False
    strides = [(x.stride(0), x.stride(1)) for x in (q, *(text or ()), *(concepts or ()))]
    return (
        all(x.stride(2) == width and x.data_ptr() % 16 == 0 for x in (q, *(text or ()), *(concepts or ())))
        and all(min(steps) > 0 and steps[0] % 8 == steps[1] % 8 == 0 for steps in strides)
    )  # fmt: skip


def _described(x: Tensor) -> TensorDescriptor:
    batch, tokens, heads, width = x.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    shape, strides = [batch, tokens, heads * width], [x.stride(0), x.stride(1), 1]
    return TensorDescriptor(x, shape, strides, [1, ROWS.value, width], layout)


def _kind(count: int, bias: Tensor | None) -> int:
    kind = BIASED if bias is not None else ENDS if count % ROWS.value else ALL
    return kind.value if count else ABSENT.value


def variant(
    q: Tensor,
    text: tuple[Tensor, Tensor] | None,
    concepts: tuple[Tensor, Tensor] | None,
    mask: Tensor | None = None,
    inverse_rms: Tensor | None = None,
    text_bias: Tensor | None = None,
) -> dict[str, int]:
    """What the kernel is compiled for, for these arguments."""
    counts = [keys[0].shape[1] if keys is not None else 0 for keys in (text, concepts)]
    kinds = [_kind(*set_) for set_ in zip(counts, (text_bias, mask), strict=True)]
    first, second = kinds if text is not None else (kinds[1], ABSENT.value)
    blocks, most = sum(-(-count // ROWS.value) for count in counts), WIDTHS[q.shape[3]]
    return {
        "E": q.shape[3], "STAGES": power_of_two(blocks, 1, most), "RESIDENT": blocks <= most,
        "FIRST": first, "SECOND": second, "HAS_RMS": inverse_rms is not None,
    }  # fmt: skip


def hopper_attention_triton(
    out: Tensor,
    q: Tensor,
    text: tuple[Tensor, Tensor] | None,
    concepts: tuple[Tensor, Tensor] | None,
    mask: Tensor | None = None,
    inverse_rms: Tensor | None = None,
    text_bias: Tensor | None = None,
    programs: int = 132,
) -> Tensor:
    """`cross_attention_triton` by this kernel, for what it `takes`; programs: the GPU's multiprocessors."""
    batch, tokens, heads, width = q.shape
    hidden = torch.where(mask, 0.0, -math.inf) if mask is not None else None  # [B,C]
    sets = [(*keys, bias) for keys, bias in ((text, text_bias), (concepts, hidden)) if keys is not None]
    (first_k, first_v, first_bias), (second_k, second_v, second_bias) = sets[0], sets[-1]
    launch(
        hopper_attention_kernel, (programs,),
        *(_described(x) for x in (q, out, first_k, first_v, second_k, second_v)),
        *(q if x is None else x.contiguous() for x in (first_bias, second_bias, inverse_rms)),
        batch, tokens, heads, first_k.shape[1], second_k.shape[1] if len(sets) == 2 else 0,
        math.log2(math.e) / math.sqrt(width), **variant(q, text, concepts, mask, inverse_rms, text_bias),
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return out
