"""The edit change's first product: activations of the sets' own latents."""

import triton
import triton.language as tl

from microedit_kernels.edit_change.grouped_sets import VALUE_COLUMNS, WORK_COLUMNS
from microedit_kernels.edit_change.order import is_last, step_place
from microedit_kernels.interpreting import INTERPRETED, operand, rounded

_WORK_COLUMNS = tl.constexpr(WORK_COLUMNS)
_COLUMNS = tl.constexpr(VALUE_COLUMNS)


@triton.jit
def _pre_share(  # type: ignore[no-untyped-def]
    z_rows,
    W_rows,
    is_latent,
    d_first,
    d_end,
    turn,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """z·W_encᵀ over [d_first, d_end), [ROWS, TILE]; `z_rows` and `W_rows` point at column 0.

    It begins `turn` of 2¹⁶ of the way along, see `step_place`.
    """
    depth = tl.arange(0, BLOCK_D)[None, :]
    pre = tl.zeros((ROWS, TILE), tl.float32)
    steps = tl.cdiv(d_end - d_first, BLOCK_D)
    for step in range(0, steps):
        at = d_first + step_place(step, turn, steps) * BLOCK_D
        # The weights first: their addresses are known before those of the rows.
        if D % BLOCK_D == 0:
            W_block = tl.load(W_rows + at + depth, mask=is_latent, other=0.0)
            z_block = tl.load(z_rows + at + depth)
        else:
            within = at + depth < D
            W_block = tl.load(W_rows + at + depth, mask=is_latent & within, other=0.0)
            z_block = tl.load(z_rows + at + depth, mask=within, other=0.0)
        if WIDE:
            z_block = z_block.to(tl.float32)
            W_block = W_block.to(tl.float32)
        W_block = operand(tl.trans(W_block))
        pre = tl.dot(operand(z_block), W_block, pre, input_precision="ieee")
    return pre


@triton.jit
def _ask_ahead(  # type: ignore[no-untyped-def]
    values, values_stride, start, size, part, parts, D: tl.constexpr, LATENTS: tl.constexpr
):
    """Have the L2 cache read so many latents' worth of ΔW_edit, 32 columns wide.

    The set, of `size` latents from `start`, has `parts` programs; what they ask for lies evenly in
    its ΔW_edit. Between the two products nothing else reads the memory.
    """
    spot = part * ((D + _COLUMNS - 1) // _COLUMNS)
    skip = spot % parts * size // parts
    stretch = values + (spot // parts).to(tl.int64) * values_stride
    stretch += (start + skip).to(tl.int64) * _COLUMNS
    width = _COLUMNS * values.dtype.element_ty.primitive_bitwidth // 8
    tl.inline_asm_elementwise(
        """{
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [stretch.to(tl.int64), tl.minimum(size - skip, LATENTS) * width],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def compute_acts(  # type: ignore[no-untyped-def]
    z,
    rows,
    offsets,
    W_enc,
    bias,
    theta,
    values,
    tiles,
    shares,
    arrived,
    acts,
    first_row,
    end_row,
    z_stride,
    values_stride,
    acts_width,
    shares_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    work = tiles + tl.program_id(0) * _WORK_COLUMNS
    key = tl.load(work)
    first = tl.load(work + 1)
    count = tl.load(work + 2) - first
    place = tl.multiple_of(tl.load(work + 3), MULTIPLE)
    part = tl.load(work + 4)
    num_parts = tl.load(work + 5)
    latents = first + tl.arange(0, TILE)
    is_latent = tl.arange(0, TILE) < count
    W_rows = W_enc + latents.to(tl.int64)[:, None] * D
    if OVERLAP and not INTERPRETED:
        tl.extra.cuda.gdc_wait()  # for z and the row plan
        tl.extra.cuda.gdc_launch_dependents()
    # Every set's blocks are cut at the same rows, so that `rows` need not wait for `offsets`.
    block = first_row + tl.program_id(2) * ROWS
    r = block + tl.arange(0, ROWS)
    row = tl.load(rows + r, mask=r < end_row, other=0)
    start = tl.load(offsets + key)
    stop = tl.minimum(tl.load(offsets + key + 1), end_row)
    if (block < stop) & (block + ROWS > start):
        is_row = (r >= start) & (r < stop)
        z_rows = z + tl.where(is_row, row, 0).to(tl.int64)[:, None] * z_stride
        bias_block = tl.load(bias + latents, mask=is_latent, other=0.0)[None, :]
        threshold = tl.maximum(tl.load(theta + key), 0.0)
        D_SPLIT: tl.constexpr = (D + SPLITS * BLOCK_D - 1) // (SPLITS * BLOCK_D) * BLOCK_D
        d_first = tl.program_id(1) * D_SPLIT
        pre = _pre_share(
            z_rows, W_rows, is_latent[:, None], d_first, tl.minimum(d_first + D_SPLIT, D),
            (tl.program_id(0) << 16) // tl.num_programs(0),
            D, ROWS, TILE, BLOCK_D, WIDE,
        )  # fmt: skip
        if AHEAD > 0 and not INTERPRETED:
            size = count * num_parts  # no more than the set has
            _ask_ahead(values, values_stride, first - place, size, part, num_parts, D, AHEAD)
        # By multiples, of which only a set's last may be incomplete, so that stores are wide.
        multiples = tl.cdiv(count, MULTIPLE)
        mask = is_row[:, None] & (tl.arange(0, TILE) // MULTIPLE < multiples)[None, :]
        row_acts = acts + (r - first_row)[:, None] * acts_width
        places = place + tl.arange(0, TILE)[None, :]
        if part == num_parts - 1:
            # The second kernel reads whole steps: zeros follow a set's last latent.
            beyond = place + multiples * MULTIPLE + tl.arange(0, STEP)[None, :]
            zeros = tl.zeros((ROWS, STEP), acts.dtype.element_ty)
            tl.store(row_acts + beyond, zeros, mask=is_row[:, None] & (beyond < acts_width))
        if SPLITS > 1:
            at = (r - first_row)[:, None] * acts_width + places
            tl.store(shares + tl.program_id(1) * shares_stride + at, pre, mask=mask)
            counter = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
            if is_last(arrived + counter, SPLITS):
                total = tl.zeros((ROWS, TILE), tl.float32)
                for split in tl.static_range(SPLITS):
                    share = shares + split * shares_stride + at
                    total += tl.load(share, mask=mask, other=0.0, cache_modifier=".cg")
                _store_acts(row_acts + places, total + bias_block, threshold, mask)
        else:
            _store_acts(row_acts + places, pre + bias_block, threshold, mask)


@triton.jit
def _store_acts(acts, pre, threshold, mask):  # type: ignore[no-untyped-def]
    h = tl.where(pre > threshold, pre, 0.0)
    tl.store(acts, rounded(h, acts.dtype.element_ty), mask=mask)
