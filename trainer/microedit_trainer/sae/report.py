"""What a trained SAE is worth on text that it was not trained on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microedit_trainer.activations import Activations
from microedit_vllm.artifact.sae import SparseAutoencoder

_ELEMENTS_AT_ONCE = 1 << 23
_MOST_ROWS_FOR_DEAD = 200_000


@dataclass(frozen=True)
class Reconstruction:
    """Measured over some tokens.

    Attributes:
        tokens: how many.
        fvu: Σ‖ẑ − z‖² / Σ‖z − mean‖².
        mean_distance: ‖ẑ − z‖² per token, the unit of α in absolute ARD.
        active: [n] bool, latents that were active on some token.
        l0: latents active per token, in the mean; k where no token has fewer.
    """

    tokens: int
    fvu: float
    mean_distance: float
    active: Tensor
    l0: float

    @property
    def dead_share(self) -> float:
        return 1 - float(self.active.float().mean())


def measure(sae: SparseAutoencoder, rows: Tensor) -> Reconstruction:
    """Reconstruct rows [N, d], N ≥ 1, any dtype, with the SAE as it is served."""
    distance, variance, count = 0.0, 0.0, 0
    active = torch.zeros(sae.num_latents, dtype=torch.bool, device=sae.W_enc.device)
    parts = rows.split(max(1, _ELEMENTS_AT_ONCE // sae.num_latents))
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(rows)
    for part in parts:
        z = part.to(sae.W_enc.device).float()
        top_acts, top_indices = sae.encode(z)
        distance += float((sae.decode(top_acts, top_indices) - z).square().sum())
        variance += float((part.double() - mean).square().sum())
        active[top_indices[top_acts > 0]] = True
        count += int((top_acts > 0).sum())
    return Reconstruction(
        tokens=len(rows),
        fvu=distance / variance if variance else float("nan"),
        mean_distance=distance / len(rows),
        active=active.cpu(),
        l0=count / len(rows),
    )


def report_reconstruction(sae: SparseAutoencoder, activations: Activations) -> dict[str, Any]:
    """The part of an SAE's report that needs its weights.

    Returns:
        `sources`: per source its held-out tokens, FVU, dead share and mean distance; `fvu` and
        `mean_distance` over all held-out tokens; `dead_share`: latents active on no token at all.
    """
    sources: dict[str, dict[str, Any]] = {}
    held_out = []
    active = torch.zeros(sae.num_latents, dtype=torch.bool)
    for name in activations.names:
        indices = activations.held_out(name)
        if not len(indices):
            continue
        held_out.append(indices)
        found = measure(sae, activations.rows[indices])
        active |= found.active
        sources[name] = {
            "held_out_tokens": found.tokens,
            "fvu": found.fvu,
            "dead_share": found.dead_share,
            "mean_distance": found.mean_distance,
        }
    whole = measure(sae, activations.rows[torch.cat(held_out)])
    trained = measure(sae, activations.rows[activations.train[:_MOST_ROWS_FOR_DEAD]])
    return {
        "fvu": whole.fvu,
        "mean_distance": whole.mean_distance,
        "dead_share": 1 - float((active | trained.active).float().mean()),
        "sources": sources,
    }
