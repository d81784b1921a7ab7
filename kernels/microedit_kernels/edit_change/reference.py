"""Edit change by a fixed activation threshold, in plain torch.

Only the pre-activations of the edit set's own rows C are needed: two small products,
[M, d]·[d, |C|] and [M, |C|]·[|C|, d], instead of a read of the whole encoder.
"""

import torch
from torch import Tensor

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
