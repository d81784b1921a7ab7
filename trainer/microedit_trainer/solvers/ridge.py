"""Weighted ridge regression for decoder rows, codes fixed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One group of tokens: codes [N, c] shall be decoded to `wanted` [N, d], with a weight."""

    codes: Tensor
    wanted: Tensor
    weight: float


def solve_ridge(terms: Sequence[Term], ridge: float) -> Tensor:
    """argmin_D Σ w‖K·D − R‖² + ridge·‖D‖², by normal equations in fp64.

    The smaller of the two equal systems is solved: [c, c] in the rows or [N, N] in the tokens.

    Returns:
        D [c, d] fp32.
    """
    codes = torch.cat([t.codes * t.weight**0.5 for t in terms]).double()
    wanted = torch.cat([t.wanted * t.weight**0.5 for t in terms]).double()
    tokens, rows = codes.shape
    if rows <= tokens:
        gram = codes.T @ codes
        gram.diagonal().add_(ridge)
        return torch.cholesky_solve(codes.T @ wanted, torch.linalg.cholesky(gram)).float()
    gram = codes @ codes.T
    gram.diagonal().add_(ridge)
    return (codes.T @ torch.cholesky_solve(wanted, torch.linalg.cholesky(gram))).float()


def strongest_rows(change: Tensor, codes: Tensor, count: int) -> Tensor:
    """The rows that do the work: largest ‖ΔW_i‖ × rms of their code.

    Args:
        change: [c, d]; codes: [N, c].

    Returns:
        indices into the rows, ascending, at most `count`.
    """
    strength = change.norm(dim=1) * codes.square().mean(0).sqrt()
    count = min(count, int((strength > 0).sum()))
    return strength.topk(count).indices.sort().values
