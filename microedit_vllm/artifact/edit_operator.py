"""What an edit set computes: distances, ARD, the switch and the edited residual, in plain torch."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from microedit_kernels.edit_change import edit_change
from microedit_kernels.sparse_decode import decode, decode_change, row_map, token_distances
from microedit_kernels.switch import absolute_ard, decide, smallest_run
from microedit_vllm.artifact.edit_set import DecoderChange, EditSet, Golden
from microedit_vllm.artifact.sae import SparseAutoencoder
from microedit_vllm.errors import MicroEditError


@dataclass(frozen=True)
class EditOperator:
    """An edit set and its SAE, ready to compute with on one device (plain-torch path)."""

    edit_set: EditSet
    sae: SparseAutoencoder
    scoring: DecoderChange
    edit: DecoderChange
    scoring_rows: Tensor
    edit_rows: Tensor
    edit_W_enc: Tensor
    edit_b_enc: Tensor

    @classmethod
    def build(cls, edit_set: EditSet, sae: SparseAutoencoder) -> "EditOperator":
        """Move everything to the SAE's device and make the row maps."""
        device = sae.W_enc.device
        scoring, edit = edit_set.scoring.to(device), edit_set.edit.to(device)
        return cls(
            edit_set,
            sae,
            scoring,
            edit,
            row_map(scoring.indices, sae.num_latents),
            row_map(edit.indices, sae.num_latents),
            # The encoder rows of the edit change, gathered once: a step must not copy them again.
            sae.W_enc[edit.indices],
            sae.b_enc[edit.indices],
        )

    def distances(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """dist and dist0 of scored tokens, [..., d] → two [...] fp32."""
        acts, indices = self.sae.encode(z)
        return token_distances(
            z,
            acts,
            indices,
            self.sae.W_dec,
            self.sae.b_dec,
            self.scoring_rows,
            self.scoring.values,
        )

    def ard(self, dist: Tensor, dist0: Tensor) -> Tensor:
        """The decision's statistic over one sequence's scored tokens: two [S] → scalar."""
        decision = self.edit_set.manifest.decision
        if len(dist) < decision.min_tokens:
            return dist.new_full((), torch.inf)
        if decision.statistic == "relative":
            return smallest_run(dist, dist0, decision.scope.run)
        assert decision.alpha is not None
        if decision.scope.run == 0:
            return absolute_ard(dist, decision.alpha)
        return smallest_run(dist, torch.full_like(dist, decision.alpha), decision.scope.run)

    def is_on(self, ard: Tensor) -> Tensor:
        """Eq. 14: the switch."""
        return decide(ard, self.edit_set.manifest.decision.tau)

    def edited(self, z: Tensor) -> Tensor:
        """What takes the place of z from the decision position on: [..., d] → [..., d] fp32."""
        manifest, sae = self.edit_set.manifest, self.sae
        if manifest.activation == "threshold":
            assert manifest.theta is not None
            delta = edit_change(
                z, self.edit_W_enc, self.edit_b_enc, sae.b_dec, self.edit.values, manifest.theta
            )
            return z.float() + delta
        acts, indices = sae.encode(z)
        delta = decode_change(acts, indices, self.edit_rows, self.edit.values)
        if manifest.placement == "delta":
            return z.float() + delta
        return decode(acts, indices, sae.W_dec, sae.b_dec) + delta

    def golden_of(self, z: Tensor) -> Golden:
        """What this operator makes of z [g, d]: the record that a server must reproduce."""
        z = z.float()
        acts, indices = self.sae.encode(z)
        delta = decode_change(acts, indices, self.scoring_rows, self.scoring.values)
        dist, dist0 = self.distances(z)
        z_hat = self.sae.decode(acts, indices) + delta
        return Golden(z, indices, z_hat, dist, dist0, self.edited(z))

    def check_golden(self, tolerance: float = 1e-2) -> None:
        """Recompute the golden activations.

        Raises:
            MicroEditError: they do not reproduce: this SAE is read in another way than it was
                trained (activation, normalisation, bias), or the weights are not the same.
        """
        stored = self.edit_set.golden
        found = self.golden_of(stored.z.to(self.sae.W_enc.device))
        for name in ("z_hat", "dist", "dist0", "edited"):
            want, have = getattr(stored, name), getattr(found, name).cpu()
            error = float((have - want).norm() / want.norm().clamp(min=1e-6))
            if not error <= tolerance:
                raise MicroEditError(
                    f"golden activations do not reproduce: {name} is off by {error:.1%} "
                    f"(allowed {tolerance:.0%}); the SAE or the set was changed: make it again"
                )
        agree = _set_agreement(stored.top_indices, found.top_indices.cpu())
        if agree < 1 - tolerance:
            raise MicroEditError(
                f"golden activations do not reproduce: {agree:.1%} of the top latents agree; "
                "the SAE was changed: make the set again"
            )


def _set_agreement(first: Tensor, second: Tensor) -> float:
    same = (first[:, :, None] == second[:, None, :]).any(-1)
    return float(same.float().mean()) if same.numel() else 1.0


def with_golden(draft: EditSet, sae: SparseAutoencoder, z: Tensor) -> EditSet:
    """The same set with golden activations of its own for the residuals z [g, d]."""
    golden = EditOperator.build(draft, sae).golden_of(z)
    on_cpu = Golden(**{name: tensor.cpu() for name, tensor in vars(golden).items()})
    return replace(draft, golden=on_cpu)
