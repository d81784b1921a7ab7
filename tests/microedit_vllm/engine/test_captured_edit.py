"""What a full CUDA graph holds, and that nothing of a step waits for the device."""

import pytest
import torch

from microedit_kernels.topk_encode import selection, topk_by_key
from microedit_vllm.engine.edit_state import EditState
from microedit_vllm.engine.step_metadata import RequestState
from microedit_vllm.engine.step_plan import plan_step
from tests.builders import HIDDEN_SIZE
from tests.microedit_vllm.engine.dispatch_guards import ForbiddenError, NoAllocation, NoHostRead
from tests.microedit_vllm.engine.test_edit_state import (
    CPU,
    LENGTH,
    PLAN,
    SLOTS,
    apply,
    make_operator,
    residuals,
    share,
    step,
)

MAX_ROWS = 8


def decode_step(tau: float = 1e6) -> tuple[EditState, list]:
    """A state after the prompts of two requests, one of them without edits, and their next step."""
    state = EditState(make_operator(tau), SLOTS)
    state.prepare_capture(MAX_ROWS, 2 * LENGTH, torch.bfloat16)
    asks, declines = RequestState("a", PLAN), RequestState("b", None)
    apply(state, *residuals(), share(asks, 0, LENGTH - 1))
    one = LENGTH - 1, LENGTH
    return state, [share(declines, *one, index=1), share(asks, *one, row=1)]


@pytest.mark.parametrize("single", [False, True])
def test_the_captured_substitution_is_that_of_a_step(single):
    state, requests = decode_step()
    hidden, residual = (t[:3].contiguous() for t in residuals(5))
    eager, captured = hidden.clone(), hidden.clone()
    apply(state, eager, None if single else residual, *requests)
    state.begin_step(plan_step(step(*requests), CPU))
    state.captured.apply(captured, None if single else hidden + residual)
    torch.testing.assert_close(captured, eager, rtol=1e-2, atol=1e-2)
    assert torch.equal(captured[[0, 2]], hidden[[0, 2]])
    assert not torch.equal(captured[1], hidden[1])


def test_off_rows_and_rows_without_a_request_keep_their_bits():
    state, requests = decode_step(tau=1e-6)
    state.begin_step(plan_step(step(*requests), CPU))
    hidden, residual = (t[:MAX_ROWS].contiguous() for t in residuals(5))
    before = hidden.clone(), residual.clone()
    state.captured.apply(hidden, residual)
    assert torch.equal(hidden, before[0])
    assert torch.equal(residual, before[1])


def test_a_replay_after_the_request_ended_changes_nothing():
    state, requests = decode_step()
    state.begin_step(plan_step(step(*requests), CPU))
    state.begin_step(None)
    hidden, residual = (t[:3].contiguous() for t in residuals(5))
    before = hidden.clone()
    state.captured.apply(hidden, residual)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("single", [False, True])
def test_the_captured_region_allocates_nothing_and_reads_nothing_back(single):
    state, requests = decode_step()
    state.begin_step(plan_step(step(*requests), CPU))
    hidden, residual = (t[:MAX_ROWS].contiguous() for t in residuals(5))
    with NoAllocation():
        state.captured.apply(hidden, None if single else residual)
        # The next step reuses the same addresses.
        state.captured.apply(hidden, None if single else residual)


@pytest.mark.parametrize("shared", [False, True])
def test_a_step_reads_nothing_back_on_a_device(monkeypatch, shared):
    """All that a device runs in a step; its own shortcuts for the CPU are turned off."""
    monkeypatch.setattr(selection, "topk_on_cpu", topk_by_key)
    state = EditState(make_operator(1e6, shared=shared), SLOTS)
    told = []
    monkeypatch.setattr(state.edit, "may_look", False)
    monkeypatch.setattr(state.feedback, "decided", lambda states, on: told.append(on))
    hidden, residual = residuals()
    requests = [share(RequestState("r", PLAN), 0, LENGTH)]
    with NoHostRead():
        state.begin_step(plan_step(step(*requests), CPU))
        state.apply(hidden, residual)
    assert bool(told[0])
    wanted, _ = residuals()
    assert torch.equal(hidden[: PLAN.edit_from], wanted[: PLAN.edit_from])
    assert not torch.equal(hidden[PLAN.edit_from :], wanted[PLAN.edit_from :])


def test_the_guards_do_forbid():
    values = torch.randn(4, HIDDEN_SIZE)
    with NoHostRead(), pytest.raises(ForbiddenError, match="mask"):
        values[values[:, 0] > 0]
    with NoHostRead(), pytest.raises(ForbiddenError, match="reads a value"):
        float(values.sum())
    with NoAllocation(), pytest.raises(ForbiddenError, match="allocates"):
        values + 1
