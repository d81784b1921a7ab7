"""Decisions on their way to the host."""

import pytest
import torch

from microedit_vllm.engine.decision_log import DecisionFeedback, DecisionRecords
from microedit_vllm.engine.step_metadata import RequestState

CPU = torch.device("cpu")


@pytest.mark.parametrize("at_once", [1, 3, 10])
def test_records_are_bounded_and_the_newest_stay(at_once):
    records = DecisionRecords(CPU, capacity=4)
    names = [str(index % 7) for index in range(10)]
    for first in range(0, 10, at_once):
        part = names[first : first + at_once]
        ards = torch.arange(first, first + len(part)).float()
        records.write(part, ards, torch.ones(len(part), dtype=torch.bool))
        records.write_off(f"off {first}")
    assert records.read("2") == {"ard": 9.0, "on": True}
    assert records.read("1") == {"ard": 8.0, "on": True}
    assert records.read(f"off {first}") == {"ard": None, "on": False}
    assert records.read("3") is None
    assert records.read("never") is None


def test_feedback_tells_each_decision_once():
    feedback, states = DecisionFeedback(CPU), [RequestState("a", None), RequestState("b", None)]
    feedback.decided(states, torch.tensor([True, False]))
    feedback.poll()
    assert [state.on for state in states] == [True, False]
    assert feedback.drain() == [("a", True), ("b", False)]
    assert feedback.drain() == []


def test_a_decision_of_before_a_recomputation_is_dropped():
    feedback, state = DecisionFeedback(CPU), RequestState("a", None, version=3)
    feedback.decided([state], torch.tensor([False]))
    state.version += 1
    assert feedback.drain() == []
    assert state.on is None
