"""The one place that chooses who computes."""

import torch


def uses_triton(device: torch.device) -> bool:
    """Whether tensors of that device go to the Triton kernels: on GPUs, AMD's too (`cuda`).

    Everywhere else plain torch computes; Triton's interpreter is for tests.
    """
    return device.type == "cuda"
