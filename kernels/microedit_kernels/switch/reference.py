"""ARD over a scope, the decision, and the substitution, in plain torch.

`dist` and `dist0` are the squared distances of one sequence's scored tokens, in order of
position: sinks, the decision token and everything outside the scope are already left out.
"""

import torch
from torch import Tensor


def absolute_ard(dist: Tensor, alpha: float) -> Tensor:
    """ARD = 1/(α·S)·Σ_s ‖ẑ_s − z_s‖² (Eq. 13): [S] → scalar fp32; +∞ when S = 0."""
    if dist.numel() == 0:
        return dist.new_full((), torch.inf, dtype=torch.float)
    return dist.float().mean() / alpha


def relative_ard(dist: Tensor, dist0: Tensor) -> Tensor:
    """Σ‖ẑ − z‖² / Σ‖ẑ₀ − z‖² over the same tokens: two [S] → scalar fp32; +∞ when S = 0.

    1 where no changed row is active; needs no α.
    """
    if dist.numel() == 0:
        return dist.new_full((), torch.inf, dtype=torch.float)
    return dist.float().sum() / dist0.float().sum().clamp(min=torch.finfo(torch.float).tiny)


def smallest_run(dist: Tensor, weight: Tensor, run: int) -> Tensor:
    """Smallest Σdist/Σweight over runs of `run` consecutive scored tokens (all when fewer).

    With weight = dist0 this is the windowed relative ARD, with weight = α everywhere the
    windowed absolute one.

    Args:
        dist, weight: [S], fp32.
        run: tokens in a run, ≥ 1; 0 takes all tokens as one run.

    Returns:
        scalar fp32; +∞ when S = 0.
    """
    if run == 0 or dist.numel() <= run:
        return relative_ard(dist, weight)
    sums = dist.float().unfold(0, run, 1).sum(-1)
    weights = weight.float().unfold(0, run, 1).sum(-1)
    return (sums / weights.clamp(min=torch.finfo(torch.float).tiny)).min()


def decide(ard: Tensor, tau: float) -> Tensor:
    """The switch (Eq. 14): on where ARD ≤ τ; NaN is off. Bool, shape of `ard`."""
    return ard <= tau


def apply_replace(
    hidden_states: Tensor, residual: Tensor | None, rows: Tensor, z_hat: Tensor
) -> None:
    """z ← ẑ in place, in the given rows and no other.

    The residual stream after a layer is hidden_states + residual where the architecture fuses
    the sum into the next norm, hidden_states alone where `residual` is None.

    Args:
        hidden_states, residual: [M, d], changed in place.
        rows: [R] int64; z_hat: [R, d].
    """
    if residual is None:
        hidden_states[rows] = z_hat.to(hidden_states.dtype)
        return
    residual[rows] = z_hat.to(residual.dtype)
    hidden_states[rows] = 0


def apply_delta(
    hidden_states: Tensor, residual: Tensor | None, rows: Tensor, delta: Tensor
) -> None:
    """z ← z + δ in place, in the given rows and no other; arguments as in `apply_replace`.

    z is summed in the stream's own dtype before δ is added in fp32, so that one rounding to that
    dtype is all that separates it from the definition.
    """
    z = hidden_states[rows] if residual is None else hidden_states[rows] + residual[rows]
    apply_replace(hidden_states, residual, rows, z.float() + delta)
