"""From a step's requests to the rows that need the SAE. Host numbers only; knows no vLLM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microedit_vllm.engine.request_plan import RequestPlan

Positions = npt.NDArray[np.int64]


@dataclass
class RequestState:
    """A request in the worker; lives as long as vLLM's own record of it.

    Attributes:
        plan: None where the request asks for no edits.
        on: the decision as the host last saw it, None when it has not. Only a shortcut: the
            decision itself lies at the KV slot of token e.
    """

    request_id: str
    plan: RequestPlan | None
    on: bool | None = None


@dataclass(frozen=True)
class StepRequest:
    """One request's share of a step.

    Attributes:
        first_row: its first row in the batch's hidden states; row i of the share is the token at
            position `first_position` + i.
        slots: KV slots of given positions, [P] → [P].
    """

    state: RequestState
    first_row: int
    num_rows: int
    first_position: int
    slots: Callable[[Positions], Positions]


@dataclass(frozen=True)
class DecisionPlan:
    """The decision of one request whose token e is in this step.

    window_slots: KV slots of its scored tokens in order of position, [W] int64.
    """

    state: RequestState
    window_slots: Tensor
    slot: int


@dataclass(frozen=True)
class StepPlan:
    """The rows of one step that need the SAE.

    Attributes:
        scored_rows, scored_slots: rows to score, and where their distances go, two [S] int64.
        decisions: requests to decide, after the scoring.
        edited_rows, decision_slots: rows at or behind e, and the slot that holds their request's
            decision, two [R] int64.
    """

    scored_rows: Tensor
    scored_slots: Tensor
    decisions: list[DecisionPlan]
    edited_rows: Tensor
    decision_slots: Tensor


def plan_step(requests: Sequence[StepRequest], device: torch.device) -> StepPlan | None:
    """Plan a step; None when no row of it needs the SAE."""
    scored: list[tuple[Positions, Positions]] = []
    edited: list[tuple[Positions, Positions]] = []
    decisions: list[DecisionPlan] = []
    for request in requests:
        plan, first = request.state.plan, request.first_position
        if plan is None:
            continue
        end, shift = first + request.num_rows, request.first_row - first
        begin, stop = max(first, plan.scored_from), min(end, plan.scored_to)
        if begin < stop:
            positions = np.arange(begin, stop, dtype=np.int64)
            scored.append((positions + shift, request.slots(positions)))
        decides = first <= plan.edit_from < end
        if not decides and (end <= plan.edit_from or request.state.on is False):
            continue
        slot = int(request.slots(np.array([plan.edit_from], dtype=np.int64))[0])
        rows = np.arange(max(first, plan.edit_from), end, dtype=np.int64) + shift
        edited.append((rows, np.full_like(rows, slot)))
        if decides:
            window = np.arange(plan.scored_from, plan.scored_to, dtype=np.int64)
            slots = torch.from_numpy(request.slots(window)).to(device)
            decisions.append(DecisionPlan(request.state, slots, slot))
    if not scored and not edited:
        return None
    return StepPlan(*_columns(scored, device), decisions, *_columns(edited, device))


def _columns(
    parts: list[tuple[Positions, Positions]], device: torch.device
) -> tuple[Tensor, Tensor]:
    if not parts:
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return empty, empty
    rows, slots = (np.concatenate(column) for column in zip(*parts, strict=True))
    return torch.from_numpy(rows).to(device), torch.from_numpy(slots).to(device)
