"""Row plan in plain torch: from each row's position to a compact list of active rows."""

import torch
from torch import Tensor

OFF = 0
SCORED = 1
SUBSTITUTED = 2


def row_states(
    positions: Tensor, scored_from: Tensor, scored_to: Tensor, edit_from: Tensor
) -> Tensor:
    """State of each row of a step, before the switch is known.

    Args:
        positions: position of each row in its sequence, [M] int64.
        scored_from, scored_to: each row's sequence scores positions in [from, to), [M] int64;
            an empty span for a sequence without edits.
        edit_from: the sequence's decision position e, [M] int64; beyond every position for a
            sequence without edits.

    Returns:
        [M] int8 of OFF, SCORED, SUBSTITUTED (the last where the switch turns out to be on).
    """
    scored = (positions >= scored_from) & (positions < scored_to)
    state = torch.where(scored, SCORED, OFF)
    return torch.where(positions >= edit_from, SUBSTITUTED, state).to(torch.int8)


def group_rows(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """The rows that need work, grouped by key, ascending within a key.

    Args:
        keys: [M] int32, e.g. the edit set that a row is on with; −1 for a row that needs no work.
        num_keys: keys are below it.

    Returns:
        rows [active] int32, and offsets [num_keys + 1] int32: key s has rows[offsets[s] :
        offsets[s + 1]].
    """
    order = keys.sort(stable=True).indices
    rows = order[(keys < 0).sum() :].int()
    ends = (keys[:, None] <= torch.arange(-1, num_keys, device=keys.device)).sum(0)
    return rows, (ends - (keys < 0).sum()).int()
