"""Sparse decode in Triton: what the top k make of a row, scored or put in its place.

A row's d columns are split over programs. Each gathers the k base rows once, and the changed rows
among them once more (ẑ = ẑ₀ + δ); a row with no changed latent among its top k skips that.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from microedit_kernels.sparse_decode.launch import DecodeConfig, decode_config


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    acts,
    indices,
    row_map,
    W_dec,
    values,
    columns,
    inside,
    k,
    d,
    BASE: tl.constexpr,
    KU: tl.constexpr,
    BD: tl.constexpr,
):
    """Σ h_i·W_dec[i] and δ = Σ h_i·ΔW_dec[i] over the given columns: two [BD] fp32.

    Indices below 0 are left out, and so is the first sum where not BASE. Summed over the top k at
    the end only, so that its parts stay with the warps that gather them.
    """
    base = tl.zeros((KU, BD), tl.float32)
    delta = tl.zeros((KU, BD), tl.float32)
    at = tl.arange(0, KU)
    for start in range(0, k, KU):
        index = tl.load(indices + start + at, mask=start + at < k, other=-1)
        act = tl.load(acts + start + at, mask=index >= 0, other=0.0)
        place = tl.load(row_map + index, mask=index >= 0, other=-1)
        if BASE:
            row = tl.load(
                W_dec + tl.maximum(index, 0).to(tl.int64)[:, None] * d + columns[None, :],
                mask=(index >= 0)[:, None] & inside[None, :],
                other=0.0,
            )
            base += row.to(tl.float32) * act[:, None]
        # Nothing is read for a latent that is not changed.
        change = tl.load(
            values + tl.maximum(place, 0).to(tl.int64)[:, None] * d + columns[None, :],
            mask=(place >= 0)[:, None] & inside[None, :],
            other=0.0,
        )
        delta += change.to(tl.float32) * tl.where(place >= 0, act, 0.0)[:, None]
    return tl.sum(base, 0), tl.sum(delta, 0)


@triton.jit
def _sum_of_splits(partial, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    # Another program wrote them: past this one's L1.
    return tl.sum(tl.load(partial + tl.arange(0, SPLITS), cache_modifier=".cg"))


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    z,
    hidden_states,
    rows,
    count,
    top_acts,
    top_indices,
    W_dec,
    b_dec,
    row_map,
    values,
    dist,
    dist0,
    counts,
    slots,
    parts,
    delta_parts,
    partial,
    arrived,
    max_norm,
    k,
    d,
    z_stride,
    hidden_stride,
    SCORE: tl.constexpr,
    REPLACE: tl.constexpr,
    DELTA: tl.constexpr,
    ALONE: tl.constexpr,
    SPLITS: tl.constexpr,
    BD: tl.constexpr,
    KU: tl.constexpr,
):
    r = tl.program_id(0)
    split = tl.program_id(1)
    if r < tl.load(count):
        row = tl.load(rows + r).to(tl.int64)
        columns = split * BD + tl.arange(0, BD)
        inside = columns < d
        acts = top_acts + r.to(tl.int64) * k
        indices = top_indices + r.to(tl.int64) * k
        z_hat0, delta = _gather(
            acts, indices, row_map, W_dec, values, columns, inside, k, d, not DELTA, KU, BD
        )
        z_here = tl.load(z + row * z_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if DELTA:
            at = hidden_states + row * hidden_stride + columns
            hidden = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            tl.store(at, (hidden + delta).to(hidden_states.dtype.element_ty), mask=inside)
        else:
            if SCORE or REPLACE:
                z_hat0 += tl.load(b_dec + columns, mask=inside, other=0.0).to(tl.float32)
            if REPLACE:
                at = hidden_states + row * hidden_stride + columns
                target = z_hat0 + delta
                if not ALONE:
                    hidden = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                    target = hidden + (target - z_here)
                tl.store(at, target.to(hidden_states.dtype.element_ty), mask=inside)
            elif SCORE:
                off0 = tl.where(inside, z_hat0 - z_here, 0.0)
                off = tl.where(inside, (z_hat0 + delta) - z_here, 0.0)
                mine = partial + r.to(tl.int64) * 3 * SPLITS
                tl.store(mine + split, tl.sum(off * off))
                tl.store(mine + SPLITS + split, tl.sum(off0 * off0))
                tl.store(mine + 2 * SPLITS + split, tl.sum(z_here * z_here))
                # Every thread's store comes before the arrival is made known.
                tl.debug_barrier()
                if tl.atomic_add(arrived + r, 1, sem="acq_rel") == SPLITS - 1:
                    tl.store(arrived + r, 0)
                    slot = tl.load(slots + r).to(tl.int64)
                    tl.store(dist + slot, _sum_of_splits(mine, SPLITS))
                    tl.store(dist0 + slot, _sum_of_splits(mine + SPLITS, SPLITS))
                    norm = tl.sqrt(_sum_of_splits(mine + 2 * SPLITS, SPLITS))
                    tl.store(counts + slot, (norm <= max_norm).to(tl.int8))
            else:
                out = parts + r.to(tl.int64) * d + columns
                tl.store(out, z_hat0, mask=inside)
                tl.store(delta_parts + r.to(tl.int64) * d + columns, delta, mask=inside)


@dataclass(frozen=True)
class DecodeScratch:
    """Buffers of `score`, made once.

    Attributes:
        partial: sums of each split of a row: dist, dist0, ‖z‖², [M, 3, splits] fp32.
        arrived: how many splits of a row are done, 0 between two launches, [M] int32.
    """

    partial: Tensor
    arrived: Tensor

    @classmethod
    def allocate(cls, max_rows: int, d: int, device: torch.device) -> "DecodeScratch":
        """For batches of up to `max_rows` rows."""
        splits = max(_splits(d, decode_config(rows)) for rows in (1, max_rows))
        return cls(
            torch.empty(max_rows, 3 * splits, device=device),
            torch.zeros(max_rows, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class Decoder:
    """A decoder and the changed rows of one edit set.

    Attributes:
        W_dec: [n, d]. b_dec: [d].
        row_map: place of each latent among the changed rows, −1 for the others, [n] int32.
        values: ΔW_dec of the changed rows, [c, d].
    """

    W_dec: Tensor
    b_dec: Tensor
    row_map: Tensor
    values: Tensor


def _splits(d: int, config: DecodeConfig) -> int:
    splits: int = triton.next_power_of_2(triton.cdiv(d, config.columns))
    return splits


def score(
    z: Tensor,
    rows: Tensor,
    count: Tensor,
    top_acts: Tensor,
    top_indices: Tensor,
    decoder: Decoder,
    slots: Tensor,
    dist: Tensor,
    dist0: Tensor,
    counts: Tensor,
    max_norm: float,
    scratch: DecodeScratch,
    config: DecodeConfig | None = None,
) -> None:
    """dist = ‖ẑ − z‖², dist0 = ‖ẑ₀ − z‖² (the summands of Eq. 13) of the active rows.

    Args:
        z: [M, d], rows contiguous.
        rows, count: active rows [≥ count] int32 and their number [1] int32, on the device.
        top_acts, top_indices: of the active rows, [M, k] (see `topk_encode`).
        slots: where the results of each active row go, [≥ count] int32 or int64.
        dist, dist0, counts: [slots], fp32, fp32 and bool; `counts` says whether ‖z‖ ≤ max_norm: a
            sink is not counted.
    """
    _launch(
        *(z, z, rows, count, top_acts, top_indices, decoder),
        *((dist, dist0, counts.view(torch.int8), slots), max_norm, scratch, None, config),
        SCORE=True,
    )


def substitute(
    hidden_states: Tensor,
    z: Tensor,
    rows: Tensor,
    count: Tensor,
    top_acts: Tensor,
    top_indices: Tensor,
    decoder: Decoder,
    placement: str,
    config: DecodeConfig | None = None,
) -> None:
    """Put ẑ ("replace") or z + δ ("delta") in place of z in the active rows, and in no other.

    hidden_states takes the whole change: z is hidden_states plus a residual that stays as it is.

    Args:
        hidden_states: [M, d], changed in place.
        z: [M, d], read only; hidden_states itself where there is no residual.
        others: see `score`.
    """
    alone = z.data_ptr() == hidden_states.data_ptr()
    _launch(
        *(z, hidden_states, rows, count, top_acts, top_indices, decoder),
        *(None, 0.0, None, None, config),
        REPLACE=placement == "replace",
        DELTA=placement == "delta",
        ALONE=alone,
    )


def decode_parts(
    z: Tensor,
    rows: Tensor,
    count: Tensor,
    top_acts: Tensor,
    top_indices: Tensor,
    decoder: Decoder,
    parts: Tensor,
    config: DecodeConfig | None = None,
) -> None:
    """A tensor-parallel shard's sums, to be added over the ranks.

    Args:
        top_indices: into this shard; below 0 for a latent of another.
        parts: Σ h_i·W_dec[i] without b_dec, and δ, [2, M, d] fp32, written for active rows.
        others: see `score`.
    """
    _launch(
        *(z, z, rows, count, top_acts, top_indices, decoder, None, 0.0, None, parts, config),
    )


def _launch(
    z: Tensor,
    hidden_states: Tensor,
    rows: Tensor,
    count: Tensor,
    top_acts: Tensor,
    top_indices: Tensor,
    decoder: Decoder,
    state: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    max_norm: float,
    scratch: DecodeScratch | None,
    parts: Tensor | None,
    config: DecodeConfig | None,
    SCORE: bool = False,
    REPLACE: bool = False,
    DELTA: bool = False,
    ALONE: bool = False,
) -> None:
    M, k = top_indices.shape
    d = decoder.W_dec.shape[1]
    chosen = config or decode_config(M)
    splits = _splits(d, chosen)
    # A pointer that a mode does not use may be any.
    dist, dist0, counts, slots = state or (top_acts, top_acts, rows, rows)
    partial, arrived = (scratch.partial, scratch.arrived) if scratch else (top_acts, rows)
    base, delta = (top_acts, top_acts) if parts is None else (parts[0], parts[1])
    _decode[(M, splits)](
        *(z, hidden_states, rows, count, top_acts, top_indices, decoder.W_dec, decoder.b_dec),
        *(decoder.row_map, decoder.values, dist, dist0, counts, slots),
        *(base, delta, partial, arrived, max_norm, k, d),
        *(z.stride(0), hidden_states.stride(0)),
        SCORE=SCORE,
        REPLACE=REPLACE,
        DELTA=DELTA,
        ALONE=ALONE,
        SPLITS=splits,
        BD=chosen.columns,
        KU=chosen.latents,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
