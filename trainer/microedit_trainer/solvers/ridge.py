"""Weighted ridge regression for decoder rows, codes fixed: which of four ways solves it.

    min_D Σ w·‖H·D − R‖² + ridge·‖D‖²

| system | for | memory beside z and D |
|---|---|---|
| tokens, Cholesky | fewer tokens than rows | 8·N·(2·N + c + d) bytes, at most `DENSE_BYTES` |
| rows, Cholesky | few rows, or codes that are not sparse | 8·c·(2·c + d), at most `DENSE_BYTES` |
| rows, Cholesky in fp32, refined | more such rows | half of that, and as the next |
| rows, block conjugate gradients | the rest | `CODES_BYTES` + `PANELS_BYTES` |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from microedit_trainer.solvers.conjugate_gradients import (
    Factor,
    Jacobi,
    Preconditioner,
    conjugate_gradients,
)
from microedit_trainer.solvers.dense_systems import RowSystem, TokenSystem, add_gram
from microedit_trainer.solvers.sparse_codes import CodedTerms, Watch
from microedit_vllm.errors import MicroEditError

DENSE_BYTES = 3 << 30
# How long a multiply-add takes, in those of an fp32 matrix product, measured on one core: 95
# GFLOP/s, against 45 in fp64 and 35 through an index.
FP64_COST, GATHER_COST = 2.0, 3.0
# Steps of conjugate gradients, by c/d. A start near the solution saves a third of them at most.
LEAST_STEPS, STEPS_PER_BLOCK = 4, 1.0
# Steps that bring back the digits which a factor in fp32 lacks.
REFINING_STEPS = 4
# What else a step takes: so many products of [c, d] by [d, d].
PANEL_PRODUCTS = 10
# Multiply-adds that take some seconds.
QUICK = 3e11
# How often a factor is tried for, each time with more on the diagonal.
MOST_TRIES = 10
# With more than that left the equations are not solved.
MOST_RESIDUAL = 1e-2


class System(Protocol):
    """The regression over all rows of the coded terms."""

    def solve(
        self,
        ridge: float,
        kept: Tensor | None = None,
        start: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """D [c, d] fp32.

        Args:
            kept: the rows that may change, ascending indices into the rows; None: all of them.
            start: a D near the solution, for ways that can use it.
            last: no other solve follows, so that what the system holds may be used up.
        """


@dataclass(frozen=True)
class IterativeSystem:
    """Normal equations in the rows that are never formed, by block conjugate gradients.

    Attributes:
        right: Σ w·HᵀR [c, d]; diagonal: Σ w·h² [c]; both fp32.
    """

    coded: CodedTerms
    right: Tensor
    diagonal: Tensor
    watch: Watch

    @classmethod
    def of(cls, coded: CodedTerms, watch: Watch) -> "IterativeSystem":
        return cls(coded, coded.right(), coded.diagonal(), watch)

    def solve(
        self,
        ridge: float,
        kept: Tensor | None = None,
        start: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """See `System.solve`.

        Raises:
            MicroEditError: rounding leaves no solution.
        """
        diagonal = self.diagonal if kept is None else self.diagonal[kept]
        near = Jacobi(diagonal + ridge)
        return _iterate(self.coded, self.right, near, ridge, kept, start, self.watch)


class RefinedSystem:
    """Normal equations that are factored in fp32; conjugate gradients bring back the digits that
    this loses, in a few steps.

    Args:
        right: Σ w·KᵀR, [c, d] fp32.
        gram: Σ w·KᵀK, [c, c] fp32, its lower half.
    """

    def __init__(self, coded: CodedTerms, right: Tensor, gram: Tensor, watch: Watch) -> None:
        self._coded, self._right, self._watch = coded, right, watch
        self._gram: Tensor | None = gram

    @classmethod
    def of(cls, coded: CodedTerms, watch: Watch) -> "RefinedSystem":
        right = torch.zeros(len(coded.rows), coded.width, device=coded.device)
        return cls(coded, right, _gram(coded, watch, right), watch)

    def solve(
        self,
        ridge: float,
        kept: Tensor | None = None,
        start: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """See `System.solve`.

        Raises:
            MicroEditError: rounding leaves no solution.
        """
        near = Factor(self._factored(ridge, kept, last))
        return _iterate(self._coded, self._right, near, ridge, kept, start, self._watch)

    def _factored(self, ridge: float, kept: Tensor | None, last: bool) -> Tensor:
        """Cholesky factor of gram + ridge, or of + as much more as rounding makes necessary, of
        all rows or the kept ones.

        Raises:
            MicroEditError: no factor, since some numbers are none.
        """
        more = ridge
        for _ in range(MOST_TRIES):
            gram = _gram(self._coded, self._watch) if self._gram is None else self._gram
            # The second matrix is as large as the first: where it can be, the first is let go.
            self._gram = None if last else gram
            if kept is not None:
                gram = gram[kept[:, None], kept]
            elif not last:
                gram = gram.clone()
            if _factor(gram, more):
                return gram
            more *= 4
        raise MicroEditError("the ridge regression cannot be factored; raise the solver's ridge")


def _gram(coded: CodedTerms, watch: Watch, right: Tensor | None = None) -> Tensor:
    """Σ w·KᵀK [c, c] fp32, its lower half; Σ w·KᵀR is added to `right`."""
    count = len(coded.rows)
    gram = torch.zeros(count, count, device=coded.device)
    for done, codes, wanted in coded.dense():
        watch(done, f"normal equations of {count} rows")
        if right is not None:
            right.addmm_(codes.T, wanted)
        add_gram(gram, codes)
    return gram


def _factor(gram: Tensor, ridge: float) -> bool:
    """Cholesky of gram + ridge in place, of which only the lower half is read; whether it went."""
    gram.diagonal().add_(ridge)
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    # By columns, as LAPACK has them: rows would be copied, which is one matrix more.
    torch.linalg.cholesky_ex(gram.mT, upper=True, out=(gram.mT, failed))
    return not int(failed)


def _iterate(
    coded: CodedTerms,
    right: Tensor,
    near: Preconditioner,
    ridge: float,
    kept: Tensor | None,
    start: Tensor | None,
    watch: Watch,
) -> Tensor:
    """Conjugate gradients with products by the codes, over all rows or the kept ones."""
    product = coded.gram_product
    if kept is not None:
        right = right[kept]

        def product(change: Tensor) -> Tensor:
            whole = change.new_zeros(len(coded.rows), change.shape[1])
            whole[kept] = change
            return coded.gram_product(whole)[kept]

    found = conjugate_gradients(product, right, near, ridge, start, watch)
    if not found.residual <= MOST_RESIDUAL:
        raise MicroEditError(
            f"the ridge regression ended with a relative residual of {found.residual:.1e}; "
            "raise the solver's ridge"
        )
    return found.solution


def is_quick(coded: CodedTerms) -> bool:
    """Whether a solution to start from is not worth its while: some seconds on one core."""
    return min(_costs(coded).values()) < QUICK


def ridge_system(coded: CodedTerms, watch: Watch) -> System:
    """The fastest system within the memory that it may take.

    Args:
        watch: shown how far it is: share and note.
    """
    costs = _costs(coded)
    return min(costs, key=costs.__getitem__)(coded, watch)


def _costs(coded: CodedTerms) -> dict[Callable[[CodedTerms, Watch], System], float]:
    """The ways that keep to the memory, each with its multiply-adds as of a product in fp32."""
    tokens, rows, width = coded.tokens, len(coded.rows), coded.width
    steps = LEAST_STEPS + STEPS_PER_BLOCK * rows / width
    # H·D and Hᵀ·R; with codes that are not kept they are made first.
    product = GATHER_COST * 2 * coded.nonzeros if coded.is_kept else 3.0 * tokens * rows
    step = width * (product + PANEL_PRODUCTS * rows * width)
    costs: dict[Callable[[CodedTerms, Watch], System], float] = {IterativeSystem.of: steps * step}
    if 4 * rows * (2 * rows + width) <= DENSE_BYTES:
        refining = REFINING_STEPS * (step + width * rows**2)
        costs[RefinedSystem.of] = rows**2 * (tokens / 2 + rows / 6) + refining
    if 8 * tokens * (2 * tokens + rows + width) <= DENSE_BYTES:
        costs[TokenSystem.of] = FP64_COST * tokens**2 * (rows + tokens / 6)
    if 8 * rows * (2 * rows + width) <= DENSE_BYTES:
        costs[RowSystem.of] = FP64_COST * rows**2 * (tokens / 2 + rows / 6)
    return costs


def strongest_rows(change: Tensor, rms: Tensor, count: int) -> Tensor:
    """The rows that do the work: largest ‖ΔW_i‖ × rms of their code.

    Args:
        change: [c, d]; rms: [c].

    Returns:
        indices into the rows, ascending, at most `count`.
    """
    strength = change.norm(dim=1) * rms
    count = min(count, int((strength > 0).sum()))
    return strength.topk(count).indices.sort().values
