"""Weighted ridge regression for decoder rows, codes fixed.

Codes are computed chunk by chunk from the tokens' residuals and never held whole where there are
more tokens than rows: then the normal equations in the rows are added up, which take 8·c·(c + d)
bytes for c rows, however many tokens there are. Where there are fewer tokens than rows, the equal
system in the tokens is the smaller one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# z [N, d] → codes [N, n] fp32, dense.
Encode = Callable[[Tensor], Tensor]
# Tokens whose codes are held at once.
CHUNK = 1024


@dataclass(frozen=True)
class Term:
    """A group of tokens: the codes of z [N, d] shall be decoded to `wanted` [N, d], with a weight.

    `wanted` is 0 where it is None.
    """

    z: Tensor
    wanted: Tensor | None
    weight: float


@dataclass(frozen=True)
class Survey:
    """What the codes of a term look like.

    Attributes:
        active: rows that some token activates, ascending, [c] int64.
        rms: root mean square of each row's code, [n] fp32.
        mean_square: mean ‖h‖² of a token.
        least: latents that the least active token has.
    """

    active: Tensor
    rms: Tensor
    mean_square: float
    least: int


class System(Protocol):
    """min_D Σ w‖K·D − R‖² + ridge·‖D‖² over some rows."""

    def solve(self, ridge: float, kept: Tensor | None = None) -> Tensor:
        """D [c, d] fp32, of all rows or of the kept ones (indices into the rows) alone."""


def survey(encode: Encode, term: Term) -> Survey:
    """Look at a term's codes once."""
    squares, least = [], []
    for codes, _ in _chunks(encode, term):
        squares.append(codes.double().square().sum(0))
        least.append((codes > 0).sum(1).min())
    total = torch.stack(squares).sum(0)
    tokens = len(term.z)
    return Survey(
        total.nonzero()[:, 0],
        (total / tokens).sqrt().float(),
        float(total.sum() / tokens),
        int(torch.stack(least).min()),
    )


def ridge_system(encode: Encode, terms: Sequence[Term], rows: Tensor) -> System:
    """The smaller of the two equal systems over the given rows, [c] int64."""
    if sum(len(term.z) for term in terms) <= len(rows):
        return TokenSystem.of(encode, terms, rows)
    return RowSystem.of(encode, terms, rows)


@dataclass(frozen=True)
class RowSystem:
    """Normal equations in the rows: gram Σ w·KᵀK [c, c] and right Σ w·KᵀR [c, d], fp64."""

    gram: Tensor
    right: Tensor

    @classmethod
    def of(cls, encode: Encode, terms: Sequence[Term], rows: Tensor) -> "RowSystem":
        z = terms[0].z
        gram = torch.zeros(len(rows), len(rows), dtype=torch.double, device=z.device)
        right = torch.zeros(len(rows), z.shape[1], dtype=torch.double, device=z.device)
        for term in terms:
            for codes, wanted in _chunks(encode, term):
                own = codes[:, rows].double()
                gram.addmm_(own.T, own, alpha=term.weight)
                if wanted is not None:
                    right.addmm_(own.T, wanted.double(), alpha=term.weight)
        return cls(gram, right)

    def solve(self, ridge: float, kept: Tensor | None = None) -> Tensor:
        """See `System.solve`."""
        gram, right = self.gram, self.right
        if kept is not None:
            gram, right = gram[kept][:, kept], right[kept]
        return _solve(gram, right, ridge).float()


@dataclass(frozen=True)
class TokenSystem:
    """Codes [N, c] and what they shall be decoded to [N, d], both times √w, fp64."""

    codes: Tensor
    wanted: Tensor

    @classmethod
    def of(cls, encode: Encode, terms: Sequence[Term], rows: Tensor) -> "TokenSystem":
        z = terms[0].z
        tokens = sum(len(term.z) for term in terms)
        # Filled in place: joined chunks would be held twice.
        codes = torch.empty(tokens, len(rows), dtype=torch.double, device=z.device)
        wanted = torch.zeros(tokens, z.shape[1], dtype=torch.double, device=z.device)
        start = 0
        for term in terms:
            for own, target in _chunks(encode, term):
                part = slice(start, start + len(own))
                codes[part] = own[:, rows].double() * term.weight**0.5
                if target is not None:
                    wanted[part] = target.double() * term.weight**0.5
                start += len(own)
        return cls(codes, wanted)

    def solve(self, ridge: float, kept: Tensor | None = None) -> Tensor:
        """See `System.solve`."""
        codes = self.codes if kept is None else self.codes[:, kept]
        if codes.shape[1] <= len(codes):
            return _solve(codes.T @ codes, codes.T @ self.wanted, ridge).float()
        return (codes.T @ _solve(codes @ codes.T, self.wanted, ridge)).float()


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


def _solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    gram = gram.clone()
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))


def _chunks(encode: Encode, term: Term) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(term.z), CHUNK):
        part = slice(start, start + CHUNK)
        yield encode(term.z[part]), None if term.wanted is None else term.wanted[part]
