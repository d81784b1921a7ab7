import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from microedit_trainer.contexts import PromptTokens

PATH = Path(__file__).parents[2] / "benchmarks" / "agreement.py"
END = 9


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmarks_agreement", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("drafts", "seen"),
    [
        (((), ()), [2, 2, 1, 1]),
        (((4, 5, 6, 7), (8, END)), [2]),
        (((4, 1, 6, 7), (1, 2)), [2, 2, 1]),
        (((4, 5, 6, 7, 8, 9), (8, END, 5, 5)), [2]),
    ],
)
def test_greedy_takes_from_a_draft_only_what_the_model_says(bench, drafts, seen):
    prompts = [PromptTokens((0, start), (), END, (0, 1)) for start in (3, 7)]
    asked = []

    def step(prompts):
        """A model that counts upwards."""
        asked.append(len(prompts))
        return [torch.tensor([p.prompt_ids[-1], *p.answer_ids[:-1]]) + 1 for p in prompts]

    assert bench.greedy(step, prompts, drafts, 4) == [(4, 5, 6, 7), (8, END)]
    assert asked == seen


def test_greedy_ends_where_rounding_breaks_a_tie_now_so_now_so(bench):
    prompt = PromptTokens((0, 3), (), END, (0, 1))

    def step(prompts):
        """One that says another first token each time the answer gets longer."""
        return [torch.arange(len(p.answer_ids)) + len(p.answer_ids) % 2 for p in prompts]

    (answer,) = bench.greedy(step, [prompt], [(1, 2)], 4)
    assert len(answer) == 4
    assert answer[:2] == (1, 2)


def test_a_difference_is_the_gap_where_two_answers_part(bench):
    steps = ({1: -0.1, 2: -3.0}, {2: -0.5, 3: -0.75, 4: -2.0})
    first = bench.Answer((1, 2), steps)
    assert bench.difference(first, bench.Answer((1, 2))) is None
    assert bench.difference(first, bench.Answer((1, 3))) == pytest.approx(0.25)
    assert bench.difference(first, bench.Answer((1, 8))) == pytest.approx(1.5)  # at least
    assert bench.difference(first, bench.Answer((2, 2))) == pytest.approx(2.9)


def test_nothing_behind_the_end_token_counts(bench):
    answer = bench.Answer((1, END, 5), ({1: 0.0}, {END: 0.0}, {5: 0.0}))
    assert answer.until(END) == bench.Answer((1, END), ({1: 0.0}, {END: 0.0}))
    assert answer.until(8) == answer


def test_ard_differences_are_relative_to_the_trainer(bench):
    trainer, server = [0.05, 1.0, 2.0, math.inf], [0.06, 1.01, 2.0, math.inf]
    found = bench.ard_agreement(trainer, server, tau=1.0)
    assert found["max"] == pytest.approx(0.2)
    assert found["large_max"] == pytest.approx(0.01)
    assert found["within"] == 0.75
    assert found["large_within"] == 1
    assert found["max_absolute"] == pytest.approx(0.01)
    assert found["mean_difference"] == pytest.approx(0.02 / 3.05)
    assert found["within_of_tau"] == 1
    assert bench.ard_agreement([1.0], [math.inf], 0.5)["within"] == 0


def rows_of(bench, **changes):
    same = {"ard": (0.5, 0.5), "ard_alone": 0.5, "on": (True, True), "forced": 1.0}
    same |= {"edited": None, "plain": None}
    return bench.agreement([same, same | changes, same, same], tau=0.9)


def test_agreement_counts_decisions_and_answers(bench):
    found = rows_of(bench, on=(True, False), edited=0.5, plain=0.5)
    assert found["decisions"] == 0.75
    assert (found["answers"], found["answers_floor"]) == (0.75, 0.75)
    assert (found["answers_on"], found["answers_off"]) == (1, 0)
    assert found["same_but_for_ties"] == 1
    assert rows_of(bench, edited=0.5, plain=0.25)["same_but_for_ties"] == 0.75


@pytest.fixture
def batches(bench):
    def answers(*tokens):
        return [bench.Answer((t,), ({t: -0.5, 0: -1.0},)) for t in tokens]

    plain = {"runs": [answers(1, 2), answers(1, 2)], "alone": answers(1, 2)}
    edited = {"runs": [answers(5, 2), answers(5, 2)], "alone": answers(5, 2), "on": [True, False]}
    return plain, edited, answers


def judged(bench, plain, edited):
    found = {
        "agreement": rows_of(bench),
        "concurrency": bench.concurrency([True, False], plain, edited, END),
    }
    return {name: met for name, *_, met in bench.judge(found)}


def test_every_bar_is_met_when_all_agree(bench, batches):
    plain, edited, _ = batches
    verdicts = judged(bench, plain, edited)
    assert set(verdicts.values()) == {True, None}


@pytest.mark.parametrize(
    ("runs", "alone", "missed"),
    [
        (((5, 3), (5, 3)), (5, 3), "unrelated, same to the bit"),
        (((5, 2), (6, 2)), (5, 2), "batches that repeat to the bit"),
        (((5, 2), (5, 2)), (6, 2), "edited, changed by company"),
    ],
)
def test_a_missed_bar_is_named(bench, batches, runs, alone, missed):
    plain, edited, answers = batches
    edited |= {"runs": [answers(*run) for run in runs], "alone": answers(*alone)}
    verdicts = judged(bench, plain, edited)
    assert [name for name, met in verdicts.items() if met is False] == [missed]


def test_a_changed_logprob_is_a_changed_answer(bench, batches):
    plain, edited, _ = batches
    edited["runs"] = [[edited["runs"][0][0], bench.Answer((2,), ({2: -0.5001, 0: -1.0},))]] * 2
    assert judged(bench, plain, edited)["unrelated, same to the bit"] is False
