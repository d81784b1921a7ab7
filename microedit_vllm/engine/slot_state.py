"""What outlives a step: distances and decisions by KV slot."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlotState:
    """Device tensors beside the KV cache, sized once.

    Attributes:
        dist, dist0: squared distances of the token in a slot, [slots] fp32.
        counts: whether it counts as scored (it is no sink), [slots] bool.
        on: decisions, at the slot of each request's token e, [slots + 1] bool; the last one is for
            rows without a request and always off.
    """

    dist: Tensor
    dist0: Tensor
    counts: Tensor
    on: Tensor

    @classmethod
    def allocate(cls, num_slots: int, device: torch.device) -> "SlotState":
        return cls(
            torch.zeros(num_slots, device=device),
            torch.zeros(num_slots, device=device),
            torch.zeros(num_slots, dtype=torch.bool, device=device),
            torch.zeros(num_slots + 1, dtype=torch.bool, device=device),
        )
