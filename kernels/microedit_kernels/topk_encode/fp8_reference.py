"""Eight-bit filter of the Top-k encode in plain torch: codes, and the error that they can cause.

With W_enc[i] = scale_i·codes_i + e_i, the filter's pre-activation misses the exact one by e_i·z, at
most ‖e_i‖·‖z‖ (Cauchy–Schwarz). Nothing smaller is certain for every z. The share of that bound
which an unrelated z causes is about 1/√d, so the proof costs candidates that will not be chosen.
"""

import math

import torch
from torch import Tensor

_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 126.99}
# Norms are rounded up by more than their own error.
_UP = 1 + 2**-18


def quantise(
    W: Tensor, codes: torch.dtype, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of W as 8-bit codes and a scale.

    Args:
        W: [n, d], any float dtype.
        codes: float8_e4m3fn, or int8, which spends its bits where a row's norm is: about a third
            of e4m3's error.
        generator: rounds int8 at random, without bias, instead of to the nearest.

    Returns:
        codes [n, d] and scale [n] fp32: W ≈ scale·codes.

    Raises:
        ValueError: random rounding of anything but int8.
    """
    if generator is not None and codes != torch.int8:
        raise ValueError("only int8 codes are rounded at random: their steps are equal")
    largest = W.double().abs().amax(-1)
    scale = (largest / _LARGEST[codes]).float()
    scale = torch.where(scale > 0, scale, 1.0)
    exact = W.double() / scale.double()[:, None]
    if codes != torch.int8:
        return exact.float().to(codes), scale
    if generator is None:
        return exact.round().to(codes), scale
    chance = torch.rand(W.shape, dtype=torch.float64, device=W.device, generator=generator)
    return (exact + chance).floor().to(codes), scale


def quantisation_error(W: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """e = W − scale·codes, [n, d] fp64."""
    return W.double() - scale.double()[:, None] * codes.double()


def proven_error(error: Tensor) -> Tensor:
    """‖e_i‖₂, [n] fp32, rounded up: |e_i·z| ≤ ‖e_i‖·‖z‖ for every z."""
    return (error.norm(dim=-1) * _UP).float()


def likely_error(scale: Tensor, n: int, chance: float) -> Tensor:
    """An x_i, [n] fp32, such that |e_i·z| > x_i·‖z‖ for any of n latents has at most that chance.

    For codes rounded at random, and over their rounding: z must not depend on it, and does not
    where every encode that z followed from was exact. Each product e_ij·z_j has mean 0 and a range
    of scale_i·|z_j|, so Hoeffding's inequality gives 2·exp(−2·x² / scale²) for one latent.
    """
    return (scale.double() * math.sqrt(math.log(2 * n / chance) / 2) * _UP).float()


def rounding_error(W: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """What fp32 sums of the filter and of the exact product miss, in units of ‖z‖, [n] fp32.

    (d + 64)·2⁻²³ of the row's norm: one unit in the last place, truncated, for each of the d
    additions of the filter's sum in any order, and 64 more for the exact product's, which the
    re-scoring adds up in at most d / 256 + 16 steps.
    """
    quantised = scale.double()[:, None] * codes.double()
    norm = torch.maximum(W.double().norm(dim=-1), quantised.norm(dim=-1))
    return (norm * (W.shape[-1] + 64) * 2.0**-23 * _UP).float()


def candidates(
    approximate: Tensor, bound: Tensor, exact: Tensor, k: int, relu: bool = True
) -> Tensor:
    """Latents that the filter can't exclude: all of the k largest exact values are among them.

    The k best by the filter are scored exactly first. The smallest of them, L, is at most the k-th
    largest exact value, so a latent below L even with its whole error is not among the k largest.

    Args:
        approximate, bound, exact: [..., n] fp32, |approximate − exact| ≤ bound.

    Returns:
        [..., n] bool.
    """
    first = approximate.topk(k, dim=-1).indices
    upper = approximate + bound
    if relu:
        exact, upper = exact.relu(), upper.relu()
    return upper >= exact.gather(-1, first).amin(-1, keepdim=True)
