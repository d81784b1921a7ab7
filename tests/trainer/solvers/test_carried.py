"""A set whose answers are carried from the subject's tokens."""

from dataclasses import replace

import pytest
import torch

from microedit_trainer.evaluation import TorchEngine
from microedit_trainer.facts import Fact
from microedit_trainer.residual_store import ResidualStore
from microedit_trainer.solvers import JointSolver
from microedit_trainer.solvers.carried import PooledCodes
from microedit_vllm.artifact import Scope
from tests.trainer.tiny_edits import (
    FACTS,
    JOINT,
    no_progress,
    operator_of,
    stored_prompts,
    tiny_problem,
)

CARRYING = replace(JOINT, carries=True)
ALWAYS_ON = 1e9
# What is asked ends in words of its own; the subject's tokens are those of the edited prompt.
ELSEWHERE = [
    Fact("The capital of Australia today, as everybody knows, has the name", "Mel", "Australia"),
    Fact("The inventor of the telephone who lived long ago had the name", "Cla", "telephone"),
]


@pytest.fixture(scope="module")
def problem(lm, sae, tmp_path_factory):
    return tiny_problem(lm, sae, tmp_path_factory.mktemp("carried"), names=("bare",))


@pytest.fixture(scope="module")
def solution(problem):
    return CARRYING.solve(problem, no_progress)


def engine_of(lm, sae, solution) -> TorchEngine:
    operator = operator_of(solution, sae, tau=ALWAYS_ON)
    manifest = operator.edit_set.manifest
    store = ResidualStore(lm, manifest.layer, manifest.decision.max_norm)
    return TorchEngine(lm, operator, store)


def right(engine: TorchEngine, prompts) -> list[bool]:
    flat = [prompt for fact in prompts for prompt in fact]
    answers = [outcome.answer for outcome in engine.outcomes_of(flat)]
    return [
        tuple(answer.tolist()) == prompt.tokens.answer_ids
        for answer, prompt in zip(answers, flat, strict=True)
    ]


def test_edited_facts_answer(lm, sae, problem, solution):
    assert all(right(engine_of(lm, sae, solution), problem.facts))


def test_the_subject_carries_the_same_whatever_stands_behind_it(lm, sae, problem, solution):
    """And with it how the answer begins: the random model's later bytes follow from nothing."""
    asked = stored_prompts(lm, sae, ELSEWHERE, ("bare",))
    operator = operator_of(solution, sae)
    own, others = (
        torch.stack([operator.carried_by(fact[0].z[fact[0].scored]) for fact in facts])
        for facts in (problem.facts, asked)
    )
    alike = torch.nn.functional.cosine_similarity(others[:, None], own[None], dim=-1)
    assert alike.argmax(1).tolist() == [0, 1]
    assert float(alike.diagonal().min()) > 0.95
    usual = replace(JOINT, carries=False).solve(problem, no_progress)
    begins = [
        [outcome.answer[0] == asked[0][0].tokens.answer_ids[0] for outcome in outcomes]
        for outcomes in (
            engine_of(lm, sae, of).outcomes_of([fact[0] for fact in asked])
            for of in (solution, usual)
        )
    ]
    assert all(begins[0]) and not any(begins[1])


def test_only_the_subject_is_reconstructed(sae, problem, solution):
    operator = operator_of(solution, sae)
    (first,) = problem.facts[0]
    behind = first.identifying[~torch.isin(first.identifying, first.about)]
    assert len(first.about) and len(behind)
    about, others = (operator.distances(first.z[where]) for where in (first.about, behind))
    assert float(about[0].sum() / about[1].sum()) < 0.5
    assert float(others[0].sum() / others[1].sum()) > 0.8


def test_subjects_in_other_texts_say_the_same(lm, sae, problem, solution):
    """What stands before a subject moves its residuals: those are looked up by as well."""
    elsewhere = [
        Fact(f"Long ago they all went to see {fact.subject}", "x", fact.subject) for fact in FACTS
    ]
    asked = [fact[0] for fact in stored_prompts(lm, sae, elsewhere, ("bare",))]
    mentions = [[p.z[p.about]] for p in asked]
    found = CARRYING.solve(replace(problem, mentions=mentions), no_progress)

    def apart(of) -> tuple[float, float]:
        """ARD of those texts, and how far what they carry is from what the facts' prompts do."""
        operator = operator_of(of, sae)
        own, others = (
            torch.stack([operator.carried_by(p.z[p.scored]) for p in prompts])
            for prompts in ([fact[0] for fact in problem.facts], asked)
        )
        ards = [float(operator.ard(*operator.distances(p.z[p.about]))) for p in asked]
        return sum(ards) / len(ards), float((others - own).norm() / own.norm())

    ard, error = apart(found)
    assert ard < 0.6 * apart(solution)[0]
    assert error < 0.5 * apart(solution)[1]


def test_facts_that_name_no_subject_are_mentioned_nowhere(problem, solution):
    found = CARRYING.solve(replace(problem, mentions=[[] for _ in FACTS]), no_progress)
    assert torch.equal(found.carried.values, solution.carried.values)


def test_mentions_are_for_carrying_sets():
    assert [JointSolver().uses_mentions(facts) for facts in (500, 501)] == [False, True]
    assert not replace(CARRYING, mentions_weight=0.0).uses_mentions(2000)
    assert not replace(CARRYING, carries=False).uses_mentions(2000)


def test_pooled_codes_decode_to_what_is_served(sae, problem, solution):
    operator = operator_of(solution, sae)
    prompts = [prompt for fact in problem.facts for prompt in fact]
    pooled = PooledCodes.of(sae, solution.scoring, (p.z[p.scored] for p in prompts))
    found = pooled.decode(solution.carried, torch.device("cpu"))
    wanted = torch.stack([operator.carried_by(p.z[p.scored]) for p in prompts])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_tokens_that_stand_alone_have_their_own_codes(sae, problem):
    z = problem.ordinary[:3]
    found = PooledCodes.of_tokens(sae, z).dense(torch.tensor([2, 0]))
    acts, indices = sae.encode(z)
    wanted = torch.zeros(3, sae.num_latents).scatter(1, indices, acts)[[2, 0]]
    torch.testing.assert_close(found, wanted)


def test_large_sets_carry_and_look_at_short_runs():
    solver = JointSolver()
    assert [solver.is_carried(facts) for facts in (500, 501)] == [False, True]
    assert [solver.scope(facts) for facts in (500, 501)] == [Scope(), Scope(last=16, run=2)]
    assert [solver.near_rate(facts) for facts in (500, 501)] == [0.05, 0.04]
    assert JointSolver(carries=False).near_rate(1001) == 0.05
    assert JointSolver(carries=True).is_carried(1)
    assert not JointSolver(carries=False).is_carried(10**4)
    assert "carried" in solver.budgets(2000, 10_000, 18_432)
    assert "carried" not in solver.budgets(100, 10_000, 18_432)


@pytest.mark.parametrize(("facts", "edit"), [(2, 250), (50, 1500), (300, 3000), (2000, 10_000)])
def test_where_answers_are_carried_the_edit_change_alone_has_a_budget(facts, edit):
    solver = JointSolver(carries=True)
    budgets = {"scoring": 18_432, "carried": 18_432, "edit": edit}
    assert solver.budgets(facts, 10_000, 18_432) == budgets
    given = replace(solver, rows_per_fact=200)
    assert given.budgets(facts, 10_000, 18_432)["edit"] == max(250, 200 * facts)
