"""The edit sets of a batch laid end to end, and how their latents are cut into programs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# A program's work: set, its latents [first, end), the first one's place within the set, which part
# of the set this is and of how many.
WORK_COLUMNS = 6
# Columns of ΔW_edit that lie side by side in memory, latent after latent.
VALUE_COLUMNS = 32
# The second product's steps divide it.
_MOST_STEP = 128
# Where there is no device to ask: an H100's.
_MULTIPROCESSORS = 132
# Latents of an even tile at the least: with fewer it would read more of z than of the weights.
_FEWEST = 16
_EVEN_SPLITS = 4


class EditRows(NamedTuple):
    """The latents C of one edit set, |C| = c.

    W_enc: their encoder rows, [c, d].
    b_enc: their encoder bias, [c].
    b_dec: subtracted from z first where the SAE was trained so, [d].
    values: ΔW_edit, [c, d].
    theta: latents count above max(θ, 0).
    """

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor | None
    values: Tensor
    theta: float


@dataclass(frozen=True)
class GroupedSets:
    """S edit sets with C latents in all; set s owns the latents starts[s] : starts[s + 1].

    W_enc: encoder rows, [C, d].
    bias: b_enc − W_enc·b_dec, [C] fp32: what z·W_enc lacks to be the pre-activation.
    values: ΔW_edit, [⌈d / 32⌉, C, 32]: a program reads its columns of one latent after another
        from one stretch of memory. Zeros fill up the last columns.
    theta: [S] fp32.
    sizes: latents of each set.
    tile, part: latents of one program of the first and of the second product, at most.
    step: what the second product reads at once divides it; parts begin at its multiples.
    tiles, parts: their work, [programs, 6] int32, see `WORK_COLUMNS`.
    even_tile, even_tiles, even_parts: as those without "even", but about as many as the device has
        multiprocessors, so that all of them read an equal share; for batches so small that reading
        is all there is to do.
    even_splits: programs that share an even tile's d, where such tiles are too few.
    shares, even_shares: parts that a set is cut into, at most.
    """

    W_enc: Tensor
    bias: Tensor
    values: Tensor
    theta: Tensor
    sizes: tuple[int, ...]
    tile: int
    part: int
    step: int
    tiles: Tensor
    parts: Tensor
    even_tile: int
    even_tiles: Tensor
    even_splits: int
    even_parts: Tensor
    shares: int
    even_shares: int

    @property
    def d(self) -> int:
        return self.W_enc.shape[1]

    @property
    def max_latents(self) -> int:
        """Latents of the largest set."""
        return max(self.sizes, default=0)

    @property
    def max_tiles(self) -> int:
        """Programs of the first product, however it is cut."""
        return max(len(self.tiles), len(self.even_tiles))

    @property
    def max_shares(self) -> int:
        """Parts that a set is cut into, however that is done."""
        return max(self.shares, self.even_shares)

    @property
    def max_parts(self) -> int:
        """Programs of the second product that share its columns, however it is cut."""
        return max(len(self.parts), len(self.even_parts))

    def changes(self, latents: slice) -> Tensor:
        """ΔW_edit of these latents as it was given, [latents, d]."""
        return self.values[:, latents].transpose(0, 1).flatten(1)[:, : self.d]

    @classmethod
    def join(
        cls,
        sets: Sequence[EditRows],
        tile: int = 64,
        part: int = 2560,
        multiprocessors: int | None = None,
    ) -> "GroupedSets":
        """Copy `sets`, of one d, dtypes and device, into one.

        Args:
            sets: at least one; a set may have no latents.
            tile: a power of two, at least 16.
            part: a multiple of `tile`. A set is cut into the fewest parts of about equal size.
            multiprocessors: to share the latents of `even_tiles`; the device's when None.

        Raises:
            ValueError: no set, sets that don't fit each other, or a cut that is none of the above.
        """
        _check(sets, tile, part)
        device, d = sets[0].W_enc.device, sets[0].W_enc.shape[1]
        sizes = tuple(len(rows.W_enc) for rows in sets)
        programs = multiprocessors or _multiprocessors(device)
        share = -(-sum(sizes) // programs)
        even_tile = _even_tile(share, tile)
        step = math.gcd(part, _MOST_STEP)
        parts = _work(sizes, [_even(size, -(-size // part), step) for size in sizes])
        most = programs // -(-d // VALUE_COLUMNS)
        even_parts = _work(sizes, [_even(size, most, step) for size in sizes])
        return cls(
            W_enc=torch.cat([rows.W_enc for rows in sets]).contiguous(),
            bias=torch.cat([_folded_bias(rows) for rows in sets]),
            values=_side_by_side([rows.values for rows in sets]),
            theta=torch.tensor([rows.theta for rows in sets], dtype=torch.float32, device=device),
            sizes=sizes,
            tile=tile,
            part=part,
            step=step,
            tiles=_work(sizes, [tile] * len(sizes)).to(device),
            parts=parts.to(device),
            even_tile=even_tile,
            even_tiles=_work(sizes, [even_tile] * len(sizes)).to(device),
            even_splits=1 if share > _FEWEST else _EVEN_SPLITS,
            even_parts=even_parts.to(device),
            shares=max(parts[:, 5].tolist(), default=0),
            even_shares=max(even_parts[:, 5].tolist(), default=0),
        )


def _check(sets: Sequence[EditRows], tile: int, part: int) -> None:
    if not sets:
        raise ValueError("no edit set to join")
    if tile < 16 or tile & (tile - 1) or part < tile or part % tile:
        raise ValueError(f"tile {tile} is no power of two from 16, or part {part} no multiple")
    first = sets[0]
    d, kinds = first.W_enc.shape[1], (first.W_enc.dtype, first.values.dtype)
    for number, rows in enumerate(sets):
        shape = (len(rows.W_enc), d)
        if rows.W_enc.shape != shape or rows.values.shape != shape:
            raise ValueError(f"set {number}: W_enc and values are not both [c, {d}]")
        if rows.b_enc.shape != shape[:1]:
            raise ValueError(f"set {number}: b_enc is not [{shape[0]}]")
        if rows.b_dec is not None and rows.b_dec.shape != (d,):
            raise ValueError(f"set {number}: b_dec is not [{d}]")
        if (rows.W_enc.dtype, rows.values.dtype) != kinds:
            raise ValueError(f"set {number}: its dtypes are not those of the first set")


def _folded_bias(rows: EditRows) -> Tensor:
    bias = rows.b_enc.float()
    return bias if rows.b_dec is None else bias - rows.W_enc.float() @ rows.b_dec.float()


def _side_by_side(values: Sequence[Tensor]) -> Tensor:
    """[⌈d / 32⌉, C, 32] of ΔW_edit."""
    joined = torch.cat(tuple(values))
    fill = -joined.shape[1] % VALUE_COLUMNS
    padded = torch.nn.functional.pad(joined, (0, fill))
    return padded.unflatten(1, (-1, VALUE_COLUMNS)).transpose(0, 1).contiguous()


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts


def _even(size: int, parts: int, multiple: int) -> int:
    """The length of so many parts of about equal size."""
    return max(multiple, -(-size // (max(1, parts) * multiple)) * multiple)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _even_tile(share: int, tile: int) -> int:
    """Latents of a program whose share is that many: an even number, for its stores."""
    return min(max(-(-share // 2) * 2, _FEWEST), tile)


def _work(sizes: Sequence[int], lengths: Sequence[int]) -> Tensor:
    work = []
    for number, (start, size, length) in enumerate(
        zip(_starts(sizes)[:-1], sizes, lengths, strict=True)
    ):
        count = -(-size // length)
        for index in range(count):
            place = index * length
            end = start + min(place + length, size)
            work.append((number, start + place, end, place, index, count))
    return torch.tensor(work, dtype=torch.int32).reshape(-1, WORK_COLUMNS)
