"""Edit change on the device: two products of the rows that are on with their own sets' latents.

The first kernel computes the activations, the second adds their product with ΔW_edit to the
stream. Between them lie only the activations of the rows that are on, few enough for the L2
cache; where ΔW_edit is bf16 they are rounded to bf16 as well, the operands of one product. A
program without rows ends before it reads a weight. Where programs share a sum, the last one to
finish adds up the shares in a fixed order, so that the result does not depend on timing.

On NVIDIA's Hopper and later the first kernel is set up while the one before it in the stream runs,
and the second while the first one runs. Both wait (`gdc_wait`) for the kernel before them, even
where they have no rows: what comes after the second one may read what came before the first.
"""

import torch
import triton
from torch import Tensor

from microedit_kernels.edit_change.acts_kernel import compute_acts
from microedit_kernels.edit_change.delta_kernel import add_delta
from microedit_kernels.edit_change.grouped_sets import GroupedSets
from microedit_kernels.edit_change.launch_config import LaunchConfig, launch_config
from microedit_kernels.edit_change.scratch import EditChangeScratch


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
        rows: active rows, grouped by set, [≥ most] int32 (`row_plan.group_rows`); what follows
            them is read but not used.
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
        size = max(t.element_size() for t in (z, sets.W_enc, sets.values, scratch.acts))
        config = launch_config(most, sets.max_latents, d, size)
    if sets.step % config.delta_latents:
        raise ValueError(f"steps of {config.delta_latents} latents don't divide {sets.step}")
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
        tiles, tile, multiple, splits = sets.even_tiles, sets.even_tile, 2, sets.even_splits
    else:
        tiles, tile, multiple, splits = sets.tiles, sets.tile, 8, config.acts_splits
    grid = (len(tiles), splits, -(-(end_row - first_row) // config.rows))
    compute_acts[grid](
        z,
        rows,
        offsets,
        sets.W_enc,
        sets.bias,
        sets.theta,
        sets.values,
        tiles,
        scratch.pre_shares,
        scratch.pre_arrived,
        scratch.acts,
        first_row,
        end_row,
        z.stride(0),
        sets.values.stride(0),
        scratch.acts.stride(0),
        scratch.pre_shares.stride(0),
        D=sets.d,
        ROWS=config.rows,
        TILE=triton.next_power_of_2(tile),
        MULTIPLE=multiple,
        BLOCK_D=config.acts_d,
        SPLITS=splits,
        STEP=sets.step,
        WIDE=z.dtype != sets.W_enc.dtype or z.dtype == torch.float32,
        AHEAD=config.ahead,
        OVERLAP=config.overlap,
        num_warps=config.acts_warps,
        num_stages=config.acts_stages,
        enable_fp_fusion=True,
        **_overlapped(config),
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
    if config.even:
        parts, shares = sets.even_parts, sets.even_shares
    else:
        parts, shares = sets.parts, sets.shares
    blocks = -(-(end_row - first_row) // config.rows)
    add_delta[(-(-sets.d // config.delta_d), len(parts), blocks)](
        hidden_states,
        rows,
        offsets,
        sets.values,
        parts,
        scratch.acts,
        scratch.delta_shares,
        scratch.delta_arrived,
        first_row,
        end_row,
        hidden_states.stride(0),
        sets.values.stride(0),
        scratch.acts.stride(0),
        scratch.delta_shares.stride(0),
        D=sets.d,
        ROWS=config.rows,
        BLOCK_D=config.delta_d,
        LATENTS=config.delta_latents,
        PRECISION=_precision(sets.values.dtype),
        OVERLAP=config.overlap,
        WHOLE=shares == 1,
        num_warps=config.delta_warps,
        num_stages=config.delta_stages,
        enable_fp_fusion=True,
        **_overlapped(config),
    )


def _precision(values: torch.dtype) -> str:
    """fp16 meets fp32 activations, which may pass its range; tf32, which is NVIDIA's, holds it."""
    return "tf32x3" if values == torch.float16 and not torch.version.hip else "ieee"


def _overlapped(config: LaunchConfig) -> dict[str, bool]:
    """Options of NVIDIA's backend alone."""
    return {"launch_pdl": True} if config.overlap else {}
