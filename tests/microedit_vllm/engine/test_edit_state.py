"""Plan, score, decide and substitute without vLLM, however a prompt is cut into steps."""

import pytest
import torch

from microedit_vllm.artifact import Decision, EditOperator, Scope
from microedit_vllm.engine.edit_state import EditState
from microedit_vllm.engine.request_plan import RequestPlan
from microedit_vllm.engine.step_metadata import RequestState, Step, StepRequest
from microedit_vllm.engine.step_plan import plan_step
from tests.builders import HIDDEN_SIZE, tiny_edit_set, tiny_sae

BLOCK, SLOTS, LENGTH = 4, 64, 20
CPU = torch.device("cpu")
PLAN = RequestPlan(edit_from=15, scored_from=3, scored_to=15, substitute_from=15)
# Blocks of a sequence lie anywhere in the cache, and in no order.
TABLE = torch.tensor([[9, 2, 7, 0, 5], [1, 11, 3, 8, 14]], dtype=torch.int32)


def make_operator(tau: float, max_norm: float = 1e4, **changes) -> EditOperator:
    decision = Decision(
        statistic="relative", tau=tau, scope=Scope(last=None, run=4), max_norm=max_norm
    )
    sae = tiny_sae()
    return EditOperator.build(tiny_edit_set(sae, decision=decision, **changes), sae)


def residuals(seed: int = 0, rows: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    one, two = (torch.randn(rows, HIDDEN_SIZE, generator=random) for _ in range(2))
    return one.bfloat16(), two.bfloat16()


def share(state: RequestState, first: int, end: int, row: int = 0, index: int = 0) -> StepRequest:
    return StepRequest(state, index, row, end - first, first)


def step(*requests: StepRequest) -> Step:
    return Step(list(requests), TABLE, BLOCK)


def apply(
    state: EditState, hidden: torch.Tensor, residual: torch.Tensor | None, *requests: StepRequest
) -> None:
    """One step as the worker runs it."""
    state.feedback.poll()
    state.begin_step(plan_step(step(*requests), CPU))
    state.apply(hidden, None if residual is None else hidden + residual)
    state.end_step()


def run(
    state: EditState, request: RequestState, cuts: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed one sequence in the given chunks; the layer's output afterwards."""
    hidden, residual = residuals()
    for first, end in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        apply(state, hidden[first:end], residual[first:end], share(request, first, end))
    return hidden, residual


def expected_ard(operator: EditOperator) -> torch.Tensor:
    hidden, residual = residuals()
    z = (hidden + residual)[PLAN.scored_from : PLAN.scored_to]
    z = z[z.float().norm(dim=-1) <= operator.edit_set.manifest.decision.max_norm]
    return operator.ard(*operator.distances(z))


@pytest.mark.parametrize(
    "cuts", [[], *([at] for at in range(1, LENGTH)), [2, 7, 15], list(range(1, LENGTH))]
)
@pytest.mark.parametrize("form", [{}, {"shared": True}, {"carries": True}])
def test_any_cut_of_the_prompt_gives_the_same_decision_and_tokens(cuts, form):
    operator = make_operator(tau=1e6, **form)
    state, request = EditState(operator, SLOTS), RequestState("r", PLAN)
    hidden, residual = run(state, request, cuts)
    before_hidden, before_residual = residuals()
    e = PLAN.edit_from
    assert torch.equal(hidden[:e], before_hidden[:e])
    assert torch.equal(residual[:e], before_residual[:e])
    before = before_hidden + before_residual
    wanted = operator.edited(before[e:])
    carried = operator.carried_by(before[PLAN.scored_from : PLAN.scored_to])
    assert bool(carried.norm() > 0.1) == operator.carries
    wanted[0] += carried
    torch.testing.assert_close((hidden + residual)[e:].float(), wanted, rtol=1e-2, atol=1e-2)
    record = state.records.read("r")
    assert record is not None
    assert record["on"] is True
    assert record["ard"] == pytest.approx(float(expected_ard(operator)), rel=1e-4)


@pytest.mark.parametrize("cuts", [[], [8], list(range(1, LENGTH))])
@pytest.mark.parametrize("carries", [False, True])
def test_off_touches_nothing(cuts, carries):
    operator = make_operator(tau=1e-6, carries=carries)
    state, request = EditState(operator, SLOTS), RequestState("r", PLAN)
    hidden, residual = run(state, request, cuts)
    assert all(torch.equal(a, b) for a, b in zip((hidden, residual), residuals(), strict=True))
    assert state.feedback.drain() == [("r", False)]
    assert request.on is False
    assert plan_step(step(share(request, LENGTH - 1, LENGTH)), CPU) is None


def test_sinks_are_not_scored():
    norms = torch.stack(residuals()).sum(0)[PLAN.scored_from : PLAN.scored_to].float().norm(dim=-1)
    operator = make_operator(tau=1e6, max_norm=float(norms.median()))
    state = EditState(operator, SLOTS)
    run(state, RequestState("r", PLAN), [8])
    record = state.records.read("r")
    assert record is not None
    assert record["ard"] == pytest.approx(float(expected_ard(operator)), rel=1e-4)
    assert record["ard"] != pytest.approx(float(expected_ard(make_operator(tau=1.0))), rel=1e-4)


def test_nothing_to_score_is_off():
    state = EditState(make_operator(tau=1e6), SLOTS)
    hidden, _ = run(state, RequestState("r", RequestPlan(0, 0, 0, 0)), [])
    assert torch.equal(hidden, residuals()[0])
    assert state.records.read("r") == {"ard": None, "on": False}


@pytest.mark.parametrize("carries", [False, True])
def test_recomputation_after_preemption_decides_anew(carries):
    """The slots now belong to other tokens, and the host still believes the old decision."""
    operator = make_operator(tau=1e6, carries=carries)
    state, request = EditState(operator, SLOTS), RequestState("r", PLAN)
    first, _ = run(state, request, [8])
    for tensor in (state.slots.dist, state.slots.dist0, state.slots.acts):
        tensor.fill_(torch.nan)
    state.slots.on.fill_(False)
    request.on = False
    again, _ = run(state, request, [5, 11])
    torch.testing.assert_close(again, first)


def test_batch_mates_do_not_meet():
    operator = make_operator(tau=1e6)
    alone, _ = run(EditState(operator, SLOTS), RequestState("a", PLAN), [])
    state = EditState(operator, SLOTS)
    asks, declines = RequestState("a", PLAN), RequestState("b", None)
    mixed = [torch.cat(parts) for parts in zip(residuals(1), residuals(0), strict=True)]
    mates = [share(declines, 0, LENGTH, index=1), share(asks, 0, LENGTH, row=LENGTH)]
    apply(state, *mixed, *mates)
    assert torch.equal(mixed[0][:LENGTH], residuals(1)[0])
    assert torch.equal(mixed[1][:LENGTH], residuals(1)[1])
    torch.testing.assert_close(mixed[0][LENGTH:], alone)


def test_sinks_carry_nothing():
    z = torch.stack(residuals()).sum(0)[PLAN.scored_from : PLAN.scored_to]
    norms = z.float().norm(dim=-1)
    operator = make_operator(tau=1e6, max_norm=float(norms.median()), carries=True)
    hidden, residual = run(EditState(operator, SLOTS), RequestState("r", PLAN), [8])
    at_e = torch.stack(residuals()).sum(0)[PLAN.edit_from]
    wanted = operator.edited(at_e) + operator.carried_by(z[norms <= norms.median()])
    found = (hidden + residual)[PLAN.edit_from].float()
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_a_longer_prompt_in_the_batch_changes_no_bit_of_what_is_carried():
    operator = make_operator(tau=1e6, carries=True)
    short = RequestPlan(edit_from=9, scored_from=3, scored_to=9, substitute_from=9)
    alone, residual = (part[:10] for part in residuals())
    apply(EditState(operator, SLOTS), alone, residual, share(RequestState("a", short), 0, 10))
    mixed = [torch.cat([part[:10], part]) for part in residuals()]
    longer = share(RequestState("b", PLAN), 0, LENGTH, row=10, index=1)
    shorter = share(RequestState("a", short), 0, 10)
    apply(EditState(operator, SLOTS), *mixed, shorter, longer)
    assert torch.equal(mixed[0][:10], alone)
    assert not torch.equal(alone[9], residuals()[0][9])


def test_a_stream_of_one_tensor():
    operator = make_operator(tau=1e6)
    hidden, _ = residuals()
    apply(EditState(operator, SLOTS), hidden, None, share(RequestState("r", PLAN), 0, LENGTH))
    e = PLAN.edit_from
    wanted = operator.edited(residuals()[0][e:]).bfloat16()
    assert torch.equal(hidden[:e], residuals()[0][:e])
    torch.testing.assert_close(hidden[e:], wanted)


def test_chunks_before_the_window_need_nothing():
    assert plan_step(step(share(RequestState("r", PLAN), 0, 3)), CPU) is None
