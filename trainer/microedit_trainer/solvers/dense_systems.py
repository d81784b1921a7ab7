"""Ridge regression by a Cholesky factor in fp64: of the rows' normal equations, or the tokens'."""

from dataclasses import dataclass

import torch
from torch import Tensor

from microedit_trainer.solvers.sparse_codes import CodedTerms, Watch

# Columns of the normal equations that are added up at once.
BLOCK = 1024


@dataclass(frozen=True)
class RowSystem:
    """Normal equations in the rows: Σ w·KᵀK [c, c], its lower half, and Σ w·KᵀR [c, d], fp64.

    Takes 8·c·(c + d) bytes, and 8·c² more to solve, however many tokens there are.
    """

    gram: Tensor
    right: Tensor

    @classmethod
    def of(cls, coded: CodedTerms, watch: Watch) -> "RowSystem":
        count = len(coded.rows)
        gram = torch.zeros(count, count, dtype=torch.double, device=coded.device)
        right = torch.zeros(count, coded.width, dtype=torch.double, device=coded.device)
        for done, codes, wanted in coded.dense():
            watch(done, f"normal equations of {count} rows")
            own = codes.double()
            right.addmm_(own.T, wanted.double())
            add_gram(gram, own)
        return cls(gram, right)

    def solve(
        self,
        ridge: float,
        kept: Tensor | None = None,
        start: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """See `ridge.System.solve`."""
        if kept is None:
            return _solve(self.gram.clone(), self.right, ridge).float()
        return _solve(self.gram[kept][:, kept], self.right[kept], ridge).float()


@dataclass(frozen=True)
class TokenSystem:
    """Codes [N, c] and what they shall be decoded to [N, d], both times √w, fp64.

    Takes 8·N·(N + c + d) bytes, and 8·N² more to solve: for fewer tokens than rows.
    """

    codes: Tensor
    wanted: Tensor

    @classmethod
    def of(cls, coded: CodedTerms, watch: Watch) -> "TokenSystem":
        watch(0.0, f"equations of {coded.tokens} tokens")
        pairs = [(codes.double(), wanted.double()) for _, codes, wanted in coded.dense()]
        codes, wanted = (torch.cat(column) for column in zip(*pairs, strict=True))
        return cls(codes, wanted)

    def solve(
        self,
        ridge: float,
        kept: Tensor | None = None,
        start: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """See `ridge.System.solve`."""
        codes = self.codes if kept is None else self.codes[:, kept]
        if codes.shape[1] <= len(codes):
            return _solve(codes.T @ codes, codes.T @ self.wanted, ridge).float()
        return (codes.T @ _solve(codes @ codes.T, self.wanted, ridge)).float()


def add_gram(gram: Tensor, codes: Tensor) -> None:
    """gram [c, c] += KᵀK of codes K [N, c], in place and no more than its lower half and a bit."""
    for first in range(0, len(gram), BLOCK):
        some = slice(first, first + BLOCK)
        gram[first:, some].addmm_(codes[:, first:].T, codes[:, some])


def _solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(gram + ridge)⁻¹·right; only the lower half of `gram` is read, and it is overwritten."""
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
