"""The codes of many tokens, as ridge regression needs them: H·D, Hᵀ·R and Hᵀ·H·D.

Sparse codes are kept as far as `CODES_BYTES` goes and computed anew for each product beyond it, so
that memory does not grow with the number of tokens. At most 4·c·d bytes for a product, 16 a kept
code, and some times `PIECE_BYTES` for codes in the making.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# z [N, d] → codes [N, n] fp32, dense, ≥ 0.
Encode = Callable[[Tensor], Tensor]
# Shown the share that is done, in [0, 1], and what of.
Watch = Callable[[float, str], None]

# Kept codes, with those sorted by row: 64 million, 1 million tokens of a Top-64.
CODES_BYTES = 1 << 30
BYTES_PER_CODE = 16
# Dense codes that are made at once.
PIECE_BYTES = 1 << 26
# Tokens whose codes are kept together.
PART = 4096
# Columns that sparse products take at once: what they gather from then stays in a core's cache,
# which is three times as fast (35 against 11 GFLOP/s at c = 4,608, k = 64).
COLUMNS = 128


@dataclass(frozen=True)
class Unexplained:
    """What a decoder W_dec [n, d], b_dec [d] fails to reconstruct of z: z − H·W_dec − b_dec.

    For the first term alone: H is what it activates, of other terms' codes only a part.
    """

    W_dec: Tensor
    b_dec: Tensor


@dataclass(frozen=True)
class Term:
    """A group of tokens: the codes of z [N, d] shall be decoded to `wanted` [N, d], with a weight.

    `wanted` is 0 where it is None. z may be whatever `Encode` takes, one row for a code.
    """

    z: Tensor
    wanted: Tensor | Unexplained | None
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


@dataclass(frozen=True)
class Part:
    """Up to `PART` tokens of a term, `where`; their codes are kept or made when they are needed."""

    term: Term
    where: slice
    kept: "KeptCodes | None"


@dataclass(frozen=True)
class KeptCodes:
    """Codes [N, c] in the form that `embedding_bag` takes, by token, times √weight.

    Attributes:
        rows, values: of each code that is not 0, int32 and fp32.
        starts: first code of each token, [N] int32.
        count: c.
    """

    rows: Tensor
    values: Tensor
    starts: Tensor
    count: int

    def among(self, place: Tensor, count: int) -> "KeptCodes":
        """Only the rows that have a place, [c] int32 with −1 for the others, renumbered."""
        rows = place[self.rows.long()]
        inside = rows >= 0
        counts = torch.bincount(self._tokens()[inside], minlength=len(self.starts))
        return KeptCodes(rows[inside], self.values[inside], _starts(counts), count)

    def decode(self, change: Tensor) -> Tensor:
        """H·D: [c, b] → [N, b] fp32."""
        return embedding_bag(
            self.rows, change, self.starts, per_sample_weights=self.values, mode="sum"
        )

    def encode_back(self, residual: Tensor) -> Tensor:
        """Hᵀ·R: [N, b] → [c, b] fp32."""
        tokens, values, starts = self._by_row
        return embedding_bag(tokens, residual, starts, per_sample_weights=values, mode="sum")

    @cached_property
    def _by_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same codes by row: tokens, values and the starts of rows."""
        order = self.rows.argsort(stable=True)
        starts = _starts(torch.bincount(self.rows, minlength=self.count))
        return self._tokens()[order].int(), self.values[order], starts

    def _tokens(self) -> Tensor:
        """The token of each code, int64."""
        ends = torch.cat([self.starts[1:], self.starts.new_tensor([len(self.rows)])])
        tokens = torch.arange(len(self.starts), device=self.starts.device)
        return tokens.repeat_interleave((ends - self.starts).long())


@dataclass(frozen=True)
class CodedTerms:
    """All tokens of a ridge regression, coded over the rows that the first term activates.

    Attributes:
        survey: of the first term.
        nonzeros: codes of all terms that are not 0.
    """

    encode: Encode
    parts: tuple[Part, ...]
    survey: Survey
    nonzeros: int

    @classmethod
    def of(cls, encode: Encode, terms: Sequence[Term], watch: Watch) -> "CodedTerms":
        """Code every term once; the first one says which rows there are."""
        first = encode(terms[0].z[:1])
        tokens = sum(len(term.z) for term in terms)
        parts, counted, left, done = [], [], CODES_BYTES // BYTES_PER_CODE, 0
        for term in terms:
            counted.append(_Counting(first.shape[1], first.device))
            for start in range(0, len(term.z), PART):
                where = slice(start, min(start + PART, len(term.z)))
                kept = _code(encode, term, where, counted[-1], left)
                left -= 0 if kept is None else len(kept.rows)
                done += where.stop - where.start
                watch(done / tokens, f"coding {tokens} tokens")
                parts.append(Part(term, where, kept))
        survey = counted[0].survey()
        count = len(survey.active)
        place = torch.full((first.shape[1],), -1, dtype=torch.int, device=first.device)
        place[survey.active] = torch.arange(count, dtype=torch.int, device=first.device)
        for index, part in enumerate(parts):
            if part.kept is not None:
                parts[index] = replace(part, kept=part.kept.among(place, count))
        return cls(encode, tuple(parts), survey, sum(c.nonzeros for c in counted))

    @property
    def rows(self) -> Tensor:
        """The rows that are solved for, [c] int64."""
        return self.survey.active

    @property
    def tokens(self) -> int:
        return sum(part.where.stop - part.where.start for part in self.parts)

    @property
    def is_kept(self) -> bool:
        return all(part.kept is not None for part in self.parts)

    @property
    def width(self) -> int:
        """d; the first term says what it wants."""
        wanted = self.parts[0].term.wanted
        assert wanted is not None
        return (wanted.W_dec if isinstance(wanted, Unexplained) else wanted).shape[1]

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def pieces(self, part: Part) -> Iterator[tuple[slice, Tensor]]:
        """Dense codes [N, c] of a part, times √weight, piece by piece, with their places in the
        term."""
        scale = part.term.weight**0.5
        for where in _cut(part.where, len(self.survey.rms)):
            yield where, self.encode(part.term.z[where])[:, self.rows] * scale

    def dense(self) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Codes [N, c] and what they shall be decoded to [N, d], both times √weight, of all tokens
        in turn; before them the share of the tokens that came before."""
        done = 0
        for part in self.parts:
            for where, codes in self.pieces(part):
                yield done / self.tokens, codes, self._wanted(part, where, codes.matmul)
                done += len(codes)

    def right(self) -> Tensor:
        """Σ w·Hᵀ·wanted: [c, d] fp32."""
        found = torch.zeros(len(self.rows), self.width, device=self.device)
        for part in self.parts:
            if part.term.wanted is None:
                continue
            if part.kept is not None:
                wanted = self._wanted(part, part.where, part.kept.decode)
                found += part.kept.encode_back(wanted)
                continue
            for where, codes in self.pieces(part):
                found.addmm_(codes.T, self._wanted(part, where, codes.matmul))
        return found

    def _wanted(self, part: Part, where: slice, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """What the codes of some tokens of a part shall be decoded to, times √weight: [N, d]."""
        term = part.term
        if term.wanted is None:
            return torch.zeros(where.stop - where.start, self.width, device=self.device)
        scale = term.weight**0.5
        if isinstance(term.wanted, Tensor):
            return term.wanted[where].float() * scale
        rest = (term.z[where].float() - term.wanted.b_dec) * scale
        return rest - decode(term.wanted.W_dec[self.rows])

    def diagonal(self) -> Tensor:
        """Σ w·h² of each row: [c] fp32."""
        found = torch.zeros(len(self.rows), device=self.device)
        for part in self.parts:
            if part.kept is not None:
                found.index_add_(0, part.kept.rows, part.kept.values.square())
            else:
                for _, codes in self.pieces(part):
                    found += codes.square().sum(0)
        return found

    def gram_product(self, change: Tensor) -> Tensor:
        """Σ w·Hᵀ·H·D: [c, b] fp32 → [c, b] fp32."""
        found = torch.zeros_like(change)
        for part in self.parts:
            if part.kept is None:
                for _, codes in self.pieces(part):
                    found.addmm_(codes.T, codes @ change)
        kept = [part.kept for part in self.parts if part.kept is not None]
        for start in range(0, change.shape[1] if kept else 0, COLUMNS):
            columns = slice(start, start + COLUMNS)
            own, total = change[:, columns].contiguous(), found[:, columns].contiguous()
            for some_codes in kept:
                total += some_codes.encode_back(some_codes.decode(own))
            found[:, columns] = total
        return found


def dense_codes(top_acts: Tensor, top_indices: Tensor, num_latents: int) -> Tensor:
    """Top-k codes [N, k] as a matrix [N, n]."""
    codes = top_acts.new_zeros(len(top_acts), num_latents)
    return codes.scatter_(1, top_indices, top_acts)


def tokens_at_once(num_latents: int) -> int:
    """How many tokens may have their dense codes in memory."""
    return max(1, PIECE_BYTES // (4 * num_latents))


class _Counting:
    """Adds up a survey, piece by piece."""

    def __init__(self, num_latents: int, device: torch.device) -> None:
        self.squares = torch.zeros(num_latents, dtype=torch.double, device=device)
        self.tokens = self.nonzeros = 0
        self.least = num_latents

    def add(self, count: int, token: Tensor, row: Tensor, values: Tensor) -> Tensor:
        """Count the codes of `count` tokens, each with its token and row; how many each has."""
        weights = values.double().square()
        self.squares += torch.bincount(row, weights, minlength=len(self.squares))
        active = torch.bincount(token, minlength=count)
        self.tokens += count
        self.nonzeros += len(values)
        self.least = min(self.least, int(active.min()))
        return active

    def survey(self) -> Survey:
        return Survey(
            self.squares.nonzero()[:, 0],
            (self.squares / self.tokens).sqrt().float(),
            float(self.squares.sum() / self.tokens),
            self.least,
        )


def _code(
    encode: Encode, term: Term, where: slice, counting: _Counting, room: int
) -> KeptCodes | None:
    """Count a part's codes, and keep them where there is room for so many."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for some in _cut(where, len(counting.squares)):
        codes = encode(term.z[some])
        token, row = codes.nonzero(as_tuple=True)
        values = codes[token, row]
        active = counting.add(len(codes), token, row, values)
        room -= len(values)
        if room < 0:
            kept = []
        else:
            kept.append((row.int(), values * term.weight**0.5, active))
    if room < 0:
        return None
    rows, values, counts = (torch.cat(column) for column in zip(*kept, strict=True))
    return KeptCodes(rows, values, _starts(counts), len(counting.squares))


def _cut(where: slice, num_latents: int) -> Iterator[slice]:
    size = tokens_at_once(num_latents)
    for start in range(where.start, where.stop, size):
        yield slice(start, min(start + size, where.stop))


def _starts(counts: Tensor) -> Tensor:
    return (counts.cumsum(0) - counts).int()
