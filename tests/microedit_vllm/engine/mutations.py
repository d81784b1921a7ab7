"""Faults to plant, each of which breaks an invariant that the random schedules must see broken."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from microedit_vllm.engine import runner_v1, step_plan, torch_edit, worker
from microedit_vllm.engine.edit_state import EditState
from microedit_vllm.engine.prefix_cache import EditPrefixCache
from microedit_vllm.engine.scheduler import _EditMixin
from tests.microedit_vllm.engine.schedule_trace import REUSED_BLOCKS


@dataclass(frozen=True)
class Mutation:
    """A planted fault.

    Attributes:
        breaks: the invariants of the design notes that it breaks; one of them must be seen.
        plant: puts it into the code, until the patch is undone.
        seed: of a schedule that sees it; where it no longer does, others are tried.
        form: of the edit set (`tiny_served`).
    """

    name: str
    breaks: tuple[int, ...]
    plant: Callable[[pytest.MonkeyPatch], None]
    seed: int = 0
    form: str = "delta"


def _substitute_whatever_the_switch_says(patch: pytest.MonkeyPatch) -> None:
    substitute = EditState._substitute

    def always(self: Any, plan: Any, hidden_states: Any, z: Any) -> None:
        self.slots.on.fill_(True)
        substitute(self, plan, hidden_states, z)

    patch.setattr(EditState, "_substitute", always)


def _one_decision_for_the_batch(patch: pytest.MonkeyPatch) -> None:
    substitute = EditState._substitute

    def shared(self: Any, plan: Any, hidden_states: Any, z: Any) -> None:
        first = plan.decision_slots[:1].expand(len(plan.decision_slots))
        substitute(self, replace(plan, decision_slots=first), hidden_states, z)

    patch.setattr(EditState, "_substitute", shared)


def _every_row_of_the_batch_is_written(patch: pytest.MonkeyPatch) -> None:
    def add_to_all(hidden: Any, residual: Any, rows: Any, z_hat: Any, on: Any = None) -> None:
        hidden += 1e-3
        hidden[rows] = z_hat.to(hidden.dtype)

    patch.setattr(torch_edit, "apply_replace", add_to_all)


def _only_this_step_is_scored(patch: pytest.MonkeyPatch) -> None:
    decide = EditState._decide

    def forgetful(self: Any, plan: Any) -> Any:
        now = torch.isin(plan.window_slots, plan.scored_slots)
        return decide(self, replace(plan, in_window=plan.in_window & now))

    patch.setattr(EditState, "_decide", forgetful)


def _whoever_is_off_is_carried_to_as_well(patch: pytest.MonkeyPatch) -> None:
    carry = EditState._carry

    def to_all(self: Any, plan: Any, hidden_states: Any, on: Any) -> None:
        carry(self, plan, hidden_states, torch.ones_like(on))

    patch.setattr(EditState, "_carry", to_all)


def _only_this_step_s_tokens_carry(patch: pytest.MonkeyPatch) -> None:
    carry = EditState._carry

    def forgetful(self: Any, plan: Any, hidden_states: Any, on: Any) -> None:
        now = torch.isin(plan.window_slots, plan.scored_slots)
        carry(self, replace(plan, in_window=plan.in_window & now), hidden_states, on)

    patch.setattr(EditState, "_carry", forgetful)


def _a_chunk_s_last_token_decides(patch: pytest.MonkeyPatch) -> None:
    """As if each chunk of a prompt were the whole of it."""
    make = step_plan.plan_step

    def early(step: Any, device: Any) -> Any:
        requests = []
        for request in step.requests:
            plan, end = request.state.plan, request.first_position + request.num_rows
            if request.first_position < plan.edit_from and end <= plan.edit_from:
                request.state.plan = replace(plan, edit_from=end - 1, substitute_from=end - 1)
            requests.append(request)
        return make(replace(step, requests=requests), device)

    patch.setattr(worker, "plan_step", early)


def _only_a_request_s_last_row_is_edited(patch: pytest.MonkeyPatch) -> None:
    """Drafts, forced answers and what follows a preemption are several rows a step."""

    def last_only(spans: Any) -> Any:
        return [(request, end - 1, end) for request, _, end in spans]

    def upload(step: Any, scored: Any, deciding: Any, edited: Any, device: Any) -> Any:
        return original(step, scored, deciding, last_only(edited), device)

    original = step_plan._upload
    patch.setattr(step_plan, "_upload", upload)


def _a_resumed_prompt_holds_its_answer(patch: pytest.MonkeyPatch) -> None:
    """Token e moves behind the generated tokens when a preempted request comes back."""
    state_of = runner_v1.V1RunnerAdapter._state

    def moving(self: Any, request_id: str) -> Any:
        state, cached = state_of(self, request_id), self._runner.requests[request_id]
        index = self._runner.input_batch.req_id_to_index[request_id]
        computed = int(self._runner.input_batch.num_computed_tokens_cpu[index])
        again = state.plan is not None and computed <= state.plan.edit_from
        if again and len(cached.output_token_ids) > 0:
            last = len(cached.prompt_token_ids) + len(cached.output_token_ids) - 1
            state.plan = replace(state.plan, edit_from=last, substitute_from=last)
        return state

    patch.setattr(runner_v1.V1RunnerAdapter, "_state", moving)


def _the_decision_is_read_at_another_slot(patch: pytest.MonkeyPatch) -> None:
    places = step_plan._edited_places

    def shifted(spans: Any) -> Any:
        found = places(spans)
        return np.stack([found[0], np.maximum(found[1] - 1, 0)])

    patch.setattr(step_plan, "_edited_places", shifted)


def _the_window_may_come_from_the_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EditPrefixCache, "_usable", lambda self, blocks, computed, plan: computed)


def _a_hit_may_cover_token_e(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        EditPrefixCache, "get_computed_blocks", lambda self, request: self._lookup(request)
    )


def _distances_of_a_block_outlive_it(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        EditPrefixCache, "get_new_blocks", lambda self, num_blocks: self._allocate(num_blocks)
    )


def _substituted_blocks_are_stored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        EditPrefixCache, "cache_blocks", lambda self, request, tokens: self._store(request, tokens)
    )


def _whoever_finishes_is_stored(patch: pytest.MonkeyPatch) -> None:
    """As if each request had stayed off."""
    decided = EditPrefixCache.decided
    patch.setattr(
        EditPrefixCache, "decided", lambda self, request, on: decided(self, request, False)
    )
    finished = _EditMixin._free_request_blocks

    def free(self: Any, request: Any) -> None:
        decided(self._edits, request, False)
        finished(self, request)

    patch.setattr(_EditMixin, "_free_request_blocks", free)


MUTATIONS = [
    Mutation("substitute whatever the switch says", (1,), _substitute_whatever_the_switch_says),
    Mutation("one decision for the whole batch", (1, 2), _one_decision_for_the_batch),
    Mutation("write to every row of the batch", (1,), _every_row_of_the_batch_is_written, 5),
    Mutation("score this step's tokens only", (2,), _only_this_step_is_scored),
    Mutation(
        "carry to requests that are off",
        (1,),
        _whoever_is_off_is_carried_to_as_well,
        form="carried",
    ),
    Mutation(
        "carry from this step's tokens only", (2,), _only_this_step_s_tokens_carry, form="carried"
    ),
    Mutation("let a chunk's last token decide", (2,), _a_chunk_s_last_token_decides),
    Mutation("edit a request's last row only", (2,), _only_a_request_s_last_row_is_edited, 1),
    Mutation("count a resumed answer as prompt", (2,), _a_resumed_prompt_holds_its_answer, 7),
    Mutation("read the decision at another slot", (2,), _the_decision_is_read_at_another_slot),
    Mutation("take unscored windows from the cache", (2,), _the_window_may_come_from_the_cache, 8),
    Mutation("let a prefix hit cover token e", (2,), _a_hit_may_cover_token_e, 6),
    Mutation(
        "keep distances of a block that is reused",
        (2,),
        _distances_of_a_block_outlive_it,
        REUSED_BLOCKS,
    ),
    Mutation("store blocks with substituted tokens", (3,), _substituted_blocks_are_stored, 5),
    Mutation("store every answer as if it were off", (3,), _whoever_finishes_is_stored, 5),
]
