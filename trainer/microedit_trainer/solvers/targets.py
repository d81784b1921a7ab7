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
    z = torch.nn.utils.rnn.pad_sequence([p.z for p in prompts], batch_first=True)
    rows, positions, wanted = _answer_positions(prompts)
    rows, positions, wanted = (t.to(z.device) for t in (rows, positions, wanted))
    norms = z[rows, positions].float().norm(dim=-1, keepdim=True)
    delta = torch.zeros(len(rows), z.shape[-1], device=z.device, requires_grad=True)
    optimizer = torch.optim.Adam(
        [delta], lr=settings.lr / math.sqrt(z.shape[-1]), betas=(0.9, 0.99)
    )
    for _ in range(settings.steps):
        # One rounding to the stream's dtype after the fp32 sum, as the server does it.
        changed = (z[rows, positions].float() + delta * norms).to(z.dtype)
        hidden = lm.upper(z.index_put((rows, positions), changed), layer)
        losses = F.cross_entropy(lm.logits(hidden[rows, positions]), wanted, reduction="none")
        loss = losses[losses > settings.learnt].sum() + settings.penalty * delta.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = (delta * norms).detach()
    return list(found.split([len(p.tokens.answer_ids) + 1 for p in prompts]))


def _answer_positions(prompts: Sequence[StoredPrompt]) -> tuple[Tensor, Tensor, Tensor]:
    """Row in the batch, position, and wanted next token of every edited token: three [N]."""
    rows, positions = [], []
    for row, prompt in enumerate(prompts):
        where = range(prompt.edited.start, prompt.edited.stop)
        rows += [row] * len(where)
        positions += list(where)
    wanted = torch.cat([p.answer_with_end for p in prompts])
    return torch.tensor(rows), torch.tensor(positions), wanted
