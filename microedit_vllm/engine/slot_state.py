"""What outlives a step: distances, codes and decisions by KV slot."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlotState:
    """Device tensors beside the KV cache, sized once.

    Attributes:
        dist, dist0: squared distances of the token in a slot, [slots] fp32.
        counts: whether it counts as scored (it is no sink), [slots] bool.
        acts, indices: its Top-k codes, [slots, k] fp32 and int32; k = 0 where nothing is carried.
        on: decisions, at the slot of each request's token e, [slots + 1] bool; the last one is for
            rows without a request and always off.
    """

    dist: Tensor
    dist0: Tensor
    counts: Tensor
    acts: Tensor
    indices: Tensor
    on: Tensor

    @classmethod
    def allocate(cls, num_slots: int, device: torch.device, codes: int = 0) -> "SlotState":
        """State of so many slots, with room for so many codes in each."""
        return cls(
            torch.zeros(num_slots, device=device),
            torch.zeros(num_slots, device=device),
            torch.zeros(num_slots, dtype=torch.bool, device=device),
            torch.zeros(num_slots, codes, device=device),
            torch.zeros(num_slots, codes, dtype=torch.int32, device=device),
            torch.zeros(num_slots + 1, dtype=torch.bool, device=device),
        )

    def keep_codes(self, slots: Tensor, acts: Tensor, indices: Tensor) -> None:
        """Remember the Top-k codes [S, k] of the tokens in some slots, [S] int64."""
        self.acts[slots] = acts
        self.indices[slots] = indices.int()
