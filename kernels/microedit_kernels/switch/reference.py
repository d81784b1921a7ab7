"""ARD over a scope, the decision, and the substitution, in plain torch.

`dist` and `dist0` are the squared distances of each sequence's scored tokens, in order of position:
the decision token and everything outside the scope are already left out.
"""

import torch
from torch import Tensor


def smallest_runs(dist: Tensor, weight: Tensor, counted: Tensor, run: int) -> Tensor:
    """Per sequence, the smallest Σdist/Σweight over runs of `run` consecutive counted tokens.

    All counted tokens are one run where there are no more than `run` of them, or `run` is 0. With
    weight = α this is the absolute ARD = 1/(α·S)·Σ_s ‖ẑ_s − z_s‖² (Eq. 13); with weight = dist0 the
    relative one, Σ‖ẑ − z‖² / Σ‖ẑ₀ − z‖², which is 1 where no changed row is active and needs no α.
    Shapes depend on no value, so that nothing is read back to the host.

    Args:
        dist, weight: [D, W] fp32, in order of position; anything where `counted` is False.
        counted: which of them count, [D, W] bool.

    Returns:
        [D] fp32; +∞ for a sequence without counted tokens.
    """
    size = counted.sum(-1)
    if not counted.shape[-1]:
        return dist.new_full(counted.shape[:-1], torch.inf, dtype=torch.float)
    tiny = torch.finfo(torch.float).tiny
    order = counted.logical_not().to(torch.int8).sort(dim=-1, stable=True).indices
    counted = counted.gather(-1, order)
    dist = dist.float().gather(-1, order).where(counted, 0.0)
    weight = weight.float().gather(-1, order).where(counted, 0.0)
    smallest = dist.sum(-1) / weight.sum(-1).clamp(min=tiny)
    if 0 < run < dist.shape[-1]:
        ratios = dist.unfold(-1, run, 1).sum(-1) / weight.unfold(-1, run, 1).sum(-1).clamp(min=tiny)
        ends = torch.arange(run, dist.shape[-1] + 1, device=dist.device)
        ratios = ratios.where(ends <= size[:, None], torch.inf)
        smallest = ratios.min(-1).values.where(size > run, smallest)
    return smallest.where(size > 0, torch.inf)


def decide(ard: Tensor, tau: float) -> Tensor:
    """The switch (Eq. 14): on where ARD ≤ τ; NaN is off. Bool, shape of `ard`."""
    return ard <= tau


def apply_replace(
    hidden_states: Tensor,
    residual: Tensor | None,
    rows: Tensor,
    z_hat: Tensor,
    on: Tensor | None = None,
) -> None:
    """z ← ẑ in place, in the given rows and no other.

    The residual stream after a layer is hidden_states + residual where the architecture fuses
    the sum into the next norm, hidden_states alone where `residual` is None.

    Args:
        hidden_states, residual: [M, d], changed in place.
        rows: [R] int64; z_hat: [R, d].
        on: which of the rows change, [R] bool; all of them when None. A mask spares a device the
            reading of which rows they are.
    """
    carrier = hidden_states if residual is None else residual
    z_hat = z_hat.to(carrier.dtype)
    zero = torch.zeros((), dtype=hidden_states.dtype, device=hidden_states.device)
    if on is not None:
        z_hat = z_hat.where(on[:, None], carrier[rows])
        zero = zero.where(on[:, None], hidden_states[rows])
    carrier[rows] = z_hat
    if residual is not None:
        hidden_states[rows] = zero


def apply_delta(
    hidden_states: Tensor, residual: Tensor | None, rows: Tensor, delta: Tensor
) -> None:
    """z ← z + δ in place, in the given rows and no other; arguments as in `apply_replace`.

    z is summed in the stream's own dtype before δ is added in fp32, so that one rounding to that
    dtype is all that separates it from the definition.
    """
    z = hidden_states[rows] if residual is None else hidden_states[rows] + residual[rows]
    apply_replace(hidden_states, residual, rows, z.float() + delta)
