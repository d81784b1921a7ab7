"""Steps computed by the Triton kernels against those computed in torch (here: interpreted)."""

import pytest
import torch

from microedit_vllm.engine import triton_edit
from microedit_vllm.engine.edit_state import EditState
from microedit_vllm.engine.request_plan import RequestPlan
from microedit_vllm.engine.step_metadata import RequestState
from microedit_vllm.engine.step_plan import plan_step
from microedit_vllm.engine.triton_edit import TritonEdit
from microedit_vllm.errors import MicroEditError
from tests.builders import HIDDEN_SIZE, NUM_LATENTS
from tests.microedit_vllm.engine.dispatch_guards import NoHostRead
from tests.microedit_vllm.engine.test_edit_state import (
    CPU,
    LENGTH,
    PLAN,
    SLOTS,
    apply,
    expected_ard,
    make_operator,
    residuals,
    run,
    share,
    step,
)

FORMS = [
    {},
    {"carries": True},
    {"shared": True},
    {"shared": True, "placement": "delta"},
]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def by_kernels(operator, dtype=torch.float32) -> EditState:
    return EditState(TritonEdit(operator, 2 * LENGTH, dtype), SLOTS)


@pytest.mark.parametrize("cuts", [[], [8], [2, 7, 15], list(range(1, LENGTH))])
@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_is_edited_as_torch_does_it(cuts, form):
    operator = make_operator(tau=1e6, **form)
    hidden, residual = run(by_kernels(operator), RequestState("r", PLAN), cuts)
    wanted, _ = run(EditState(operator, SLOTS), RequestState("r", PLAN), cuts)
    torch.testing.assert_close(hidden, wanted, rtol=1e-2, atol=1e-2)
    assert torch.equal(hidden[: PLAN.edit_from], wanted[: PLAN.edit_from])
    assert torch.equal(residual, residuals()[1])


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_decision_is_that_of_torch(dtype, rel):
    operator = make_operator(tau=1e6)
    state = by_kernels(operator, dtype)
    run(state, RequestState("r", PLAN), [5, 11])
    record = state.records.read("r")
    assert record is not None
    assert record["on"] is True
    assert record["ard"] == pytest.approx(float(expected_ard(operator)), rel=rel)


@pytest.mark.parametrize("form", FORMS)
def test_off_touches_nothing(form):
    state = by_kernels(make_operator(tau=1e-6, **form))
    hidden, residual = run(state, RequestState("r", PLAN), [8])
    assert all(torch.equal(a, b) for a, b in zip((hidden, residual), residuals(), strict=True))


def test_nothing_to_score_is_off():
    state = by_kernels(make_operator(tau=1e6))
    hidden, _ = run(state, RequestState("r", RequestPlan(0, 0, 0, 0)), [])
    assert torch.equal(hidden, residuals()[0])
    assert state.records.read("r") == {"ard": None, "on": False}


def test_a_stream_of_one_tensor():
    operator = make_operator(tau=1e6)
    hidden, wanted = residuals()[0], residuals()[0]
    for state, stream in ((by_kernels(operator), hidden), (EditState(operator, SLOTS), wanted)):
        apply(state, stream, None, share(RequestState("r", PLAN), 0, LENGTH))
    torch.testing.assert_close(hidden, wanted, rtol=1e-2, atol=1e-2)


def test_batch_mates_do_not_meet():
    operator = make_operator(tau=1e6)
    alone, _ = run(by_kernels(operator), RequestState("a", PLAN), [])
    state = by_kernels(operator)
    asks, declines = RequestState("a", PLAN), RequestState("b", None)
    mixed = [torch.cat(parts) for parts in zip(residuals(1), residuals(0), strict=True)]
    mates = [share(declines, 0, LENGTH, index=1), share(asks, 0, LENGTH, row=LENGTH)]
    apply(state, *mixed, *mates)
    assert torch.equal(mixed[0][:LENGTH], residuals(1)[0])
    assert torch.equal(mixed[0][LENGTH:], alone)


@pytest.mark.parametrize("single", [False, True])
def test_the_captured_substitution_is_that_of_a_step(single):
    state = by_kernels(make_operator(tau=1e6))
    state.prepare_capture(8, 2 * LENGTH, torch.bfloat16)
    asks, declines = RequestState("a", PLAN), RequestState("b", None)
    apply(state, *residuals(), share(asks, 0, LENGTH - 1))
    one = LENGTH - 1, LENGTH
    requests = [share(declines, *one, index=1), share(asks, *one, row=1)]
    hidden, residual = (t[:3].contiguous() for t in residuals(5))
    eager, captured = hidden.clone(), hidden.clone()
    apply(state, eager, None if single else residual, *requests)
    state.begin_step(plan_step(step(*requests), CPU))
    state.captured.apply(captured, None if single else hidden + residual)
    assert torch.equal(captured, eager)
    assert torch.equal(captured[[0, 2]], hidden[[0, 2]])
    assert not torch.equal(captured[1], hidden[1])


@pytest.mark.parametrize("form", FORMS)
def test_a_step_reads_nothing_back(form, monkeypatch):
    """What a launch itself does is `tests/kernels`' concern; the interpreter reads as it goes."""
    state = by_kernels(make_operator(tau=1e6, **form))
    monkeypatch.setattr(state.feedback, "decided", lambda states, on: None)
    hidden, residual = residuals()
    plan = plan_step(step(share(RequestState("r", PLAN), 0, LENGTH)), CPU)
    state.begin_step(plan)
    with NoHostRead():
        state.apply(hidden, hidden + residual)


def tensors_of(owner) -> list[torch.Tensor]:
    """All that an object of ours holds, however deep."""
    if isinstance(owner, torch.Tensor):
        return [owner]
    if isinstance(owner, dict | list | tuple):
        parts = owner.values() if isinstance(owner, dict) else owner
    else:
        parts = vars(owner).values() if hasattr(owner, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def test_the_weights_in_fp32_are_let_go():
    whole = (NUM_LATENTS, HIDDEN_SIZE)
    state = by_kernels(make_operator(tau=1e6), torch.bfloat16)
    state.prepare_capture(8, 2 * LENGTH, torch.bfloat16)
    held = [t.dtype for t in tensors_of(state) if t.shape == whole]
    assert held and set(held) == {torch.bfloat16}
    in_torch = EditState(make_operator(tau=1e6), SLOTS)
    assert torch.float in [t.dtype for t in tensors_of(in_torch) if t.shape == whole]


def test_kernels_that_compute_otherwise_are_refused(monkeypatch):
    operator = make_operator(tau=1e6)
    folded = triton_edit.folded_bias
    monkeypatch.setattr(triton_edit, "folded_bias", lambda *weights: folded(*weights) + 1)
    with pytest.raises(MicroEditError, match="kernels do not reproduce"):
        by_kernels(operator)
