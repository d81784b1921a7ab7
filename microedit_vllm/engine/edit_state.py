"""Distances and decisions beside the KV cache, and what happens to a step's residuals.

Everything that outlives a step is a device tensor indexed by KV slot, sized once: whatever vLLM
does with a request (cut its prompt into chunks, preempt it, compute it again), the state is where
the KV is. Nothing is read back to the host within a step.
"""

import torch
from torch import Tensor

from microedit_kernels.carried_change import carried_weights
from microedit_vllm.artifact import EditOperator
from microedit_vllm.engine.captured_edit import CapturedEdit
from microedit_vllm.engine.decision_log import DecisionFeedback, DecisionRecords
from microedit_vllm.engine.records import external_id
from microedit_vllm.engine.slot_state import SlotState
from microedit_vllm.engine.step_plan import StepPlan
from microedit_vllm.engine.torch_edit import TorchEdit
from microedit_vllm.engine.triton_edit import TritonEdit


class EditState:
    """The edit set on one worker, with its state per KV slot.

    Args:
        how: the kernels, or the operator to compute with in torch; on the worker's device.
        num_slots: slots of the KV cache group that the state follows.
        in_step: whether other ranks must do the same in the same step.
    """

    # What full CUDA graphs hold; None where there are none.
    captured: CapturedEdit | None = None

    def __init__(
        self, how: EditOperator | TritonEdit, num_slots: int, in_step: bool = False
    ) -> None:
        self._how = how
        self.device = how.device
        self.plan: StepPlan | None = None
        self.slots = SlotState.allocate(num_slots, self.device, how.codes)
        self.edit: TorchEdit | TritonEdit
        if isinstance(how, TritonEdit):
            how.attach(self.slots)
            self.edit = how
        else:
            self.edit = TorchEdit(how, self.slots)
        self.records = DecisionRecords(self.device)
        # On the CPU a decision is known in its own step, on every rank.
        at_once = self.device.type == "cpu" or not in_step
        self.feedback = DecisionFeedback(self.device, tell_states=at_once)

    def prepare_capture(self, max_rows: int, max_tokens: int, dtype: torch.dtype) -> None:
        """Make the buffers of full CUDA graphs, before any is captured; see `CapturedEdit`."""
        self.captured = CapturedEdit(self._how, self.slots.on, max_rows, max_tokens, dtype)

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
            stream = hidden_states if z is None else z
            self.edit.score(stream, plan.scored_rows, plan.scored_slots)
        on = self._decide(plan) if plan.deciding else None
        if len(plan.edited_rows):
            self._substitute(plan, hidden_states, z)
        if on is not None and self._how.carries and plan.in_window.numel():
            self._carry(plan, hidden_states, on)

    def _decide(self, plan: StepPlan) -> Tensor:
        ards, on = self.edit.decide(plan.window_slots, plan.in_window, plan.decide_slots)
        self.records.write([external_id(state.request_id) for state in plan.deciding], ards, on)
        self.feedback.decided(plan.deciding, on)
        return on

    def _substitute(self, plan: StepPlan, hidden_states: Tensor, z: Tensor | None) -> None:
        self.edit.substitute(hidden_states, z, plan.edited_rows, plan.decision_slots)

    def _carry(self, plan: StepPlan, hidden_states: Tensor, on: Tensor) -> None:
        """Add what the scored tokens carry to token e of each sequence that is on, [D] bool."""
        if isinstance(self.edit, TorchEdit) and self.edit.may_look and not on.any():
            return
        state, window = self.slots, plan.window_slots
        counted = state.counts[window] & plan.in_window
        weights = carried_weights(state.dist[window], state.dist0[window], counted)
        delta = self._how.carried_change(state.acts[window], state.indices[window], weights)
        before = hidden_states[plan.decide_rows]
        after = (before.float() + delta).to(before.dtype)
        hidden_states[plan.decide_rows] = after.where(on[:, None], before)
