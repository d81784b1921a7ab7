"""Top-k encode in plain torch (Eq. 7): h = TopK(ReLU(z·W_enc + b_enc))."""

import torch
from torch import Tensor
from torch.nn.functional import linear, relu


def pre_acts(z: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Pre-activations z·W_enc + b_enc, accumulated in fp32.

    Args:
        z: residual stream, [..., d], any float dtype.
        W_enc: encoder, one row per latent as sparsify stores it, [n, d].
        b_enc: encoder bias, [n].
        b_dec: subtracted from z first where the SAE was trained so (sparsify, SAE Lens), [d].

    Returns:
        [..., n], fp32.
    """
    z = z.float()
    if b_dec is not None:
        z = z - b_dec.float()
    return linear(z, W_enc.float(), b_enc.float())


def input_norm(z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """How SAEs that normalise their input do so: z becomes (z − shift)·scale.

    Args:
        z: [..., d].
        kind: "rms", to the norm √d (SAE Lens `constant_norm_rescale`), or "layer", to mean 0 and
            deviation 1 (SAE Lens `layer_norm`).

    Returns:
        scale and shift per token, two [...] fp32.
    """
    z = z.float()
    if kind == "rms":
        return z.shape[-1] ** 0.5 / z.norm(dim=-1), torch.zeros_like(z[..., 0])
    return 1 / (z.std(dim=-1) + 1e-5), z.mean(-1)


def folded_bias(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
    """b_enc − W_enc·b_dec, [n] fp32: the bias of z·W_enc where b_dec is subtracted from z."""
    if b_dec is None:
        return b_enc.float()
    return (b_enc.double() - W_enc.double() @ b_dec.double()).float()


def select_topk(acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, ties to the lower index, NaN ranked highest as torch does.

    Differentiable in `acts`. The result is that of a stable descending sort: values in
    descending order, equal values in ascending order of index.

    Args:
        acts: [..., n], k ≤ n.

    Returns:
        top_acts [..., k] in the dtype of `acts`, top_indices [..., k] int64.
    """
    with torch.no_grad():
        rows = acts.detach().reshape(-1, acts.shape[-1])
        # The two select the same: sorting ties is the faster one on a CPU, but it reads a device
        # tensor to find them.
        chosen = _by_sorting_ties(rows, k) if rows.device.type == "cpu" else topk_by_key(rows, k)
        indices = chosen.view(*acts.shape[:-1], k)
    return acts.gather(-1, indices), indices


def _by_sorting_ties(rows: Tensor, k: int) -> Tensor:
    values, indices = rows.topk(k, dim=-1)
    # torch.topk promises nothing on ties: rows where the k-th value also occurs outside the chosen
    # set (or is NaN) are sorted in full. Counted from below, since a NaN is below nothing.
    ambiguous = (rows < values[:, -1:]).sum(-1) != rows.shape[-1] - k
    if bool(ambiguous.any()):
        order = rows[ambiguous].sort(dim=-1, descending=True, stable=True).indices
        indices[ambiguous] = order[:, :k]
    indices = indices.sort(dim=-1).values
    order = rows.gather(-1, indices).sort(dim=-1, descending=True, stable=True).indices
    return indices.gather(-1, order)


def topk_by_key(rows: Tensor, k: int) -> Tensor:
    """Indices of `select_topk` without reading a value back to the host: [R, n] → [R, k] int64.

    Value and index become one integer that orders as (value, lower index first), so that no two
    are equal and `torch.topk` has no choice.
    """
    # −0.0 and 0.0 are equal: adding 0.0 makes them the same bits.
    values = rows.float() + 0.0
    bits = values.view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = torch.where(values.isnan(), 0x7FFFFFFF, bits)
    last = rows.shape[-1] - 1
    ranks = torch.arange(last, -1, -1, device=rows.device)
    keys = (bits.long() << 32) | ranks
    return last - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def topk_encode(
    z: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 7 with ReLU before the selection (sparsify's order).

    Returns:
        top_acts [..., k] fp32 and ≥ 0, top_indices [..., k] int64 (see `select_topk`).
    """
    return select_topk(relu(pre_acts(z, W_enc, b_enc, b_dec)), k)
