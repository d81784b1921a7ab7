"""A published SAE in our runtime form: h = TopK(ReLU((z − b_dec)·W_encᵀ + b_enc)).

What folds in exactly: a constant scale of the input, an encoder that does not subtract b_dec, and
a ranking by h·‖W_dec[i]‖. A ReLU does not change when its latents' norms move from the decoder to
the encoder, so there the imposed Top-k too ranks by what a latent adds to ẑ.
"""

import torch
from torch import Tensor

from microedit_trainer.sae_import.published import PublishedSae
from microedit_vllm.artifact.sae import SparseAutoencoder
from microedit_vllm.errors import MicroEditError

_ROWS_AT_ONCE = 8192


def fold(
    sae: PublishedSae, k: int | None = None, ignore_thresholds: bool = False
) -> tuple[SparseAutoencoder, list[str]]:
    """The SAE that computes what `sae` does, and notes on where the user asked for something else.

    Args:
        k: latents kept per token; a Top-k SAE brings its own.
        ignore_thresholds: put a Top-k in the place of a JumpReLU's thresholds.

    Raises:
        MicroEditError: no k, or a JumpReLU, which no ReLU and Top-k compute.
    """
    chosen, notes = _choose_k(sae, k, ignore_thresholds)
    if sae.scale_is_assumed:
        notes.append(
            f"one input scale of {sae.scale_in:.4g} for all tokens; it was published with each "
            "token scaled by its own norm"
        )
    W_enc, b_enc, W_dec = sae.W_enc.float(), _bias_on_z(sae), sae.W_dec.float()
    if sae.ranks_by_norm or sae.activation != "topk":
        norms = torch.cat([rows.double().norm(dim=-1) for rows in W_dec.split(_ROWS_AT_ONCE)])
        W_enc = W_enc * norms.float()[:, None]
        b_enc = b_enc * norms
        # A latent without a decoder row is never chosen now: its encoder row is 0 too.
        W_dec = W_dec / norms.where(norms > 0, 1).float()[:, None]
    b_dec = sae.b_dec.double() / sae.scale_out
    folded = SparseAutoencoder(
        W_enc=W_enc,
        b_enc=(b_enc + _product(W_enc, b_dec)).float(),
        W_dec=W_dec * (sae.scale_in / sae.scale_out),
        b_dec=b_dec.float(),
        k=chosen,
    )
    _check_finite(folded)
    return folded, notes


def _choose_k(sae: PublishedSae, k: int | None, ignore_thresholds: bool) -> tuple[int, list[str]]:
    notes = []
    if sae.activation == "jumprelu":
        notes = _without_thresholds(sae, ignore_thresholds)
    if sae.activation != "topk" and k is None:
        hint = f"it was trained with {sae.k}" if sae.k else "the paper takes 400 on Mistral-7B"
        raise MicroEditError(
            f"the SAE keeps no fixed number of latents; choose one by --k ({hint})"
        )
    chosen = sae.k if k is None else k
    n = sae.W_enc.shape[0]
    if chosen is None or not 1 <= chosen <= n:
        raise MicroEditError(f"k = {chosen} does not fit the SAE's {n:,} latents; choose by --k")
    if sae.activation == "topk" and chosen != sae.k:
        notes.append(f"k = {chosen} instead of the published {sae.k}")
    if sae.activation == "relu":
        notes.append(f"a Top-k of {chosen} imposed on a ReLU SAE")
    return chosen, notes


def _without_thresholds(sae: PublishedSae, ignore_thresholds: bool) -> list[str]:
    """Notes; thresholds of 0 or less leave a ReLU."""
    assert sae.threshold is not None
    positive = int((sae.threshold > 0).sum())
    if not positive:
        return []
    if not ignore_thresholds:
        raise MicroEditError(
            f"{positive:,} of {len(sae.threshold):,} latents jump at a threshold, which Top-k "
            "editing cannot represent; --ignore-thresholds with --k puts a Top-k in their place "
            "(then run `microedit sae check`)"
        )
    equal = "equal" if bool((sae.threshold == sae.threshold[0]).all()) else "unequal"
    return [
        f"a Top-k in the place of {positive:,} {equal} thresholds: the same only on tokens "
        "whose k largest latents all exceed theirs"
    ]


def _bias_on_z(sae: PublishedSae) -> Tensor:
    """The pre-activations' constant part in units of z, [n] fp64: W_enc·z + this is our scale."""
    bias = sae.b_enc.double()
    if sae.subtracts_b_dec:
        bias = bias - _product(sae.W_enc, sae.b_dec.double())
    return bias / sae.scale_in


def _product(W: Tensor, vector: Tensor) -> Tensor:
    """W·vector in fp64, [n], without a copy of W in fp64."""
    return torch.cat([rows.double() @ vector for rows in W.split(_ROWS_AT_ONCE)])


def _check_finite(sae: SparseAutoencoder) -> None:
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        if not bool(getattr(sae, name).isfinite().all()):
            raise MicroEditError(
                f"{name} overflows when the SAE's scales are folded in; its config or weights "
                "are damaged"
            )
