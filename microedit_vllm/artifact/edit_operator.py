"""What an edit set computes: distances, ARD, the switch and the edited residual, in plain torch."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from microedit_kernels.carried_change import carried_change, carried_weights
from microedit_kernels.edit_change import edit_change, threshold_acts
from microedit_kernels.sparse_decode import decode, decode_change, row_map, squared_distance
from microedit_kernels.switch import decide, smallest_runs
from microedit_kernels.topk_encode import pre_acts
from microedit_vllm.artifact.edit_set import DecoderChange, EditSet, Golden
from microedit_vllm.artifact.sae import SparseAutoencoder
from microedit_vllm.errors import MicroEditError


@dataclass(frozen=True)
class EditOperator:
    """An edit set and its SAE, ready to compute with on one device (plain-torch path).

    Attributes:
        scoring, edit: the set's changes on the SAE's device; on the CPU in fp32, which is what
            they are computed with (6 bytes a value with the set's own 2).
        scoring_rows, edit_rows: their row maps, [n] int64.
        carried, carried_rows: the same of the carried change; c = 0 where the set has none.
        edit_W_enc, edit_b_enc: encoder rows of the edit change, [c, d] and [c]; none, c = 0, where
            its latents are among the top k.
    """

    edit_set: EditSet
    sae: SparseAutoencoder
    scoring: DecoderChange
    edit: DecoderChange
    scoring_rows: Tensor
    edit_rows: Tensor
    carried: DecoderChange
    carried_rows: Tensor
    edit_W_enc: Tensor
    edit_b_enc: Tensor

    @classmethod
    def build(cls, edit_set: EditSet, sae: SparseAutoencoder) -> "EditOperator":
        """Move everything to the SAE's device and make the row maps."""
        device = sae.W_enc.device
        scoring = _to_compute(edit_set.scoring, device)
        edit = scoring if edit_set.is_shared else _to_compute(edit_set.edit, device)
        nothing = DecoderChange(edit.indices[:0], edit.values[:0])
        carried = (edit_set.carried or nothing).to(device)
        # In fp32 everywhere: else each decision would convert all of it.
        carried = DecoderChange(carried.indices, carried.values.float())
        by_threshold = edit_set.manifest.activation == "threshold"
        encoder_rows = edit.indices if by_threshold else edit.indices[:0]
        return cls(
            edit_set,
            sae,
            scoring,
            edit,
            row_map(scoring.indices, sae.num_latents),
            row_map(edit.indices, sae.num_latents),
            carried,
            row_map(carried.indices, sae.num_latents),
            # The encoder rows of the edit change, gathered once: a step must not copy them again.
            sae.W_enc[encoder_rows],
            sae.b_enc[encoder_rows],
        )

    @property
    def device(self) -> torch.device:
        return self.sae.W_enc.device

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 7: [..., d] → top_acts [..., k] fp32, top_indices [..., k] int64."""
        return self.sae.encode(z)

    def reconstruct(
        self, acts: Tensor, indices: Tensor, rows: Tensor, change: DecoderChange
    ) -> tuple[Tensor, Tensor]:
        """ẑ₀ (Eq. 8) and δ of a change, each [..., d] fp32; `rows` is the change's row map."""
        z_hat0 = decode(acts, indices, self.sae.W_dec, self.sae.b_dec)
        return z_hat0, decode_change(acts, indices, rows, change.values)

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over the ranks that share the latents; here there is one."""
        return partial

    def threshold_change(self, z: Tensor) -> Tensor:
        """δ of the edit change by threshold: [..., d] → [..., d] fp32."""
        theta = self.edit_set.manifest.theta
        assert theta is not None
        return edit_change(
            z, self.edit_W_enc, self.edit_b_enc, self.sae.b_dec, self.edit.values, theta
        )

    def scoring_acts(self, z: Tensor) -> Tensor:
        """h of the scoring change's rows, 0 where a row is not in the top k: [..., d] → [..., c]
        fp32."""
        return self._acts_among_top(z, self.scoring_rows, len(self.scoring.indices))

    def edit_acts(self, z: Tensor) -> Tensor:
        """h of the edit change's rows, 0 where a row does not fire: [..., d] → [..., c] fp32."""
        theta = self.edit_set.manifest.theta
        if self.edit_set.manifest.activation == "topk":
            return self._acts_among_top(z, self.edit_rows, len(self.edit.indices))
        assert theta is not None
        pre = pre_acts(z, self.edit_W_enc, self.edit_b_enc, self.sae.b_dec)
        return threshold_acts(pre, theta)

    def carried_acts(self, z: Tensor) -> Tensor:
        """h of the carried change's rows, 0 where a row is not in the top k: [..., d] → [..., c]
        fp32."""
        return self._acts_among_top(z, self.carried_rows, len(self.carried.indices))

    def _acts_among_top(self, z: Tensor, rows: Tensor, count: int) -> Tensor:
        acts, indices = self.encode(z)
        # A place of its own, cut off again, for the rows that the change leaves alone.
        where = rows[indices]
        where = where.where(where >= 0, count)
        return acts.new_zeros(*acts.shape[:-1], count + 1).scatter(-1, where, acts)[..., :count]

    def distances(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """dist and dist0 of scored tokens, [..., d] → two [...] fp32.

        Where no changed row is active the two are bit-for-bit equal.
        """
        return self.distances_of(z, *self.encode(z))

    def distances_of(self, z: Tensor, acts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The same where the codes are known, [..., k] each."""
        z_hat0, delta = self.reconstruct(acts, indices, self.scoring_rows, self.scoring)
        return squared_distance(z_hat0 + delta, z), squared_distance(z_hat0, z)

    @property
    def carries(self) -> bool:
        """Whether the scored tokens carry a change to the decision position."""
        return len(self.carried.indices) > 0

    @property
    def codes(self) -> int:
        """Codes of a scored token that are needed when the decision is taken."""
        return self.sae.k if self.carries else 0

    def carried_change(self, acts: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """δ that sequences carry to their decision positions: [D, d] fp32.

        Args:
            acts, indices: codes of their scored tokens, [D, W, k].
            weights: see `carried_weights`, [D, W].
        """
        return carried_change(acts, indices, weights, self.carried_rows, self.carried.values)

    def carried_by(self, z: Tensor) -> Tensor:
        """The same for one sequence's scored tokens that all count: [S, d] → [d] fp32."""
        if not self.carries or not len(z):
            return z.new_zeros(z.shape[-1], dtype=torch.float)
        acts, indices = self.encode(z)
        weights = _weights(*self.distances_of(z, acts, indices))
        return self.carried_change(acts[None], indices[None], weights[None])[0]

    def carried_weights(self, z: Tensor) -> Tensor:
        """How much each of one sequence's scored tokens, all of which count, has to say of what
        they carry: [S, d] → [S] fp32; nothing in a set that carries nothing."""
        if not self.carries:
            return z.new_zeros(len(z), dtype=torch.float)
        return _weights(*self.distances(z))

    def ards(self, dist: Tensor, dist0: Tensor, counted: Tensor) -> Tensor:
        """The decision's statistic per sequence.

        Args:
            dist, dist0: distances of scored tokens in order of position, [D, W].
            counted: which of them are tokens to count, [D, W] bool.

        Returns:
            [D] fp32; +∞ where fewer tokens count than the decision asks for.
        """
        decision = self.edit_set.manifest.decision
        ards = smallest_runs(dist, self.weights(dist0), counted, decision.scope.run)
        return ards.where(counted.sum(-1) >= decision.min_tokens, torch.inf)

    def weights(self, dist0: Tensor) -> Tensor:
        """What a token's distance is measured by: dist0 itself, or α in its shape, fp32."""
        decision = self.edit_set.manifest.decision
        if decision.statistic == "relative":
            return dist0
        assert decision.alpha is not None
        return torch.full_like(dist0, decision.alpha)

    def run_ards(self, dist: Tensor, dist0: Tensor) -> Tensor:
        """The statistic of each run that `ard` takes the smallest of.

        Args:
            dist, dist0: distances of one sequence's scored tokens, two [S] with S > 0.

        Returns:
            [S − r + 1] fp32 for runs of r tokens; the i-th begins at the i-th scored token.
        """
        size = min(self.edit_set.manifest.decision.scope.run or len(dist), len(dist))
        runs, weights = dist.unfold(0, size, 1), self.weights(dist0).unfold(0, size, 1)
        return smallest_runs(runs, weights, torch.ones_like(runs, dtype=torch.bool), run=0)

    def ard(self, dist: Tensor, dist0: Tensor) -> Tensor:
        """`ards` of one sequence whose tokens all count: two [S] → scalar."""
        counted = torch.ones_like(dist, dtype=torch.bool)
        return self.ards(dist[None], dist0[None], counted[None])[0]

    def is_on(self, ard: Tensor) -> Tensor:
        """Eq. 14: the switch."""
        return decide(ard, self.edit_set.manifest.decision.tau)

    def edited(self, z: Tensor) -> Tensor:
        """What takes the place of z from the decision position on: [..., d] → [..., d] fp32."""
        manifest = self.edit_set.manifest
        if manifest.activation == "threshold":
            return z.float() + self.threshold_change(z)
        acts, indices = self.encode(z)
        z_hat0, delta = self.reconstruct(acts, indices, self.edit_rows, self.edit)
        return (z.float() if manifest.placement == "delta" else z_hat0) + delta

    def golden_of(self, z: Tensor) -> Golden:
        """What this operator makes of z [g, d]: the record that a server must reproduce."""
        z = z.float()
        acts, indices = self.encode(z)
        z_hat0, delta = self.reconstruct(acts, indices, self.scoring_rows, self.scoring)
        z_hat = z_hat0 + delta
        dist, dist0 = squared_distance(z_hat, z), squared_distance(z_hat0, z)
        carried = None
        if self.edit_set.carried is not None:
            alike = torch.full_like(dist, 1 / len(z))
            carried = self.carried_change(acts[None], indices[None], alike[None])[0]
        return Golden(z, indices, z_hat, dist, dist0, self.edited(z), carried)

    def check_golden(self, tolerance: float = 1e-2) -> None:
        """Recompute the golden activations.

        Raises:
            MicroEditError: they do not reproduce: this SAE is read in another way than it was
                trained (activation, normalisation, bias), or the weights are not the same.
        """
        stored = self.edit_set.golden
        found = self.golden_of(stored.z.to(self.sae.W_enc.device))
        for name in [n for n in stored.tensors if n not in ("z", "top_indices")]:
            want, have = stored.tensors[name], found.tensors[name].cpu()
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


def _weights(dist: Tensor, dist0: Tensor) -> Tensor:
    return carried_weights(dist, dist0, torch.ones_like(dist, dtype=torch.bool))


def _to_compute(change: DecoderChange, device: torch.device) -> DecoderChange:
    moved = change.to(device)
    if device.type != "cpu":
        return moved
    # Else each step would convert all of it.
    return DecoderChange(moved.indices, moved.values.float())


def _set_agreement(first: Tensor, second: Tensor) -> float:
    same = (first[:, :, None] == second[:, None, :]).any(-1)
    return float(same.float().mean()) if same.numel() else 1.0


def with_golden(draft: EditSet, sae: SparseAutoencoder, z: Tensor) -> EditSet:
    """The same set with golden activations of its own for the residuals z [g, d]."""
    golden = EditOperator.build(draft, sae).golden_of(z)
    on_cpu = Golden(**{name: tensor.cpu() for name, tensor in golden.tensors.items()})
    return replace(draft, golden=on_cpu)
