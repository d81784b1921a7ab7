"""Tensor parallel: the SAE's latents split over the ranks.

Each rank encodes with its share of the latents and offers its best k; all ranks choose the same k
of all candidates, and each decodes the chosen ones that are its own. The set is that of one
process; the sums differ by rounding.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group

from microedit_kernels.topk_encode import select_topk, topk_encode
from microedit_vllm.artifact import DecoderChange, EditOperator
from microedit_vllm.config import ServingConfig


def load_operator(setting: ServingConfig, device: torch.device) -> EditOperator:
    """Read the edit set and its SAE for this rank, and prove them on golden activations.

    Raises:
        MicroEditError: see `ServingConfig.load`.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return setting.load(device)
    operator = ShardedOperator.shard(setting.load(), group, device)
    operator.check_golden()
    return operator


@dataclass(frozen=True)
class ShardedOperator(EditOperator):
    """One rank's share of an edit set and its SAE; every method is called by all ranks at once.

    Attributes:
        first: the share's first latent.
        group: vLLM's tensor-parallel group (`vllm/distributed/parallel_state.py`).
    """

    first: int
    group: Any

    @classmethod
    def shard(cls, whole: EditOperator, group: Any, device: torch.device) -> "ShardedOperator":
        """The share of this rank, on `device`; shares differ by one latent at most."""
        sae, size = whole.sae, group.world_size
        first, last = (
            sae.num_latents * r // size for r in (group.rank_in_group, group.rank_in_group + 1)
        )
        share = replace(
            sae,
            W_enc=sae.W_enc[first:last],
            b_enc=sae.b_enc[first:last],
            W_dec=sae.W_dec[first:last],
        ).to(device)
        edit_set = whole.edit_set
        scoring = _change(edit_set.scoring, first, last)
        edit = scoring if edit_set.is_shared else _change(edit_set.edit, first, last)
        carried = edit_set.carried and _change(edit_set.carried, first, last)
        parts = replace(edit_set, scoring=scoring, edit=edit, carried=carried)
        local = EditOperator.build(parts, share)
        return cls(**{**vars(local), "edit_set": edit_set}, first=first, group=group)

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """See `EditOperator.encode`; the indices are those of the whole SAE."""
        sae, rows = self.sae, z.reshape(-1, z.shape[-1])
        own = min(sae.k, sae.num_latents)
        acts, indices = topk_encode(rows, sae.W_enc, sae.b_enc, own, sae.b_dec)
        # A share with fewer than k latents fills up with what is never chosen: acts are ≥ 0.
        offer = rows.new_full((2, len(rows), sae.k), -1.0, dtype=torch.float)
        offer[0, :, :own] = acts
        # Exact in fp32: n is far below 2²⁴.
        offer[1, :, :own] = (indices + self.first).float()
        offers = self.group.all_gather(offer, dim=-1)
        # Of equal candidates the lower place is the lower index: shares and their offers ascend.
        top_acts, places = select_topk(offers[0], sae.k)
        top_indices = offers[1].gather(-1, places).long()
        shape = (*z.shape[:-1], sae.k)
        return top_acts.view(shape), top_indices.view(shape)

    def reconstruct(
        self, acts: Tensor, indices: Tensor, rows: Tensor, change: DecoderChange
    ) -> tuple[Tensor, Tensor]:
        """See `EditOperator.reconstruct`; each rank sums its own latents."""
        z_hat0, delta = super().reconstruct(*self._own(acts, indices), rows, change)
        parts = torch.stack([z_hat0 - self.sae.b_dec.float(), delta])
        z_hat0, delta = self.all_reduce(parts).unbind(0)
        return z_hat0 + self.sae.b_dec.float(), delta

    def _own(self, acts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Codes with this share's indices; 0 for latents of other shares."""
        local = indices - self.first
        mine = (local >= 0) & (local < self.sae.num_latents)
        return acts.where(mine, 0.0), local.where(mine, 0)

    @property
    def carries(self) -> bool:
        """Of the whole set: a share may have no row of it and has to take part all the same."""
        return self.edit_set.carried is not None

    def carried_change(self, acts: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """See `EditOperator.carried_change`."""
        return self.all_reduce(super().carried_change(*self._own(acts, indices), weights))

    def threshold_change(self, z: Tensor) -> Tensor:
        """See `EditOperator.threshold_change`."""
        return self.all_reduce(super().threshold_change(z))

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over the ranks."""
        return self.group.all_reduce(partial)

    def is_on(self, ard: Tensor) -> Tensor:
        """The first rank decides: sums that differ in a bit must not part the ranks."""
        on = super().is_on(ard).to(torch.uint8)
        return self.group.broadcast(on, src=0).bool()


def _change(change: DecoderChange, first: int, last: int) -> DecoderChange:
    mine = (change.indices >= first) & (change.indices < last)
    return DecoderChange(change.indices[mine] - first, change.values[mine])
