"""Score, decide and substitute in plain torch: on the CPU, and for sharded latents."""

from torch import Tensor

from microedit_kernels.switch import apply_replace
from microedit_vllm.artifact import EditOperator
from microedit_vllm.engine.slot_state import SlotState


class TorchEdit:
    """The edit set over the state of one worker; `TritonEdit` does the same by kernels.

    Args:
        operator: whole or a share of it.
        slots: read and written.
    """

    def __init__(self, operator: EditOperator, slots: SlotState) -> None:
        self.operator = operator
        self._slots = slots
        # Looking at a decision costs nothing on the CPU; on a device it would stall the step.
        self.may_look = slots.on.device.type == "cpu"

    def score(self, z: Tensor, rows: Tensor, slots: Tensor) -> None:
        """Keep the distances of scored rows, and their codes where they carry a change.

        Args:
            z: the residual stream, [M, d].
            rows, slots: which rows, and where their distances go, two [S] int64.
        """
        scored = z[rows]
        acts, indices = self.operator.encode(scored)
        dist, dist0 = self.operator.distances_of(scored, acts, indices)
        if self.operator.carries:
            self._slots.keep_codes(slots, acts, indices)
        self._slots.dist[slots] = dist
        self._slots.dist0[slots] = dist0
        max_norm = self.operator.edit_set.manifest.decision.max_norm
        self._slots.counts[slots] = scored.float().norm(dim=-1) <= max_norm

    def decide(
        self, window_slots: Tensor, in_window: Tensor, decide_slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take and keep the decisions of sequences, from distances of this step and earlier ones.

        Args:
            window_slots, in_window: slots of the scored tokens in order of position, and which of
                them are tokens, [D, W] int64 and bool.
            decide_slots: where the decisions go, [D] int64.

        Returns:
            ARD [D] fp32 and on [D] bool.
        """
        slots = self._slots
        counted = slots.counts[window_slots] & in_window
        ards = self.operator.ards(slots.dist[window_slots], slots.dist0[window_slots], counted)
        on = self.operator.is_on(ards)
        slots.on[decide_slots] = on
        return ards, on

    def substitute(
        self, hidden_states: Tensor, z: Tensor | None, rows: Tensor, decision_slots: Tensor
    ) -> None:
        """Change the rows whose decision is on, and no other.

        Args:
            hidden_states: layer l's output, [M, d], changed in place.
            z: the residual stream, [M, d]; None where it is hidden_states.
            rows, decision_slots: rows to change, and the slots of their decisions, two [R] int64.
        """
        on = self._slots.on[decision_slots]
        if self.may_look:
            rows, on = rows[on], on[on]
            if not len(rows):
                return
        target = self.operator.edited((hidden_states if z is None else z)[rows])
        if z is not None:
            # The residual is out of reach (`layer_patch`), so its share comes off.
            target = hidden_states[rows] + (target - z[rows])
        apply_replace(hidden_states, None, rows, target, on)
