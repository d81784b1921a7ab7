"""Edit change by a fixed activation threshold, in plain torch.

Only the pre-activations of the edit set's own rows C are needed: two small products,
[M, d]·[d, |C|] and [M, |C|]·[|C|, d], instead of a read of the whole encoder.
"""

import torch
from torch import Tensor

from microedit_kernels.edit_change.grouped_sets import GroupedSets
from microedit_kernels.topk_encode import pre_acts


def threshold_acts(pre: Tensor, theta: float) -> Tensor:
    """h_i = pre_i where pre_i > max(θ, 0), else 0 (a BatchTopK SAE at inference)."""
    return torch.where(pre > max(theta, 0.0), pre, torch.zeros_like(pre))


def edit_change(
    z: Tensor,
    W_enc_rows: Tensor,
    b_enc_rows: Tensor,
    b_dec: Tensor | None,
    values: Tensor,
    theta: float,
) -> Tensor:
    """δ = Σ_{i∈C, pre_i > θ} pre_i·ΔW_edit[i].

    Args:
        z: [..., d].
        W_enc_rows, b_enc_rows: encoder rows of C, [c, d] and [c].
        b_dec: as in `pre_acts`.
        values: ΔW_edit, [c, d].

    Returns:
        [..., d], fp32.
    """
    acts = threshold_acts(pre_acts(z, W_enc_rows, b_enc_rows, b_dec), theta)
    return acts @ values.float()


def grouped_edit_change(z: Tensor, rows: Tensor, offsets: Tensor, sets: GroupedSets) -> Tensor:
    """`edit_change` of the rows that are on, each with its own edit set.

    Args:
        z: [M, d].
        rows: active rows, grouped by set, [≥ active] int32 (`row_plan.group_rows`).
        offsets: [S + 1] int32; set s has rows[offsets[s] : offsets[s + 1]].

    Returns:
        [active, d] fp32, in the order of `rows`.
    """
    ends = offsets.tolist()
    delta = torch.zeros(ends[-1], z.shape[1], device=z.device)
    first = 0
    for key, size in enumerate(sets.sizes):
        latents, mine = slice(first, first + size), slice(ends[key], ends[key + 1])
        pre = pre_acts(z[rows[mine].long()], sets.W_enc[latents], sets.bias[latents])
        delta[mine] = threshold_acts(pre, float(sets.theta[key])) @ sets.changes(latents).float()
        first += size
    return delta
