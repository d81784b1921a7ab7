import pytest

from microedit_trainer import calibration_prompts as module
from microedit_trainer.calibration_prompts import CalibrationPrompts
from microedit_trainer.contexts import Contexts
from microedit_trainer.facts import Fact
from microedit_vllm.artifact import Scope

FACTS = [Fact(f"Where was item {i} of Rome made?", "Oslo", "Rome") for i in range(40)]


@pytest.fixture
def prompts(lm) -> CalibrationPrompts:
    contexts = Contexts.build(lm.tokenizer, Scope(last=None), lm.max_length)
    return CalibrationPrompts(contexts, ("bare",), (), swaps=True)


def test_some_of_very_many_wordings_have_names_of_every_place(prompts, monkeypatch):
    """Every second wording would have every second name alone."""
    everything = prompts.swapped(FACTS)
    assert len(everything) == len(FACTS)
    monkeypatch.setattr(module, "MOST_SWAPPED", 20)
    some = prompts.swapped(FACTS)
    assert len(some) == 20 and set(some) < set(everything)
    places = {everything.index(prompt) % 2 for prompt in some}
    assert places == {0, 1}


def test_another_fact_leaves_almost_all_of_them(prompts, monkeypatch):
    monkeypatch.setattr(module, "MOST_SWAPPED", 20)
    before, after = (set(prompts.swapped(facts)) for facts in (FACTS[:-1], FACTS))
    assert len(before & after) >= 19
