"""Sparse decode in plain torch: ẑ = ẑ₀ + δ and the two squared distances to z per token."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def decode(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """ẑ = Σ_{i∈I_k} h_i·W_dec[i] + b_dec (Eq. 8).

    Args:
        top_acts: [..., k]; top_indices: [..., k] int64.
        W_dec: [n, d]; b_dec: [d].

    Returns:
        [..., d], fp32.
    """
    k = top_indices.shape[-1]
    rows = embedding_bag(
        top_indices.reshape(-1, k),
        W_dec.float(),
        per_sample_weights=top_acts.float().reshape(-1, k),
        mode="sum",
    )
    return rows.view(*top_indices.shape[:-1], W_dec.shape[-1]) + b_dec.float()


def row_map(changed_indices: Tensor, num_latents: int) -> Tensor:
    """Where each decoder row stands among the changed ones.

    Args:
        changed_indices: [c] int64, unique, in [0, num_latents).

    Returns:
        [n] int64: the position in `changed_indices`, −1 for a row that is not changed.
    """
    positions = torch.full((num_latents,), -1, dtype=torch.long, device=changed_indices.device)
    positions[changed_indices] = torch.arange(len(changed_indices), device=changed_indices.device)
    return positions


def decode_change(top_acts: Tensor, top_indices: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """δ = Σ h_i·ΔW_dec[i] over the changed rows among the top k.

    Args:
        top_acts: [..., k]; top_indices: [..., k] int64.
        rows: the row map of the change, [n] (see `row_map`).
        values: ΔW_dec of the changed rows, [c, d].

    Returns:
        [..., d], fp32; exactly 0 where no changed row is active.
    """
    where = rows[top_indices]
    acts = torch.where(where >= 0, top_acts.float(), 0.0)
    if len(values) == 0:
        return top_acts.new_zeros(*top_indices.shape[:-1], values.shape[-1], dtype=torch.float)
    zero_bias = values.new_zeros(values.shape[-1])
    return decode(acts, where.clamp(min=0), values, zero_bias)


def squared_distance(z_hat: Tensor, z: Tensor) -> Tensor:
    """‖ẑ_s − z_s‖² per token (the summand of Eq. 13): [..., d] → [...], fp32."""
    return (z_hat.float() - z.float()).square().sum(-1)
