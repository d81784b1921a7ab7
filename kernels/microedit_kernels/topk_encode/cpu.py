"""The k largest on a CPU: groups first, then the latents of the groups that can hold them.

Of the exact ways that look at all rows at once it was the fastest (`benchmarks/cpu_topk.py`), and
no path depends on the values: a row with fewer than k positive latents, the rest of it one mass of
zeros, is no slower. A threshold with NumPy's compaction takes half the time on one thread, but goes
row by row on that one thread and cannot rank NaN; beside the encoder's product the difference is
small.
"""

import torch
from torch import Tensor

from microedit_kernels.topk_encode.by_key import KEYED, topk_by_key

# Latents of a group: what a vectorised maximum takes in at once.
GROUP = 32
# Groups must be many times k, or most of the row is looked at twice.
LEAST_LATENTS_PER_K = 64
# Below, the calls cost more than what they spare.
LEAST_ELEMENTS = 1 << 16


def topk_on_cpu(rows: Tensor, k: int) -> Tensor:
    """Indices of `select_topk`: rows [R, n] of any dtype, k ≤ n → [R, k] int64."""
    if rows.dtype not in KEYED:
        return rows.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    if rows.shape[-1] >= LEAST_LATENTS_PER_K * k and rows.numel() >= LEAST_ELEMENTS:
        return topk_by_group(rows, k)
    return topk_by_key(rows, k)


def topk_by_group(rows: Tensor, k: int) -> Tensor:
    """The same by way of the k groups of neighbouring latents with the largest maxima.

    Groups are ranked as latents are: by maximum, ties to the lower one. Each of k groups in front
    of a latent's own holds one that comes before it, so the k largest lie in the first k groups.
    """
    num_rows, n = rows.shape
    num_groups, rest = divmod(n, GROUP)
    whole = num_groups * GROUP
    members = rows[:, :whole].reshape(num_rows * num_groups, GROUP)
    maxima = members.amax(-1).view(num_rows, num_groups)
    # In order of index again, so that places among the candidates rank ties as indices do.
    groups = topk_by_key(maxima, min(k, num_groups)).sort(dim=-1).values
    first = torch.arange(num_rows)[:, None] * num_groups
    candidates = members.index_select(0, (groups + first).flatten())
    candidates = candidates.view(num_rows, groups.shape[-1] * GROUP)
    if rest:
        # The incomplete group behind the others is always looked at.
        candidates = torch.cat([candidates, rows[:, whole:]], dim=-1)
        groups = torch.cat([groups, groups.new_full((num_rows, 1), num_groups)], dim=-1)
    places = topk_by_key(candidates, k)
    return groups.gather(-1, places // GROUP) * GROUP + places % GROUP
