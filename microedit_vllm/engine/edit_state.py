"""Distances and decisions beside the KV cache, and what happens to a step's residuals.

Everything that outlives a step is a device tensor indexed by KV slot, sized once: whatever vLLM
does with a request (cut its prompt into chunks, preempt it, compute it again), the state is where
the KV is. Nothing is read back to the host within a step.
"""

import torch
from torch import Tensor

from microedit_kernels.switch import apply_replace
from microedit_vllm.artifact import EditOperator
from microedit_vllm.engine.captured_edit import CapturedEdit
from microedit_vllm.engine.decision_log import DecisionFeedback, DecisionRecords
from microedit_vllm.engine.records import external_id
from microedit_vllm.engine.step_plan import StepPlan


class EditState:
    """The edit set on one worker, with its state per KV slot.

    Args:
        operator: on the worker's device.
        num_slots: slots of the KV cache group that the state follows.
        in_step: whether other ranks must do the same in the same step.
    """

    # What full CUDA graphs hold; None where there are none.
    captured: CapturedEdit | None = None

    def __init__(self, operator: EditOperator, num_slots: int, in_step: bool = False) -> None:
        self.device = operator.sae.W_enc.device
        self.operator = operator
        self.plan: StepPlan | None = None
        self.dist = torch.zeros(num_slots, device=self.device)
        self.dist0 = torch.zeros(num_slots, device=self.device)
        self.counts = torch.zeros(num_slots, dtype=torch.bool, device=self.device)
        # One more for rows without a request: always off.
        self.on = torch.zeros(num_slots + 1, dtype=torch.bool, device=self.device)
        self.records = DecisionRecords(self.device)
        # On the CPU a decision is known in its own step, on every rank.
        at_once = self.device.type == "cpu" or not in_step
        self.feedback = DecisionFeedback(self.device, tell_states=at_once)

    def prepare_capture(self, max_rows: int, max_tokens: int, dtype: torch.dtype) -> None:
        """Make the buffers of full CUDA graphs, before any is captured; see `CapturedEdit`."""
        self.captured = CapturedEdit(self.operator, self.on, max_rows, max_tokens, dtype)

    def begin_step(self, plan: StepPlan | None) -> None:
        """Set what `apply` and a replayed graph will do in the step to come."""
        self.plan = plan
        if self.captured is not None:
            self.captured.set_rows(plan)

    def end_step(self) -> None:
        """Forget the plan: what runs between two steps (warm-up, drafts) is left alone."""
        self.plan = None

    def apply(self, hidden_states: Tensor, z: Tensor | None) -> None:
        """Score, decide and substitute the step's rows.

        Args:
            hidden_states: layer l's output, [M, d], changed in place; rows that are off keep their
                bits.
            z: the residual stream, [M, d], not written to; None where it is hidden_states.
        """
        plan = self.plan
        if plan is None:
            return
        if len(plan.scored_rows):
            self._score(plan, (hidden_states if z is None else z)[plan.scored_rows])
        if plan.deciding:
            self._decide(plan)
        if len(plan.edited_rows):
            self._substitute(plan, hidden_states, z)

    def _score(self, plan: StepPlan, z: Tensor) -> None:
        max_norm = self.operator.edit_set.manifest.decision.max_norm
        dist, dist0 = self.operator.distances(z)
        self.dist[plan.scored_slots] = dist
        self.dist0[plan.scored_slots] = dist0
        self.counts[plan.scored_slots] = z.float().norm(dim=-1) <= max_norm

    def _decide(self, plan: StepPlan) -> None:
        window = plan.window_slots
        counted = self.counts[window] & plan.in_window
        ards = self.operator.ards(self.dist[window], self.dist0[window], counted)
        on = self.operator.is_on(ards)
        self.on[plan.decide_slots] = on
        self.records.write([external_id(state.request_id) for state in plan.deciding], ards, on)
        self.feedback.decided(plan.deciding, on)

    def _substitute(self, plan: StepPlan, hidden_states: Tensor, z: Tensor | None) -> None:
        rows, on = plan.edited_rows, self.on[plan.decision_slots]
        if self.device.type == "cpu":
            # Looking costs nothing here; on a device it would stall the step.
            rows, on = rows[on], on[on]
            if not len(rows):
                return
        target = self.operator.edited((hidden_states if z is None else z)[rows])
        if z is not None:
            # The residual is out of reach (`layer_patch`), so its share comes off.
            target = hidden_states[rows] + (target - z[rows])
        apply_replace(hidden_states, None, rows, target, on)
