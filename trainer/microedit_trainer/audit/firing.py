"""Which rows of a change fire at some tokens, and how strongly."""

from dataclasses import dataclass

import torch
from torch import Tensor

from microedit_trainer.audit.explanation import Firing, Latent, Row, RowShare
from microedit_vllm.artifact import DecoderChange, EditOperator


@dataclass(frozen=True)
class ChangeAtTokens:
    """One of the changes at some tokens.

    Attributes:
        change: the change on the operator's device.
        positions: the tokens, [T] int64.
        acts: h of the change's rows, summed over the tokens, [c] fp32; of the carried change times
            the tokens' weights.
        top_acts, top_indices: the tokens' top k latents, [T, k].
    """

    change: DecoderChange
    positions: Tensor
    acts: Tensor
    top_acts: Tensor
    top_indices: Tensor

    @classmethod
    def scoring(cls, operator: EditOperator, z: Tensor, positions: Tensor) -> "ChangeAtTokens":
        """The scoring change at these positions of z [P, d]."""
        acts = operator.scoring_acts(z[positions]).sum(0)
        return cls(operator.scoring, positions, acts, *operator.encode(z[positions]))

    @classmethod
    def edit(cls, operator: EditOperator, z: Tensor, positions: Tensor) -> "ChangeAtTokens":
        """The edit change at these positions of z [P, d]."""
        acts = operator.edit_acts(z[positions]).sum(0)
        return cls(operator.edit, positions, acts, *operator.encode(z[positions]))

    @classmethod
    def carried(cls, operator: EditOperator, z: Tensor, positions: Tensor) -> "ChangeAtTokens":
        """The carried change at those of these positions of z [P, d] that have something to say."""
        weights = operator.carried_weights(z[positions])
        positions, weights = positions[weights > 0], weights[weights > 0]
        acts = (weights[:, None] * operator.carried_acts(z[positions])).sum(0)
        return cls(operator.carried, positions, acts, *operator.encode(z[positions]))

    @property
    def strengths(self) -> Tensor:
        """activation · ‖ΔW‖ of every row: [c] fp32."""
        return row_strengths(self.acts, self.change)

    def strongest_rows(self, count: int) -> Tensor:
        """The firing rows of the largest strength, at most `count`, as places in the change."""
        strengths = self.strengths
        order = strengths.argsort(descending=True, stable=True)[:count]
        return order[strengths[order] > 0]

    def describe(self, facts: list[tuple[RowShare, ...]], strongest: int) -> Firing:
        """As plain values.

        Args:
            facts: the facts behind each of the strongest rows, of so many.
            strongest: how many of the top k latents to name.
        """
        rows, strengths = self.strongest_rows(len(facts)), self.strengths
        total = float(strengths.sum())
        changed = torch.isin(self.top_indices, self.change.indices)
        latents = _summed_latents(self.top_acts, self.top_indices)
        own = set(self.change.indices.tolist())
        named = [Latent(latent, h, latent in own) for latent, h in latents.items()]
        return Firing(
            positions=tuple(self.positions.tolist()),
            rows_total=len(self.change.indices),
            rows_firing=int((self.acts > 0).sum()),
            latents=len(latents),
            changed_of_top_k=float(changed.sum()) / max(1, len(self.positions)),
            strongest=tuple(sorted(named, key=lambda latent: -latent.activation)[:strongest]),
            rows=tuple(
                Row(
                    latent=int(self.change.indices[row]),
                    activation=float(self.acts[row]),
                    strength=float(strengths[row]),
                    share=float(strengths[row]) / total,
                    facts=behind,
                )
                for row, behind in zip(rows.tolist(), facts, strict=True)
            ),
        )


@dataclass(frozen=True)
class FiredChanges:
    """What an edit set's changes do on one prompt; the carried one may have no rows."""

    scoring: ChangeAtTokens
    edit: ChangeAtTokens
    carried: ChangeAtTokens

    @property
    def all(self) -> tuple[ChangeAtTokens, ...]:
        return self.scoring, self.edit, self.carried


def row_strengths(acts: Tensor, change: DecoderChange) -> Tensor:
    """activation · ‖ΔW‖: [..., c] → [..., c] fp32."""
    return acts * change.values.float().norm(dim=-1)


def _summed_latents(top_acts: Tensor, top_indices: Tensor) -> dict[int, float]:
    """Latents that fire with Σ h; a top k may hold zeros, which do not fire."""
    latents, places = top_indices.unique(return_inverse=True)
    sums = torch.zeros(len(latents), device=top_acts.device)
    sums.index_add_(0, places.flatten(), top_acts.flatten())
    return {i: s for i, s in zip(latents.tolist(), sums.tolist(), strict=True) if s > 0}
