"""What only a GPU can show: steps by kernels, eager and replayed from a CUDA graph, against torch.

Needs no vLLM: `python -m pytest tests/gpu tests/kernels` on any machine with torch and Triton.
"""

import pytest
import torch

from microedit_vllm.artifact import Decision, EditOperator, Scope
from microedit_vllm.engine.edit_state import EditState
from microedit_vllm.engine.request_plan import RequestPlan
from microedit_vllm.engine.step_metadata import RequestState, Step, StepRequest
from microedit_vllm.engine.step_plan import plan_step
from microedit_vllm.engine.triton_edit import TritonEdit
from tests.builders import tiny_edit_set, tiny_sae

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

D, LATENTS, K, LENGTH, BLOCK, SLOTS = 256, 2048, 32, 40, 8, 256
PLAN = RequestPlan(edit_from=35, scored_from=3, scored_to=35, substitute_from=35)
# The first request asks for edits, the second does not.
ASKING = (True, False)


def make_state(tau: float, kernels: bool, **form) -> EditState:
    sae = tiny_sae(0, D, LATENTS, K)
    decision = Decision(statistic="relative", tau=tau, scope=Scope(last=None, run=8), max_norm=1e4)
    edit_set = tiny_edit_set(sae, decision=decision, **form)
    operator = EditOperator.build(edit_set, sae.to("cuda"))
    how = TritonEdit(operator, 2 * LENGTH, torch.bfloat16) if kernels else operator
    return EditState(how, SLOTS)


def streams(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, residual = (torch.randn(rows, D, generator=generator) for _ in "hr")
    return hidden.bfloat16().cuda(), residual.bfloat16().cuda()


def make_step(requests: list[RequestState], first: int, end: int) -> Step:
    size, blocks = end - first, SLOTS // BLOCK
    table = torch.arange(blocks, dtype=torch.int32, device="cuda").view(2, -1)
    shares = [StepRequest(r, i, i * size, size, first) for i, r in enumerate(requests)]
    return Step(shares, table, BLOCK)


def prefill(state: EditState) -> tuple[torch.Tensor, list[RequestState]]:
    """All of both prompts in one step; the layer's output and the requests."""
    requests = [RequestState(str(i), PLAN if asks else None) for i, asks in enumerate(ASKING)]
    hidden, residual = streams(2 * LENGTH)
    state.begin_step(plan_step(make_step(requests, 0, LENGTH), torch.device("cuda")))
    state.apply(hidden, hidden + residual)
    state.end_step()
    return hidden, requests


@pytest.mark.parametrize(
    "form",
    [{}, {"carries": True}, {"shared": True}, {"shared": True, "placement": "delta"}],
    ids=str,
)
@pytest.mark.parametrize("tau", [1e6, 1e-6])
def test_a_step_by_kernels_is_that_of_torch(form, tau):
    by_kernels, by_torch = (make_state(tau, kernels, **form) for kernels in (True, False))
    found, wanted = prefill(by_kernels)[0], prefill(by_torch)[0]
    torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)
    plain = streams(2 * LENGTH)[0]
    changed = (found != plain).any(-1)
    expected = torch.zeros_like(changed)
    expected[PLAN.edit_from : LENGTH] = tau > 1
    assert not bool((changed & ~expected).any())
    # By the Top-k a row may have no changed latent, and z + δ is z then.
    if form.get("placement") != "delta":
        assert torch.equal(changed, expected)
    records = [state.records.read("0") for state in (by_kernels, by_torch)]
    assert records[0]["on"] == records[1]["on"] == (tau > 1)
    assert records[0]["ard"] == pytest.approx(records[1]["ard"], rel=2e-2)


@pytest.mark.parametrize("kernels", [True, False])
def test_one_graph_serves_every_later_step(kernels):
    """Captured once, with nobody on; replayed with the rows that each step's plan names."""
    state = make_state(1e6, kernels)
    state.prepare_capture(2, 2 * LENGTH, torch.bfloat16)
    hidden, residual = streams(2)
    z = hidden + residual
    state.captured.apply(hidden, z)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state.captured.apply(hidden, z)
    _, requests = prefill(state)
    for turn, asked in enumerate((True, False, True)):
        before, residual = streams(2, seed=turn + 1)
        eager = before.clone()
        plan = plan_step(make_step(requests, LENGTH, LENGTH + 1), torch.device("cuda"))
        state.begin_step(plan if asked else None)
        hidden.copy_(before)
        z.copy_(before + residual)
        graph.replay()
        if asked:
            state.apply(eager, before + residual)
        torch.testing.assert_close(hidden, eager, rtol=1e-2, atol=1e-2)
        assert torch.equal(hidden[1], before[1])
        assert torch.equal(hidden[0], before[0]) == (not asked)
