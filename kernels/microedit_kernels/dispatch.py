"""The one place that chooses who computes."""

from functools import cache

import torch


def uses_triton(device: torch.device) -> bool:
    """Whether tensors of that device go to the Triton kernels: on GPUs, AMD's too (`cuda`).

    Everywhere else plain torch computes; Triton's interpreter is for tests.
    """
    return device.type == "cuda"


@cache
def overlaps_launches() -> bool:
    """Whether a kernel can be set up while the one before it runs: NVIDIA's Hopper and later."""
    if torch.version.hip or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (9, 0)
