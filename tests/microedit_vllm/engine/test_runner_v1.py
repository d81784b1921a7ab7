"""The adapter for the V1 runner: what the schedules in `test_schedules` cannot reach on a CPU."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode

from microedit_vllm.engine.runner_v1 import V1RunnerAdapter
from microedit_vllm.engine.step_metadata import RequestState, Step
from tests.builders import tiny_manifest, tiny_sae

FULL, NONE = CUDAGraphMode.FULL, CUDAGraphMode.NONE


def make_runner(prompt: list[int], computed: int, rows: int) -> Any:
    """The parts of `GPUModelRunner` that the adapter reads, with one request in the batch."""
    cached = SimpleNamespace(
        prompt_token_ids=prompt, sampling_params=SimpleNamespace(extra_args=None)
    )
    table = SimpleNamespace(block_table=SimpleNamespace(gpu=torch.zeros(1, 4)), block_size=16)
    return SimpleNamespace(
        input_batch=SimpleNamespace(
            req_ids=["a"],
            num_reqs=1,
            num_computed_tokens_cpu=np.array([computed]),
            block_table=[table],
        ),
        query_start_loc=SimpleNamespace(np=np.array([0, rows])),
        requests={"a": cached},
        _prepare_inputs=lambda: "inputs",
        _determine_batch_execution_and_padding=lambda: (FULL, "padding", False),
    )


def attach(runner: Any, answers: list[bool]) -> tuple[list[Step], list[RequestState]]:
    steps: list[Step] = []
    new: list[RequestState] = []

    def on_step(step: Step) -> bool:
        steps.append(step)
        return answers[len(steps) - 1]

    V1RunnerAdapter(runner, tiny_manifest(tiny_sae())).attach(on_step, new.append)
    return steps, new


def test_a_step_that_must_not_runs_in_no_graph_at_the_same_padding():
    runner = make_runner([1, 2, 3, 4], computed=0, rows=4)
    attach(runner, [True, False])
    chosen = []
    for is_real in (True, False, True):
        if is_real:
            assert runner._prepare_inputs() == "inputs"
        chosen.append(runner._determine_batch_execution_and_padding())
    assert chosen == [(NONE, "padding", False), (FULL, "padding", False), (FULL, "padding", False)]


@pytest.mark.parametrize(
    ("computed", "on", "told"), [(4, False, 0), (4, True, 1), (4, None, 1), (3, False, 1)]
)
def test_a_request_that_is_known_to_be_off_is_left_out_behind_its_decision(computed, on, told):
    runner = make_runner([1, 2, 3, 4], computed=computed, rows=1)
    steps, new = attach(runner, [False, False])
    runner._prepare_inputs()
    new[0].on = on
    runner._prepare_inputs()
    assert len(steps[1].requests) == told


def test_a_request_that_streams_its_input_is_planned_anew():
    runner = make_runner([1, 2, 3, 4], computed=0, rows=4)
    _, new = attach(runner, [False, False])
    runner._prepare_inputs()
    runner.requests["a"].prompt_token_ids = [1, 2, 3, 4, 5, 6]
    runner._prepare_inputs()
    assert [state.plan.edit_from for state in new if state.plan] == [3, 5]
