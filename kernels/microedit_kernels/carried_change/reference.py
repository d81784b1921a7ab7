"""The carried change in plain torch; on a GPU it is one `embedding_bag` over the window's codes.

A token's residual at the decision position does not say which fact "X's greatest strength is" is
about; the tokens of X do, and the scoring change tells which those are: it reconstructs them.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def carried_weights(dist: Tensor, dist0: Tensor, counted: Tensor) -> Tensor:
    """How much each scored token has to say: (1 − dist/dist0)² where that is reconstructed better
    than by the unedited decoder, 0 elsewhere; over a sequence the weights add up to 1.

    Squared, so that many tokens which are hardly better than before do not drown the few that are.

    Args:
        dist, dist0: squared distances ‖ẑ − z‖² and ‖ẑ₀ − z‖² of scored tokens, [..., W] fp32.
        counted: which of them count, [..., W] bool.

    Returns:
        [..., W] fp32; all 0 for a sequence in which no token is reconstructed better.
    """
    tiny = torch.finfo(torch.float).tiny
    gain = 1 - dist.float() / dist0.float().clamp(min=tiny)
    gain = gain.clamp(min=0.0).square().where(counted, 0.0)
    # In order, so that places behind a sequence's own do not change how it is rounded.
    return gain / gain.cumsum(-1)[..., -1:].clamp(min=tiny)


def carried_change(
    top_acts: Tensor, top_indices: Tensor, weights: Tensor, rows: Tensor, values: Tensor
) -> Tensor:
    """δ = Σ_s w_s·Σ_{i∈I_k(s)} h_si·ΔW[i] over the changed rows.

    Each sequence is summed on its own, in order of position and then of its latents: neither other
    sequences nor places with weight 0 behind its own change a bit.

    Args:
        top_acts, top_indices: Top-k codes of each sequence's scored tokens, [D, W, k].
        weights: w, [D, W] fp32 (see `carried_weights`).
        rows: the row map of the change, [n] (see `sparse_decode.row_map`).
        values: ΔW of the changed rows, [c, d].

    Returns:
        [D, d] fp32.
    """
    if not len(values):
        return weights.new_zeros(len(weights), values.shape[1])
    where = rows[top_indices.long()]
    acts = (top_acts.float() * weights[..., None]).where(where >= 0, 0.0)
    return embedding_bag(
        where.clamp(min=0).flatten(1),
        values.float(),
        per_sample_weights=acts.flatten(1),
        mode="sum",
    )
