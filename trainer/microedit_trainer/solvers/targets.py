"""Per-fact targets: the residual change that makes the model answer with the fact.

For each prompt a δ* at the tokens e, e+1, … (the last prompt token and the answer), found by Adam
with the model frozen. Prompts are independent of each other and run in batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from microedit_trainer.language_model import LanguageModel
from microedit_trainer.stored_residuals import StoredPrompt
from microedit_trainer.upper_tails import upper_tails

# Steps for which a batch that has learnt everything takes the penalty alone, without the model: it
# stays learnt for many more.
_REST = 3


@dataclass(frozen=True)
class TargetSettings:
    """How targets are sought.

    Attributes:
        steps: Adam steps.
        lr: step size for δ in units of each token's norm, per √d.
        penalty: weight of ‖δ‖² in units of the token's norm.
        learnt: cross-entropy below which an answer token is left alone.
        batch: prompts solved together.
    """

    steps: int = 30
    lr: float = 0.08
    penalty: float = 2.0
    learnt: float = 0.1
    batch: int = 16


def solve_targets(
    lm: LanguageModel, layer: int, prompts: Sequence[StoredPrompt], settings: TargetSettings
) -> list[Tensor]:
    """δ* of one batch of prompts.

    Returns:
        per prompt [A + 1, d] fp32, the change of z at the positions in `StoredPrompt.edited`.
    """
    z = torch.cat([p.z[p.edited] for p in prompts])
    wanted = torch.cat([p.answer_with_end for p in prompts]).to(z.device)
    starts = [p.edited.start for p in prompts]
    upper = upper_tails(lm, layer, [p.z for p in prompts], starts)
    norms = z.float().norm(dim=-1, keepdim=True)
    delta = torch.zeros(z.shape, device=z.device, requires_grad=True)
    optimizer = torch.optim.Adam(
        [delta], lr=settings.lr / math.sqrt(z.shape[-1]), betas=(0.9, 0.99)
    )
    rest = 0
    for _ in range(settings.steps):
        loss = settings.penalty * delta.square().sum()
        if rest > 0:
            rest -= 1
        else:
            # One rounding to the stream's dtype after the fp32 sum, as the server does it.
            hidden = upper((z.float() + delta * norms).to(z.dtype))
            losses = F.cross_entropy(lm.logits(hidden), wanted, reduction="none")
            unlearnt = losses > settings.learnt
            if bool(unlearnt.any()):
                loss = loss + losses[unlearnt].sum()
            else:
                rest = _REST
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = (delta * norms).detach()
    return list(found.split([len(p.tokens.answer_ids) + 1 for p in prompts]))
