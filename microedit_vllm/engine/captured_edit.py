"""The substitution as a full CUDA graph holds it.

A graph replays the very kernels that were recorded, on the very addresses. So here every row of
the batch is computed, whether it is on or not, into buffers that are there from the start: fixed
addresses, no shape that depends on a value, no allocation, nothing read back. Only rows that are
on are changed. Scoring and deciding never run in a full graph (`RunnerAdapter.attach`).
"""

import torch
from torch import Tensor

from microedit_vllm.artifact import EditOperator
from microedit_vllm.engine.step_plan import StepPlan
from microedit_vllm.engine.triton_edit import TritonEdit


class CapturedEdit:
    """The edit change by threshold into buffers that are there.

    Args:
        how: the kernels, or the operator to compute with in torch.
        on: decisions by KV slot, the last entry always off, [slots + 1] bool.
        max_rows: rows of the largest graph.
        max_tokens: rows of the largest step.
        dtype: of the residual stream.
    """

    def __init__(
        self,
        how: TritonEdit | EditOperator,
        on: Tensor,
        max_rows: int,
        max_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        self._edit = how if isinstance(how, TritonEdit) else _TorchBuffers(how, max_rows, dtype)
        self._on = on
        self._nobody = len(on) - 1
        self._slots = torch.full((max_tokens,), self._nobody, device=on.device)
        self._is_on = torch.empty(max_rows, dtype=torch.bool, device=on.device)

    def set_rows(self, plan: StepPlan | None) -> None:
        """Tell the next replay which decision each row follows."""
        self._slots.fill_(self._nobody)
        if plan is not None:
            self._slots[plan.edited_rows] = plan.decision_slots

    def apply(self, hidden_states: Tensor, z: Tensor | None) -> None:
        """Substitute in place, in every row whose decision is on; arguments [M, d] as ever."""
        rows = len(hidden_states)
        is_on = self._is_on[:rows]
        torch.index_select(self._on, 0, self._slots[:rows], out=is_on)
        self._edit.add_where(hidden_states, z, is_on)


class _TorchBuffers:
    """`microedit_kernels.edit_change` in torch, every operation into a buffer."""

    def __init__(self, operator: EditOperator, max_rows: int, dtype: torch.dtype) -> None:
        theta = operator.edit_set.manifest.theta
        assert theta is not None
        device, d = operator.sae.W_enc.device, operator.sae.d_in
        self._operator = operator
        self._theta = max(theta, 0.0)
        self._W_enc = operator.edit_W_enc.float().T.contiguous()
        self._b_enc = operator.edit_b_enc.float()
        self._b_dec = operator.sae.b_dec.float()
        self._values = operator.edit.values.float()
        self._stream = torch.empty(max_rows, d, dtype=dtype, device=device)
        self._wide = torch.empty(max_rows, d, device=device)
        self._work = torch.empty(max_rows, d, device=device)
        self._acts = torch.empty(max_rows, len(self._values), device=device)

    def add_where(self, hidden_states: Tensor, z: Tensor | None, is_on: Tensor) -> None:
        """See `TritonEdit.add_where`."""
        rows = slice(len(hidden_states))
        stream, wide, work, acts = (
            buffer[rows] for buffer in (self._stream, self._wide, self._work, self._acts)
        )
        wide.copy_(hidden_states if z is None else z)
        torch.sub(wide, self._b_dec, out=work)
        torch.mm(work, self._W_enc, out=acts)
        torch.threshold_(acts.add_(self._b_enc), self._theta, 0.0)
        torch.mm(acts, self._values, out=work)
        wide.copy_(hidden_states)
        stream.copy_(wide.add_(self._operator.all_reduce(work)))
        torch.where(is_on.view(-1, 1), stream, hidden_states, out=hidden_states)
