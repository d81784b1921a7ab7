"""The edit change's second product: activations times ΔW_edit, added to the stream."""

import triton
import triton.language as tl

from microedit_kernels.edit_change.grouped_sets import VALUE_COLUMNS, WORK_COLUMNS
from microedit_kernels.edit_change.launch_config import MAX_BLOCK_D
from microedit_kernels.edit_change.order import is_last, step_place
from microedit_kernels.interpreting import INTERPRETED, operand, rounded

_WORK_COLUMNS = tl.constexpr(WORK_COLUMNS)
_COLUMNS = tl.constexpr(VALUE_COLUMNS)
_MAX_BLOCK_D = tl.constexpr(MAX_BLOCK_D)
# Shares that are on their way while a sum waits for the first of them.
_AT_ONCE = tl.constexpr(4)


@triton.jit
def _delta_share(  # type: ignore[no-untyped-def]
    act_rows,
    value_columns,
    within,
    count,
    turn,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LATENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h·ΔW_edit over `count` latents, [ROWS, BLOCK_D]; the pointers are at the first of them.

    It begins `turn` of 2¹⁶ of the way along, see `step_place`.
    """
    depth = tl.arange(0, LATENTS)
    delta = tl.zeros((ROWS, BLOCK_D), tl.float32)
    steps = tl.cdiv(count, LATENTS)
    for step in range(0, steps):
        at = step_place(step, turn, steps) * LATENTS
        mask = (at + depth < count)[:, None]
        if D % BLOCK_D != 0:
            mask = mask & within
        value_block = tl.load(value_columns + (at + depth)[:, None] * _COLUMNS, mask, other=0.0)
        act_block = tl.load(act_rows + at + depth[None, :])
        value_block = value_block.to(act_block.dtype)
        delta = tl.dot(operand(act_block), operand(value_block), delta, input_precision=PRECISION)
    return delta


@triton.jit
def add_delta(  # type: ignore[no-untyped-def]
    hidden_states,
    rows,
    offsets,
    values,
    parts,
    acts,
    shares,
    arrived,
    first_row,
    end_row,
    hidden_stride,
    values_stride,
    acts_width,
    shares_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LATENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    work = parts + tl.program_id(1) * _WORK_COLUMNS
    key = tl.load(work)
    first = tl.load(work + 1)
    count = tl.load(work + 2) - first
    place = tl.multiple_of(tl.load(work + 3), LATENTS)
    part = tl.load(work + 4)
    num_parts = tl.load(work + 5)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    within = columns < D
    value_columns = values + (columns // _COLUMNS).to(tl.int64) * values_stride
    value_columns += first.to(tl.int64) * _COLUMNS + columns % _COLUMNS
    block = first_row + tl.program_id(2) * ROWS
    r = block + tl.arange(0, ROWS)
    row = tl.load(rows + r, mask=r < end_row, other=0)
    start = tl.load(offsets + key)
    stop = tl.minimum(tl.load(offsets + key + 1), end_row)
    is_row = (r >= start) & (r < stop)
    mask = is_row[:, None] & within
    stream = hidden_states + tl.where(is_row, row, 0).to(tl.int64)[:, None] * hidden_stride
    stream += columns
    before = tl.load(stream, mask=mask, other=0.0)
    if OVERLAP and not INTERPRETED:
        tl.extra.cuda.gdc_wait()  # for the activations; all else was there before them
    if (block < stop) & (block + ROWS > start):
        # So many programs read side by side: whole pages of the memory.
        ABREAST: tl.constexpr = _MAX_BLOCK_D // BLOCK_D
        delta = _delta_share(
            acts + (r - first_row)[:, None] * acts_width + place, value_columns, within, count,
            (tl.program_id(0) // ABREAST * ABREAST << 16) // tl.num_programs(0),
            D, ROWS, BLOCK_D, LATENTS, PRECISION,
        )  # fmt: skip
        if OVERLAP and not INTERPRETED:
            tl.extra.cuda.gdc_launch_dependents()
        total = before.to(tl.float32)
        if WHOLE:
            total += delta
            tl.store(stream, rounded(total, hidden_states.dtype.element_ty), mask=mask)
        else:
            at = (r - first_row)[:, None] * D + columns
            tl.store(shares + part * shares_stride + at, delta, mask=mask)
            of_set = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1) - part
            if is_last(arrived + of_set * tl.num_programs(0) + tl.program_id(0), num_parts):
                for some in range(0, num_parts, _AT_ONCE):
                    for nth in tl.static_range(_AT_ONCE):
                        share = shares + (some + nth) * shares_stride + at
                        end = tl.where(some + nth < num_parts, stop, 0)
                        there = mask & (r < end)[:, None]
                        total += tl.load(share, mask=there, other=0.0, cache_modifier=".cg")
                tl.store(stream, rounded(total, hidden_states.dtype.element_ty), mask=mask)
