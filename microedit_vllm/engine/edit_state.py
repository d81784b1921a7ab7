"""Distances and decisions beside the KV cache, and what happens to a step's residuals.

Everything that outlives a step is a device tensor indexed by KV slot, sized once: whatever vLLM
does with a request (cut its prompt into chunks, preempt it, compute it again), the state is where
the KV is.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor

from microedit_kernels.switch import apply_replace
from microedit_vllm.artifact import EditOperator
from microedit_vllm.engine.step_plan import DecisionPlan, StepPlan

RECORDS = 4096


class EditState:
    """The edit set on one worker, with its state per KV slot.

    Args:
        operator: on the worker's device.
        num_slots: slots of the KV cache group that the state follows.
    """

    def __init__(self, operator: EditOperator, num_slots: int) -> None:
        device = operator.sae.W_enc.device
        self.operator = operator
        self.dist = torch.zeros(num_slots, device=device)
        self.dist0 = torch.zeros(num_slots, device=device)
        self.counts = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.on = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.records = DecisionRecords(device)

    def apply(self, plan: StepPlan, hidden_states: Tensor, residual: Tensor | None) -> None:
        """Score, decide and substitute one step's rows, in place.

        Args:
            hidden_states, residual: layer l's output, [M, d]; z is their sum, or hidden_states
                alone where `residual` is None. Rows that are off are not written to.
        """
        if len(plan.scored_rows):
            self._score(plan, _stream(hidden_states, residual, plan.scored_rows))
        for decision in plan.decisions:
            self._decide(decision)
        if not len(plan.edited_rows):
            return
        rows = plan.edited_rows[self.on[plan.decision_slots]]
        if len(rows):
            z = _stream(hidden_states, residual, rows)
            apply_replace(hidden_states, residual, rows, self.operator.edited(z))

    def _score(self, plan: StepPlan, z: Tensor) -> None:
        max_norm = self.operator.edit_set.manifest.decision.max_norm
        dist, dist0 = self.operator.distances(z)
        self.dist[plan.scored_slots] = dist
        self.dist0[plan.scored_slots] = dist0
        self.counts[plan.scored_slots] = z.float().norm(dim=-1) <= max_norm

    def _decide(self, decision: DecisionPlan) -> None:
        window = decision.window_slots[self.counts[decision.window_slots]]
        ard = self.operator.ard(self.dist[window], self.dist0[window])
        on = self.operator.is_on(ard)
        self.on[decision.slot] = on
        self.records.write(decision.state.request_id, ard, on)
        # On the CPU the answer is at hand; elsewhere reading it would stall the step.
        if on.device.type == "cpu":
            decision.state.on = bool(on)


class DecisionRecords:
    """The last decisions by request id, in a ring on the device that is read only when asked."""

    def __init__(self, device: torch.device, capacity: int = RECORDS) -> None:
        self._ard = torch.zeros(capacity, device=device)
        self._on = torch.zeros(capacity, dtype=torch.bool, device=device)
        self._owners: list[str | None] = [None] * capacity
        self._places: OrderedDict[str, int | None] = OrderedDict()
        self._next = 0

    def write(self, request_id: str, ard: Tensor, on: Tensor) -> None:
        """Keep a request's ARD and decision (scalars), in the place of the oldest when full."""
        place, self._next = self._next, (self._next + 1) % len(self._owners)
        owner = self._owners[place]
        if owner is not None and self._places.get(owner) == place:
            del self._places[owner]
        self._owners[place] = request_id
        self._ard[place] = ard
        self._on[place] = on
        self._keep(request_id, place)

    def write_off(self, request_id: str) -> None:
        """Keep that a request asked for no edits."""
        self._keep(request_id, None)

    def _keep(self, request_id: str, place: int | None) -> None:
        self._places[request_id] = place
        self._places.move_to_end(request_id)
        while len(self._places) > len(self._owners):
            self._places.popitem(last=False)

    def read(self, request_id: str) -> dict[str, float | bool | None] | None:
        """{"ard", "on"}; ard is None where nothing was scored. None for an unknown request."""
        if request_id not in self._places:
            return None
        place = self._places[request_id]
        if place is None:
            return {"ard": None, "on": False}
        ard = float(self._ard[place])
        return {"ard": ard if math.isfinite(ard) else None, "on": bool(self._on[place])}


def _stream(hidden_states: Tensor, residual: Tensor | None, rows: Tensor) -> Tensor:
    """z of the given rows in the stream's own dtype: [R, d]."""
    return hidden_states[rows] if residual is None else hidden_states[rows] + residual[rows]
