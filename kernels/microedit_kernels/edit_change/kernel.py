"""Edit change on the device: two products of the rows that are on with their own sets' latents.

The first kernel computes the activations, the second adds their product with ΔW_edit to the
stream. Between them lie only the activations of the rows that are on, few enough for the L2
cache. A program without rows ends before it reads a weight. Where programs share a sum, the last
one to finish adds up the shares in a fixed order, so that the result does not depend on timing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from microedit_kernels.edit_change.grouped_sets import WORK_COLUMNS, GroupedSets
from microedit_kernels.edit_change.launch_config import (
    MAX_BLOCK_D,
    LaunchConfig,
    launch_config,
)
from microedit_kernels.edit_change.scratch import EditChangeScratch
from microedit_kernels.interpreting import INTERPRETED, operand, rounded

_COLUMNS = tl.constexpr(WORK_COLUMNS)
_MAX_BLOCK_D = tl.constexpr(MAX_BLOCK_D)
_INF = tl.constexpr(float("inf"))
# Shares that are on their way while a sum waits for the first of them.
_AT_ONCE = tl.constexpr(4)


@triton.jit
def _is_last(arrived, count):  # type: ignore[no-untyped-def]
    """Whether `count` programs have stored their shares by now; the counter is then 0 again."""
    tl.debug_barrier()  # the shares of all threads come before the count
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(arrived, 0)
    return last


@triton.jit
def _step(step, turn, steps):  # type: ignore[no-untyped-def]
    """The place of the step-th of a loop's steps, where the loop begins `turn` of 2¹⁶ along.

    Programs that all read the same rows in the same order wait for the same slices of the L2
    cache: each begins elsewhere.
    """
    place = step + (turn * steps >> 16)
    return tl.where(place < steps, place, place - steps)


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

    It begins `turn` of 2¹⁶ of the way along, see `_step`.
    """
    depth = tl.arange(0, BLOCK_D)[None, :]
    pre = tl.zeros((ROWS, TILE), tl.float32)
    steps = tl.cdiv(d_end - d_first, BLOCK_D)
    for step in range(0, steps):
        at = d_first + _step(step, turn, steps) * BLOCK_D
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
def _store_acts(  # type: ignore[no-untyped-def]
    acts, stride, pre, threshold, mask, PAIR: tl.constexpr
):
    """Threshold and store."""
    h = tl.where(pre > threshold, pre, 0.0)
    if PAIR:
        # hi + lo is h to 17 bits, and both are operands of the tensor cores.
        hi = rounded(h, tl.bfloat16)
        lo = tl.where(hi.to(tl.float32) < _INF, h - hi.to(tl.float32), 0.0)
        tl.store(acts, hi, mask=mask)
        tl.store(acts + stride, rounded(lo, tl.bfloat16), mask=mask)
    else:
        tl.store(acts, h, mask=mask)


@triton.jit
def _compute_acts(  # type: ignore[no-untyped-def]
    z,
    rows,
    offsets,
    W_enc,
    bias,
    theta,
    tiles,
    shares,
    arrived,
    acts,
    first_row,
    end_row,
    z_stride,
    acts_width,
    acts_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    PAIR: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP and not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()
    work = tiles + tl.program_id(0) * _COLUMNS
    key = tl.load(work)
    start = tl.maximum(tl.load(offsets + key), first_row)
    stop = tl.minimum(tl.load(offsets + key + 1), end_row)
    latents = tl.load(work + 1) + tl.arange(0, TILE)
    is_latent = latents < tl.load(work + 2)
    place = tl.multiple_of(tl.load(work + 3), 8)
    places = place + tl.arange(0, TILE)[None, :]
    is_end = tl.load(work + 4) == tl.load(work + 5) - 1
    W_rows = W_enc + latents.to(tl.int64)[:, None] * D
    D_SPLIT: tl.constexpr = (D + SPLITS * BLOCK_D - 1) // (SPLITS * BLOCK_D) * BLOCK_D
    d_first = tl.program_id(1) * D_SPLIT
    d_end = tl.minimum(d_first + D_SPLIT, D)
    block = start + tl.program_id(2) * ROWS
    if block < stop:
        r = block + tl.arange(0, ROWS)
        is_row = (r < stop)[:, None]
        row = tl.load(rows + r, mask=r < stop, other=0).to(tl.int64)
        z_rows = z + row[:, None] * z_stride
        bias_block = tl.load(bias + latents, mask=is_latent, other=0.0)[None, :]
        threshold = tl.maximum(tl.load(theta + key), 0.0)
        pre = _pre_share(
            z_rows, W_rows, is_latent[:, None], d_first, d_end,
            (tl.program_id(0) << 16) // tl.num_programs(0),
            D, ROWS, TILE, BLOCK_D, WIDE,
        )  # fmt: skip
        # By eights, of which only a set's last may be incomplete, so that stores are wide.
        eights = tl.cdiv(tl.load(work + 2) - tl.load(work + 1), 8)
        mask = is_row & (tl.arange(0, TILE) // 8 < eights)[None, :]
        row_acts = acts + (r - first_row)[:, None] * acts_width
        at = (r - first_row)[:, None] * acts_width + places
        if is_end:
            # The second kernel reads whole steps: zeros follow a set's last latent.
            beyond = place + eights * 8 + tl.arange(0, TILE)[None, :]
            zeros = tl.zeros((ROWS, TILE), acts.dtype.element_ty)
            tl.store(row_acts + beyond, zeros, mask=is_row & (beyond < acts_width))
            if PAIR:
                tl.store(
                    row_acts + acts_stride + beyond, zeros, mask=is_row & (beyond < acts_width)
                )
        if SPLITS == 1:
            pre += bias_block
            _store_acts(row_acts + places, acts_stride, pre, threshold, mask, PAIR)
        else:
            tl.store(shares + tl.program_id(1) * acts_stride + at, pre, mask=mask)
            counter = (block - start) // ROWS * tl.num_programs(0) + tl.program_id(0)
            if _is_last(arrived + counter, SPLITS):
                total = tl.zeros((ROWS, TILE), tl.float32)
                for split in tl.static_range(SPLITS):
                    share = shares + split * acts_stride + at
                    total += tl.load(share, mask=mask, other=0.0, cache_modifier=".cg")
                total += bias_block
                _store_acts(row_acts + places, acts_stride, total, threshold, mask, PAIR)


@triton.jit
def _delta_share(  # type: ignore[no-untyped-def]
    act_rows,
    acts_stride,
    value_columns,
    within,
    count,
    turn,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LATENTS: tl.constexpr,
    PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h·ΔW_edit over `count` latents, [ROWS, BLOCK_D]; the pointers are at the first of them.

    It begins `turn` of 2¹⁶ of the way along, see `_step`.
    """
    depth = tl.arange(0, LATENTS)
    delta = tl.zeros((ROWS, BLOCK_D), tl.float32)
    steps = tl.cdiv(count, LATENTS)
    for step in range(0, steps):
        at = _step(step, turn, steps) * LATENTS
        mask = (at + depth < count)[:, None]
        if D % BLOCK_D != 0:
            mask = mask & within
        value_block = tl.load(value_columns + (at + depth)[:, None] * D, mask=mask, other=0.0)
        act_block = tl.load(act_rows + at + depth[None, :])
        if PAIR:
            lo_block = tl.load(act_rows + acts_stride + at + depth[None, :])
            delta = tl.dot(
                operand(lo_block), operand(value_block), delta, input_precision=PRECISION
            )
        else:
            value_block = value_block.to(tl.float32)
        delta = tl.dot(operand(act_block), operand(value_block), delta, input_precision=PRECISION)
    return delta


@triton.jit
def _add_delta(  # type: ignore[no-untyped-def]
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
    acts_width,
    acts_stride,
    shares_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LATENTS: tl.constexpr,
    PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    work = parts + tl.program_id(1) * _COLUMNS
    key = tl.load(work)
    start = tl.maximum(tl.load(offsets + key), first_row)
    stop = tl.minimum(tl.load(offsets + key + 1), end_row)
    first = tl.load(work + 1)
    count = tl.load(work + 2) - first
    place = tl.multiple_of(tl.load(work + 3), LATENTS)
    part = tl.load(work + 4)
    num_parts = tl.load(work + 5)
    columns = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    within = columns < D
    value_columns = values + first.to(tl.int64) * D + columns
    if OVERLAP and not INTERPRETED:
        tl.extra.cuda.gdc_wait()  # for the activations
    block = start + tl.program_id(2) * ROWS
    if block < stop:
        r = block + tl.arange(0, ROWS)
        local = (r - first_row)[:, None]
        row = tl.load(rows + r, mask=r < stop, other=0).to(tl.int64)
        stream = hidden_states + row[:, None] * hidden_stride + columns
        # So many programs read side by side: whole pages of the memory.
        ABREAST: tl.constexpr = _MAX_BLOCK_D // BLOCK_D
        delta = _delta_share(
            acts + local * acts_width + place, acts_stride, value_columns, within, count,
            (tl.program_id(0) // ABREAST * ABREAST << 16) // tl.num_programs(0),
            D, ROWS, BLOCK_D, LATENTS, PAIR, PRECISION,
        )  # fmt: skip
        mask = (r < stop)[:, None] & within
        before = tl.load(stream, mask=mask, other=0.0).to(tl.float32)
        if WHOLE:
            tl.store(stream, rounded(before + delta, hidden_states.dtype.element_ty), mask=mask)
        else:
            at = local * D + columns
            tl.store(shares + part * shares_stride + at, delta, mask=mask)
            counter = (block - first_row) * tl.num_programs(0) + tl.program_id(0)
            if _is_last(arrived + counter, num_parts):
                for some in range(0, num_parts, _AT_ONCE):
                    for nth in tl.static_range(_AT_ONCE):
                        share = shares + (some + nth) * shares_stride + at
                        end = tl.where(some + nth < num_parts, stop, 0)
                        of_set = (r < end)[:, None] & within
                        before += tl.load(share, mask=of_set, other=0.0, cache_modifier=".cg")
                tl.store(stream, rounded(before, hidden_states.dtype.element_ty), mask=mask)


def add_edit_change(
    hidden_states: Tensor,
    z: Tensor,
    rows: Tensor,
    offsets: Tensor,
    sets: GroupedSets,
    scratch: EditChangeScratch,
    config: LaunchConfig | None = None,
    most: int | None = None,
) -> None:
    """Add δ of `reference.grouped_edit_change` to the rows that are on, and touch no other.

    A pair of launches does `scratch.rows` active rows; there are as many pairs as the most active
    rows would need, and those beyond the last active row end at once.

    Args:
        hidden_states: [M, d] of any float dtype; changed in place.
        z: the residual stream, [M, d], which may be `hidden_states` itself.
        rows: active rows, grouped by set, [≥ active] int32 (`row_plan.group_rows`).
        offsets: [S + 1] int32; set s has rows[offsets[s] : offsets[s + 1]].
        scratch: made for `sets`; what it holds before does not matter.
        config: by shape when None.
        most: how many rows can be active, where the host knows less than M.

    Raises:
        ValueError: `sets` were made for another d, or don't fit `scratch` or `config`.
    """
    M, d = hidden_states.shape
    if d != sets.d or z.shape != hidden_states.shape:
        raise ValueError(f"hidden_states and z are not both [M, {sets.d}]")
    if hidden_states.stride(1) != 1 or z.stride(1) != 1:
        raise ValueError("hidden_states or z is not contiguous along d")
    most = M if most is None else most
    if config is None:
        size = max(t.element_size() for t in (z, sets.W_enc, sets.values))
        config = launch_config(most, sets.max_latents, d, size)
    if sets.tile % config.delta_latents:
        raise ValueError(f"steps of {config.delta_latents} latents don't divide {sets.tile}")
    scratch.check_fits(sets)
    if not sets.max_latents:
        return
    for first_row in range(0, most, scratch.rows):
        end_row = min(first_row + scratch.rows, most)
        _launch_acts(z, rows, offsets, sets, scratch, config, first_row, end_row)
        _launch_delta(hidden_states, rows, offsets, sets, scratch, config, first_row, end_row)


def _launch_acts(
    z: Tensor,
    rows: Tensor,
    offsets: Tensor,
    sets: GroupedSets,
    scratch: EditChangeScratch,
    config: LaunchConfig,
    first_row: int,
    end_row: int,
) -> None:
    if config.even:
        tiles, splits = sets.even_tiles, sets.even_splits
    else:
        tiles, splits = sets.tiles, config.acts_splits
    grid = (len(tiles), splits, -(-(end_row - first_row) // config.rows))
    _compute_acts[grid](
        z,
        rows,
        offsets,
        sets.W_enc,
        sets.bias,
        sets.theta,
        tiles,
        scratch.pre_shares,
        scratch.pre_arrived,
        scratch.acts,
        first_row,
        end_row,
        z.stride(0),
        scratch.acts.stride(1),
        scratch.acts.stride(0),
        D=sets.d,
        ROWS=config.rows,
        TILE=sets.tile,
        BLOCK_D=config.acts_d,
        SPLITS=splits,
        WIDE=z.dtype != sets.W_enc.dtype or z.dtype == torch.float32,
        PAIR=sets.values.dtype == torch.bfloat16,
        OVERLAP=config.overlap,
        num_warps=config.acts_warps,
        num_stages=config.acts_stages,
        enable_fp_fusion=True,
    )


def _launch_delta(
    hidden_states: Tensor,
    rows: Tensor,
    offsets: Tensor,
    sets: GroupedSets,
    scratch: EditChangeScratch,
    config: LaunchConfig,
    first_row: int,
    end_row: int,
) -> None:
    # fp16 values meet fp32 activations, which may pass fp16's range; tf32 holds the values exactly.
    blocks = -(-(end_row - first_row) // config.rows)
    _add_delta[(-(-sets.d // config.delta_d), len(sets.parts), blocks)](
        hidden_states,
        rows,
        offsets,
        sets.values,
        sets.parts,
        scratch.acts,
        scratch.delta_shares,
        scratch.delta_arrived,
        first_row,
        end_row,
        hidden_states.stride(0),
        scratch.acts.stride(1),
        scratch.acts.stride(0),
        scratch.delta_shares.stride(0),
        D=sets.d,
        ROWS=config.rows,
        BLOCK_D=config.delta_d,
        LATENTS=config.delta_latents,
        PAIR=sets.values.dtype == torch.bfloat16,
        PRECISION="tf32x3" if sets.values.dtype == torch.float16 else "ieee",
        OVERLAP=config.overlap,
        WHOLE=sets.max_parts == 1,
        num_warps=config.delta_warps,
        num_stages=config.delta_stages,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if config.overlap else {}),  # an option of NVIDIA's backend alone
    )
