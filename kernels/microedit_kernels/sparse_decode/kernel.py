"""Sparse decode in Triton: what the top k make of a row, scored or put in its place.

A row's d columns are split over programs. Each gathers the k base rows once, and the changed rows
among them once more (ẑ = ẑ₀ + δ); a row with no changed latent among its top k skips that.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from microedit_kernels.interpreting import rounded
from microedit_kernels.sparse_decode.launch import DecodeConfig, decode_config


@triton.jit
def _list_changed(  # type: ignore[no-untyped-def]
    count, top_acts, top_indices, row_map, acts, places, sizes, k, KP: tl.constexpr
):
    """Of each row's top k, those whose decoder row is changed, side by side."""
    r = tl.program_id(0)
    if r < tl.load(count):
        at = tl.arange(0, KP)
        source = r.to(tl.int64) * k + at
        index = tl.load(top_indices + source, mask=at < k, other=-1)
        act = tl.load(top_acts + source, mask=at < k, other=0.0)
        place = tl.load(row_map + index, mask=index >= 0, other=-1)
        changed = place >= 0
        to = r.to(tl.int64) * k + tl.cumsum(changed.to(tl.int32), 0) - 1
        tl.store(acts + to, act, mask=changed)
        tl.store(places + to, place, mask=changed)
        tl.store(sizes + r, tl.sum(changed.to(tl.int32)))


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    acts,
    places,
    weights,
    columns,
    inside,
    k,
    d,
    KU: tl.constexpr,
    BD: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Σ acts·weights[places] over the given columns, places below 0 left out: [BD] fp32.

    Each warp sums the rows that it gathers; the warps' sums are added at the end.
    """
    total = tl.zeros((WARPS, BD), tl.float32)
    at = tl.arange(0, KU)
    for start in range(0, k, KU):
        place = tl.load(places + start + at, mask=start + at < k, other=-1)
        act = tl.load(acts + start + at, mask=place >= 0, other=0.0)
        row = tl.load(
            weights + tl.maximum(place, 0).to(tl.int64)[:, None] * d + columns[None, :],
            mask=(place >= 0)[:, None] & inside[None, :],
            other=0.0,
        )
        part = row.to(tl.float32) * act[:, None]
        total += tl.sum(tl.reshape(part, (KU // WARPS, WARPS, BD)), 0)
    return tl.sum(total, 0)


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
    values,
    changed_acts,
    changed_places,
    sizes,
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
    WARPS: tl.constexpr,
):
    r = tl.program_id(0)
    split = tl.program_id(1)
    if r < tl.load(count):
        row = tl.load(rows + r).to(tl.int64)
        columns = split * BD + tl.arange(0, BD)
        inside = columns < d
        acts = top_acts + r.to(tl.int64) * k
        indices = top_indices + r.to(tl.int64) * k
        size = tl.load(sizes + r)
        delta = _gather(
            changed_acts + r.to(tl.int64) * k,
            changed_places + r.to(tl.int64) * k,
            values,
            columns,
            inside,
            size,
            d,
            KU,
            BD,
            WARPS,
        )
        z_here = tl.load(z + row * z_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if DELTA:
            at = hidden_states + row * hidden_stride + columns
            hidden = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            tl.store(at, rounded(hidden + delta, hidden_states.dtype.element_ty), mask=inside)
        else:
            z_hat0 = _gather(acts, indices, W_dec, columns, inside, k, d, KU, BD, WARPS)
            if SCORE or REPLACE:
                z_hat0 += tl.load(b_dec + columns, mask=inside, other=0.0).to(tl.float32)
            if REPLACE:
                at = hidden_states + row * hidden_stride + columns
                target = z_hat0 + delta
                if not ALONE:
                    hidden = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                    target = hidden + (target - z_here)
                tl.store(at, rounded(target, hidden_states.dtype.element_ty), mask=inside)
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
    """Buffers of the decode, made once.

    Attributes:
        changed_acts, changed_places: what of a row's top k is changed, [M, k] fp32 and int32.
        sizes: how many that are, [M] int32.
        partial: sums of each split of a row: dist, dist0, ‖z‖², [M, 3, splits] fp32.
        arrived: how many splits of a row are done, 0 between two launches, [M] int32.
    """

    changed_acts: Tensor
    changed_places: Tensor
    sizes: Tensor
    partial: Tensor
    arrived: Tensor

    @classmethod
    def allocate(cls, max_rows: int, d: int, k: int, device: torch.device) -> "DecodeScratch":
        """For batches of up to `max_rows` rows."""
        splits = max(_splits(d, decode_config(rows)) for rows in (1, max_rows))
        return cls(
            torch.empty(max_rows, k, device=device),
            torch.empty(max_rows, k, dtype=torch.int32, device=device),
            torch.empty(max_rows, dtype=torch.int32, device=device),
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
        *(scratch, (dist, dist0, counts.view(torch.int8), slots), max_norm, None, config),
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
    scratch: DecodeScratch,
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
        *(scratch, None, 0.0, None, config),
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
    scratch: DecodeScratch,
    config: DecodeConfig | None = None,
) -> None:
    """A tensor-parallel shard's sums, to be added over the ranks.

    Args:
        top_indices: into this shard; below 0 for a latent of another.
        parts: Σ h_i·W_dec[i] without b_dec, and δ, [2, M, d] fp32, written for active rows.
        others: see `score`.
    """
    _launch(
        *(z, z, rows, count, top_acts, top_indices, decoder, scratch, None, 0.0, parts, config),
    )


def _launch(
    z: Tensor,
    hidden_states: Tensor,
    rows: Tensor,
    count: Tensor,
    top_acts: Tensor,
    top_indices: Tensor,
    decoder: Decoder,
    scratch: DecodeScratch,
    state: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    max_norm: float,
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
    base, delta = (top_acts, top_acts) if parts is None else (parts[0], parts[1])
    changed = (scratch.changed_acts, scratch.changed_places, scratch.sizes)
    _list_changed[(M,)](
        *(count, top_acts, top_indices, decoder.row_map, *changed, k),
        KP=triton.next_power_of_2(k),
        num_warps=2,
    )
    _decode[(M, splits)](
        *(z, hidden_states, rows, count, top_acts, top_indices, decoder.W_dec, decoder.b_dec),
        *(decoder.values, *changed, dist, dist0, counts, slots),
        *(base, delta, scratch.partial, scratch.arrived, max_norm, k, d),
        *(z.stride(0), hidden_states.stride(0)),
        SCORE=SCORE,
        REPLACE=REPLACE,
        DELTA=DELTA,
        ALONE=ALONE,
        SPLITS=splits,
        BD=chosen.columns,
        # Few latents of a row are changed.
        KU=max(chosen.latents // 2, chosen.warps) if DELTA else chosen.latents,
        WARPS=chosen.warps,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
