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
    # In parts: a whole encoder in fp64 is four times what it takes in 16 bits.
    products = [part.double() @ b_dec.double() for part in W_enc.split(4096)]
    return (b_enc.double() - torch.cat(products)).float()


def select_topk(acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row by a stable descending sort; see `selection.select_topk`."""
    indices = acts.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return acts.gather(-1, indices), indices


def topk_encode(
    z: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 7 with ReLU before the selection (sparsify's order).

    Returns:
        top_acts [..., k] fp32 and ≥ 0, top_indices [..., k] int64 (see `select_topk`).
    """
    return select_topk(relu(pre_acts(z, W_enc, b_enc, b_dec)), k)
