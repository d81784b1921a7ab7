"""The encoder of SAE training with a gradient that touches only the latents that are active.

A dense backward pass costs two products of [batch, n] with [n, d]; this one k rows per token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class TopkEncode(torch.autograd.Function):
    """Top-k of x·W_encᵀ + b_enc, the product in bf16.

    forward(x [B, d], W_enc [n, d], b_enc [n], k, relu) → top_acts [B, k] fp32,
    top_indices [B, k] int64. Without `relu`, latents below 0 are chosen and learn too, which is
    how dead ones come back.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, relu: bool
    ) -> tuple[Tensor, Tensor]:
        pre = F.linear(x.bfloat16(), W_enc.bfloat16()).float().add_(b_enc)
        top_acts, top_indices = pre.topk(k, dim=-1, sorted=False)
        if relu:
            top_acts = top_acts.relu_()
        ctx.save_for_backward(x, W_enc, top_acts, top_indices)
        ctx.relu = relu
        ctx.mark_non_differentiable(top_indices)
        return top_acts, top_indices

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, W_enc, top_acts, top_indices = ctx.saved_tensors
        grad = gradients[0] * (top_acts > 0) if ctx.relu else gradients[0]
        grad_W, grad_b = scatter_rows(top_indices, grad, x, len(W_enc))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = F.embedding_bag(top_indices, W_enc, per_sample_weights=grad, mode="sum")
        return grad_x, grad_W, grad_b, None, None


def scatter_rows(indices: Tensor, weights: Tensor, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Σ_b weights[b, j]·x[b] into row indices[b, j], and the sum of the weights alone.

    Sorted by row first: each row is then one weighted gather, with no two threads on one row.

    Args:
        indices, weights: [B, k]; x: [B, d].

    Returns:
        [count, d] and [count].
    """
    rows, order = indices.flatten().sort(stable=True)
    sizes = torch.bincount(rows, minlength=count)
    weights = weights.flatten()[order]
    summed = F.embedding_bag(
        order // indices.shape[1],
        x,
        offsets=sizes.cumsum(0) - sizes,
        per_sample_weights=weights,
        mode="sum",
    )
    return summed, torch.zeros(count, device=x.device).index_add_(0, rows, weights)


def top_rows(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor) -> Tensor:
    """Σ_j h_j·W_dec[i_j]: [B, k], [B, k], [n, d] → [B, d]."""
    return F.embedding_bag(top_indices, W_dec, per_sample_weights=top_acts, mode="sum")
