"""Block conjugate gradients: (A + ridge)·X = B for all columns at once, A known by its products.

All columns share one Krylov space, which grows by as many directions a step as there are columns:
c rows take about c/d steps where single columns take hundreds. BCGrQ (Dubrulle, "Retooling the
method of block conjugate gradients", 2001) keeps the block of residuals orthonormal, so that
columns that depend on each other, or converge sooner than others, do no harm.

Panels are [c, b] fp32, the small matrices [b, b] fp64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from microedit_trainer.solvers.sparse_codes import Watch

# [c, b] → [c, b]: A times a block.
Product = Callable[[Tensor], Tensor]

# Relative residual at which a solution is good to some 3e-5, measured on the demo's model.
TOLERANCE = 2e-6
MOST_STEPS = 400
# fp32 loses digits on the way: the residual is computed afresh, and what is left is solved for.
ROUNDS = 4
# How many panels there are at once, and what they may take: that bounds the columns of a block.
PANELS, PANELS_BYTES = 9, 2 << 30


@dataclass(frozen=True)
class Found:
    """X [c, d] fp32, the relative residual that it has, and the steps that it took."""

    solution: Tensor
    residual: float
    steps: int


class Preconditioner(Protocol):
    """S with S·Sᵀ near (A + ridge)⁻¹: Sᵀ·(A + ridge)·S is solved for S⁻¹·X instead."""

    def apply(self, panel: Tensor) -> Tensor:
        """S·panel, [c, b] → [c, b]."""

    def apply_transposed(self, panel: Tensor) -> Tensor:
        """Sᵀ·panel."""

    def undo(self, panel: Tensor) -> Tensor:
        """S⁻¹·panel."""


class Jacobi:
    """Jacobi's: from the diagonal of A + ridge, [c] fp32."""

    def __init__(self, diagonal: Tensor) -> None:
        self._scale = diagonal.rsqrt()[:, None]

    def apply(self, panel: Tensor) -> Tensor:
        return self._scale * panel

    apply_transposed = apply

    def undo(self, panel: Tensor) -> Tensor:
        return panel / self._scale


class Factor:
    """From a Cholesky factor L [c, c], lower, of something near A + ridge: S is L⁻ᵀ."""

    def __init__(self, lower: Tensor) -> None:
        self._lower = lower

    def apply(self, panel: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self._lower.T, panel, upper=True)

    def apply_transposed(self, panel: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self._lower, panel, upper=False)

    def undo(self, panel: Tensor) -> Tensor:
        return self._lower.T @ panel


def conjugate_gradients(
    product: Product,
    right: Tensor,
    preconditioner: Preconditioner,
    ridge: float,
    start: Tensor | None = None,
    watch: Watch = lambda share, note: None,
    tolerance: float = TOLERANCE,
) -> Found:
    """Solve as many columns together as `PANELS_BYTES` allow.

    Args:
        product: by the positive semi-definite A.
        right: B [c, d] fp32.
        start: where X starts, [c, d]; 0 where it is None.
        tolerance: of the residual, as the preconditioner has it and relative to B's.
    """
    size = max(1, min(right.shape[1], PANELS_BYTES // (4 * PANELS * max(1, len(right)))))

    def preconditioned(panel: Tensor) -> Tensor:
        panel = preconditioner.apply(panel)
        return preconditioner.apply_transposed(product(panel) + ridge * panel)

    solution = torch.empty_like(right)
    worst, steps = 0.0, 0
    for first in range(0, right.shape[1], size):
        some = slice(first, first + size)
        own = preconditioner.apply_transposed(right[:, some])
        block = _Block(preconditioned, own, tolerance, steps, watch)
        block.solve(None if start is None else preconditioner.undo(start[:, some]))
        solution[:, some] = preconditioner.apply(block.solution)
        worst, steps = max(worst, block.left), block.steps
    return Found(solution, worst, steps)


class _Block:
    """The columns that are solved together: their solution so far, and what is left to do.

    Attributes:
        solution: [c, b].
        left: its residual, relative to the right side.
        steps: taken, with those of the blocks before.
    """

    def __init__(
        self, product: Product, right: Tensor, tolerance: float, steps: int, watch: Watch
    ) -> None:
        self._product, self._right = product, right
        self._norm = float(right.norm())
        self._tolerance, self._watch = tolerance, watch
        self.solution = torch.zeros_like(right)
        self.left = 1.0 if self._norm else 0.0
        self.steps = steps

    def solve(self, start: Tensor | None) -> None:
        """Rounds of `_descend`, each on what the one before really left, while they help."""
        residual = self._right
        if start is not None and self._norm:
            from_start = self._right - self._product(start)
            left = float(from_start.norm()) / self._norm
            # Where it starts worse than 0 it was of something else.
            if left < 1:
                self.solution, residual, self.left = start, from_start, left
        for _ in range(ROUNDS):
            if self.left <= self._tolerance:
                return
            tried = self.solution + self._descend(residual)
            residual = self._right - self._product(tried)
            left = float(residual.norm()) / self._norm
            if not left < self.left:
                return
            helped = left < self.left / 2
            self.solution, self.left = tried, left
            if not helped:
                return

    def _descend(self, residual: Tensor) -> Tensor:
        """X from 0 until the residual, as the recurrence has it, is within the tolerance."""
        solution = torch.zeros_like(residual)
        basis, small = _qr(residual)
        direction = basis
        for _ in range(MOST_STEPS):
            along = self._product(direction)
            inverse = _inverse(direction.T @ along)
            if inverse is None:
                break
            solution.addmm_(direction, (inverse @ small).float())
            basis, turn = _qr(basis.addmm(along, inverse.float(), alpha=-1))
            small = turn @ small
            direction = basis.addmm(direction, turn.T.float())
            self.steps += 1
            left = float(small.norm()) / self._norm
            self._report(left)
            if not left > self._tolerance:
                break
        return solution

    def _report(self, left: float) -> None:
        digits = math.log(max(left, self._tolerance)) / math.log(self._tolerance)
        self._watch(max(0.0, digits), f"step {self.steps}, residual {left:.1e}")


def _qr(panel: Tensor) -> tuple[Tensor, Tensor]:
    basis, triangle = torch.linalg.qr(panel)
    return basis, triangle.double()


def _inverse(gram: Tensor) -> Tensor | None:
    """Of a small positive definite matrix, fp64; None where rounding left it none."""
    gram = gram.double()
    factor, failed = torch.linalg.cholesky_ex((gram + gram.T) / 2)
    return None if int(failed) else torch.cholesky_inverse(factor)
