"""Score, decide and substitute by the Triton kernels, into buffers that are there from the start.

The kernels are imported when they are first used: nothing of Triton is needed on the CPU.
"""

from typing import Any

import torch
from torch import Tensor

from microedit_kernels.carried_change import carried_change
from microedit_kernels.topk_encode import folded_bias
from microedit_vllm.artifact import DecoderChange, EditOperator
from microedit_vllm.engine.slot_state import SlotState
from microedit_vllm.errors import MicroEditError

# Kernels sum in another order than torch, over weights rounded to the stream's dtype.
_TOLERANCE = 2e-2


class TritonEdit:
    """The edit set over the state of one worker; methods as those of `TorchEdit`.

    The SAE's weights are kept in the dtype of the residual stream, half of what they take in fp32,
    and nothing of the operator is kept.

    Made with the model, before vLLM measures what memory is left for the KV cache; `attach` gives
    it the state beside that cache.

    Args:
        operator: not sharded, on the worker's device.
        max_tokens: rows of the largest step.
        dtype: of the residual stream.

    Raises:
        MicroEditError: the kernels don't compute what torch computes on the golden activations.
    """

    _slots: SlotState

    def __init__(self, operator: EditOperator, max_tokens: int, dtype: torch.dtype) -> None:
        from microedit_kernels.sparse_decode.kernel import Decoder, DecodeScratch
        from microedit_kernels.topk_encode.kernel import EncodeScratch

        sae = operator.sae
        device, n, d, k = sae.W_enc.device, sae.num_latents, sae.d_in, sae.k
        manifest = operator.edit_set.manifest
        self.device, self._k = device, k
        self._decision, self._placement = manifest.decision, manifest.placement
        self._by_threshold = manifest.activation == "threshold"
        self._W_enc = sae.W_enc.to(dtype).contiguous()
        self._bias = folded_bias(self._W_enc, sae.b_enc, sae.b_dec)
        W_dec, b_dec = sae.W_dec.to(dtype).contiguous(), sae.b_dec.float()

        def decoder(change: DecoderChange, rows: Tensor) -> Any:
            return Decoder(W_dec, b_dec, rows.int(), change.values.to(dtype).contiguous())

        self._scoring = decoder(operator.scoring, operator.scoring_rows)
        self.carries = operator.carries
        self._carried_rows, self._carried_values = operator.carried_rows, operator.carried.values
        self._encode_scratch = EncodeScratch.allocate(max_tokens, n, k, device)
        self._decode_scratch = DecodeScratch.allocate(max_tokens, d, k, device)
        self._top_acts = torch.empty(max_tokens, k, device=device)
        self._top_indices = torch.empty(max_tokens, k, dtype=torch.int32, device=device)
        self._keys = torch.empty(max_tokens, dtype=torch.int32, device=device)
        self._rows = torch.empty(max_tokens, dtype=torch.int32, device=device)
        self._offsets = torch.zeros(2, dtype=torch.int32, device=device)
        self._count = torch.zeros(1, dtype=torch.int32, device=device)
        if self._by_threshold:
            self._prepare_edit_change(operator, max_tokens, dtype)
        else:
            self._edit = decoder(operator.edit, operator.edit_rows)
        self._check_golden(operator, dtype)

    def _prepare_edit_change(
        self, operator: EditOperator, max_tokens: int, dtype: torch.dtype
    ) -> None:
        from microedit_kernels.edit_change.grouped_sets import EditRows, GroupedSets
        from microedit_kernels.edit_change.scratch import EditChangeScratch

        theta = operator.edit_set.manifest.theta
        assert theta is not None
        rows = EditRows(
            self._W_enc[operator.edit.indices],
            operator.edit_b_enc,
            operator.sae.b_dec,
            operator.edit.values.to(dtype),
            theta,
        )
        self._sets = GroupedSets.join([rows])
        self._edit_scratch = EditChangeScratch.allocate(max_tokens, self._sets)

    @property
    def codes(self) -> int:
        """Codes of a token that its slot must hold."""
        return self._k if self.carries else 0

    def attach(self, slots: SlotState) -> None:
        """Read and write this state from now on."""
        self._slots = slots

    def score(self, z: Tensor, rows: Tensor, slots: Tensor) -> None:
        """See `TorchEdit.score`."""
        from microedit_kernels.sparse_decode.kernel import score

        rows, count = rows.int(), self._count.fill_(len(rows))
        acts, indices = self._encode(z, rows, count)
        state = self._slots
        score(
            *(z, rows, count, acts, indices, self._scoring),
            *(slots, state.dist, state.dist0, state.counts, self._decision.max_norm),
            self._decode_scratch,
        )
        if self.carries:
            state.keep_codes(slots, acts, indices)

    def carried_change(self, acts: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """See `EditOperator.carried_change`."""
        return carried_change(acts, indices, weights, self._carried_rows, self._carried_values)

    def _encode(self, z: Tensor, rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        from microedit_kernels.topk_encode.kernel import topk_encode

        # As many as there can be: the host knows no better.
        acts, indices = self._top_acts[: len(rows)], self._top_indices[: len(rows)]
        topk_encode(
            *(z, rows, count, self._W_enc, self._bias, self._k, acts, indices),
            self._encode_scratch,
        )
        return acts, indices

    def decide(
        self, window_slots: Tensor, in_window: Tensor, decide_slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `TorchEdit.decide`."""
        from microedit_kernels.switch.kernel import decide

        decision, state = self._decision, self._slots
        ards = torch.empty(len(window_slots), device=window_slots.device)
        decide(
            *(state.dist, state.dist0, state.counts, window_slots, in_window, decide_slots),
            *(ards, state.on, ards.new_empty(2 * max(window_slots.numel(), 1)), decision.tau),
            *(decision.scope.run, decision.min_tokens),
            alpha=decision.alpha if decision.statistic == "absolute" else None,
        )
        return ards, state.on[decide_slots]

    def substitute(
        self, hidden_states: Tensor, z: Tensor | None, rows: Tensor, decision_slots: Tensor
    ) -> None:
        """See `TorchEdit.substitute`."""
        keys = self._keys[: len(hidden_states)].fill_(-1)
        keys[rows] = self._slots.on[decision_slots].int() - 1
        self._substitute(hidden_states, z, keys, len(rows))

    def add_where(self, hidden_states: Tensor, z: Tensor | None, is_on: Tensor) -> None:
        """The edit change in every row that is on, within a CUDA graph.

        Args:
            hidden_states, z: see `TorchEdit.substitute`.
            is_on: [M] bool.
        """
        keys = self._keys[: len(is_on)]
        keys.copy_(is_on).sub_(1)
        self._substitute(hidden_states, z, keys, len(keys))

    def _substitute(self, hidden_states: Tensor, z: Tensor | None, keys: Tensor, most: int) -> None:
        from microedit_kernels.row_plan.kernel import group_rows

        rows, offsets = self._rows, self._offsets
        group_rows(keys, rows, offsets)
        stream = hidden_states if z is None else z
        if self._by_threshold:
            self._add_edit_change(hidden_states, stream, rows, offsets, most)
        else:
            from microedit_kernels.sparse_decode.kernel import substitute

            rows, count = rows[:most], offsets[1:]
            acts, indices = self._encode(stream, rows, count)
            substitute(
                *(hidden_states, stream, rows, count, acts, indices, self._edit),
                *(self._placement, self._decode_scratch),
            )

    def _add_edit_change(
        self, hidden_states: Tensor, stream: Tensor, rows: Tensor, offsets: Tensor, most: int
    ) -> None:
        from microedit_kernels.edit_change.kernel import add_edit_change

        add_edit_change(
            hidden_states, stream, rows, offsets, self._sets, self._edit_scratch, most=most
        )

    def _check_golden(self, operator: EditOperator, dtype: torch.dtype) -> None:
        """What the server proves of its SAE in torch (`EditOperator.check_golden`), by kernels."""
        z = operator.edit_set.golden.z.to(self.device, dtype)
        state = SlotState.allocate(len(z), self.device, self.codes)
        self.attach(state)
        rows = torch.arange(len(z), device=self.device)
        self.score(z, rows, rows)
        edited = z.to(torch.float, copy=True)
        self._substitute(edited, z, self._keys[: len(z)].fill_(0), len(z))
        found = (state.dist, state.dist0, edited)
        wanted = (*operator.distances(z), operator.edited(z))
        names = ("dist", "dist0", "edited")
        for name, have, want in zip(names, found, wanted, strict=True):
            error = float((have - want).norm() / want.norm().clamp(min=1e-6))
            if not error <= _TOLERANCE:
                raise MicroEditError(
                    f"the kernels do not reproduce the golden activations: {name} is off by "
                    f"{error:.1%} (allowed {_TOLERANCE:.0%}); report this with your GPU's name"
                )
