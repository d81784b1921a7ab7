from dataclasses import replace

import pytest
import torch

from microedit_trainer.facts import Fact
from microedit_trainer.solvers import executors, joint
from microedit_trainer.solvers.joint import JointSolver, RidgeSettings
from microedit_trainer.solvers.kept_solution import KeptSolution
from microedit_trainer.solvers.ridge import IterativeSystem
from microedit_trainer.solvers.sparse_codes import dense_codes
from microedit_trainer.solvers.targets import solve_targets
from microedit_trainer.stored_residuals import predictions
from microedit_vllm.artifact import DecoderChange
from microedit_vllm.errors import MicroEditError
from tests.trainer.tiny_edits import (
    FACTS,
    JOINT,
    LAYER,
    no_progress,
    operator_of,
    stored_prompts,
    tiny_problem,
)

COUNTRIES = ("Norway", "Peru", "Chile", "Japan")


def flat(problem):
    return [prompt for fact in problem.facts for prompt in fact]


@pytest.fixture(scope="module")
def problem(lm, sae, tmp_path_factory):
    return tiny_problem(lm, sae, tmp_path_factory.mktemp("joint"))


@pytest.fixture(scope="module")
def solution(problem):
    return JOINT.solve(problem, no_progress)


def test_edited_facts_switch_on_and_answer(lm, sae, problem, solution):
    operator = operator_of(solution, sae)
    prompts = flat(problem)
    ards = [float(operator.ard(*operator.distances(p.z[p.scored]))) for p in prompts]
    assert max(ards) < 0.6
    residuals = []
    for prompt in prompts:
        z = prompt.z.clone()
        z[prompt.edited] = operator.edited(z[prompt.edited])
        residuals.append(z)
    answers = predictions(lm, LAYER, prompts, residuals)
    assert [tuple(a.tolist()) for a in answers] == [p.tokens.answer_ids for p in prompts]


def test_ordinary_tokens_are_reconstructed_as_before(sae, problem, solution):
    """Half a token's weight in 1,300: the mean over ordinary text stays about 1."""
    dist, dist0 = operator_of(solution, sae).distances(problem.ordinary)
    assert float(dist.sum() / dist0.sum()) > 0.75


def test_the_solution_says_how_it_is_served(problem, solution, sae):
    assert (solution.placement, solution.activation) == ("delta", "threshold")
    # θ lets every edited token keep 8·k latents (but for the one that is θ itself) where it has
    # so many that are positive.
    z = torch.cat([p.z[p.edited] for p in flat(problem)])
    pre = (z.float() - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    active = int((pre > solution.theta).sum(1).min())
    assert solution.report["least_latents"] == active
    assert active >= min(8 * sae.k - 1, int((pre > 0).sum(1).min()))
    assert solution.theta >= 0


@pytest.mark.parametrize("placement", ["delta", "replace"])
def test_the_top_k_alone_can_answer(lm, sae, problem, placement):
    """As far as k latents can: ẑ with its change is the residual that the targets ask for."""
    solver = replace(JOINT, theta=None, placement=placement)
    solution = solver.solve(problem, no_progress)
    assert (solution.placement, solution.activation) == (placement, "topk")
    operator, prompts = operator_of(solution, sae), joint._prompts(problem)
    own = torch.cat([p.z[p.edited] for p in prompts])
    wanted = own.float() + torch.cat(solver._all_targets(problem, no_progress))
    before = own.float() if placement == "delta" else sae.decode(*sae.encode(own))
    left = (operator.edited(own) - wanted).square().sum() / (before - wanted).square().sum()
    assert left < 0.1
    # What is decoded is served: z itself stays where z + δ is served, and goes where ẑ is.
    decoded = operator.reconstruct(*sae.encode(own), operator.edit_rows, operator.edit)
    placed = own.float() if placement == "delta" else decoded[0]
    assert torch.equal(operator.edited(own), placed + decoded[1])


@pytest.mark.parametrize("other", [{"theta": 0.0}, {"theta": None, "carries": True}])
def test_a_replaced_stream_has_no_place_for_more(other):
    with pytest.raises(MicroEditError, match="leave theta and carries out"):
        JointSolver(placement="replace", **other)
    assert not JointSolver(placement="replace", theta=None).is_carried(10**4)


def test_rows_are_those_that_the_facts_activate(problem, solution, sae):
    indices = sae.encode(torch.cat([p.z[p.identifying] for p in flat(problem)]))[1]
    assert set(solution.scoring.indices.tolist()) <= set(indices.unique().tolist())
    for change in (solution.scoring, solution.edit):
        assert change.values.dtype == torch.bfloat16
        assert change.values.shape == (len(change.indices), sae.d_in)
        assert change.indices.tolist() == sorted(set(change.indices.tolist()))


@pytest.mark.parametrize(
    ("per_fact", "least", "scoring", "edit"),
    [(18, 1, 24, 72), (1, 60, 60, 60)],
    ids=["per fact", "least"],
)
def test_each_change_keeps_to_the_budget(problem, solution, sae, per_fact, least, scoring, edit):
    solver = replace(JOINT, rows_per_fact=per_fact, least_rows=least)
    budgets = solver.budgets(len(problem.facts), 10_000, sae.num_latents)
    assert budgets == {"scoring": scoring, "edit": edit}
    found = solver.solve(problem, no_progress)
    for name, budget in budgets.items():
        small, full = getattr(found, name), getattr(solution, name)
        assert len(small.indices) == budget < len(full.indices)
        assert set(small.indices.tolist()) <= set(full.indices.tolist())
    # Solved again on the rows that are left, not cut out of the larger solution.
    kept = torch.isin(solution.scoring.indices, found.scoring.indices)
    cut = DecoderChange(found.scoring.indices, solution.scoring.values[kept])
    z = torch.cat([p.z[p.identifying] for p in flat(problem)])
    error = operator_of(found, sae).distances(z)[0].sum()
    assert error < 0.99 * operator_of(replace(found, scoring=cut), sae).distances(z)[0].sum()


def test_the_wording_before_the_subject_is_held(lm, sae, tmp_path):
    """Prompts that share only the wording must not switch on by it."""
    facts = [Fact(f"The best-known river of the land {c} is", "Zoe", c) for c in COUNTRIES]
    problem = tiny_problem(lm, sae, tmp_path, facts, ("bare",))
    solver = replace(JOINT, scoring=RidgeSettings(ridge=1e-2, unchanged_weight=0.1))
    operator = operator_of(solver.solve(problem, no_progress), sae)

    def share(prompt, positions) -> float:
        dist, dist0 = operator.distances(prompt.z[positions])
        return float(dist.sum() / dist0.sum())

    for prompt in flat(problem):
        assert len(prompt.shared) > 20
        assert share(prompt, prompt.identifying) < 0.6
        assert share(prompt, prompt.shared) > 0.8
    others = [
        replace(fact, prompt=fact.prompt.replace(fact.subject, "Wakanda"), subject="Wakanda")
        for fact in facts[:1]
    ]
    edited = [float(operator.ard(*operator.distances(p.z[p.scored]))) for p in flat(problem)]
    for (other,) in stored_prompts(lm, sae, others, ("bare",)):
        assert share(other, other.shared) > 0.8
        ard = float(operator.ard(*operator.distances(other.z[other.scored])))
        assert ard > max(edited) + 0.05


def test_the_wording_is_held_by_its_own_tokens(lm, sae, tmp_path):
    """With no ordinary tokens beside them: those before the subject must do it alone."""
    facts = [Fact(f"The best-known river of the land {c} is", "Zoe", c) for c in COUNTRIES]
    problem = tiny_problem(lm, sae, tmp_path, facts, ("bare",))
    problem = replace(problem, ordinary=problem.ordinary[:1])
    held = RidgeSettings(ridge=1e-2, unchanged_weight=10.0)
    solution = replace(JOINT, scoring=held).solve(problem, no_progress)
    for prompt in flat(problem):
        dist, dist0 = operator_of(solution, sae).distances(prompt.z[prompt.shared])
        torch.testing.assert_close(dist / dist0, torch.ones_like(dist), rtol=0, atol=0.05)


def test_progress_counts_every_prompt(problem, lm, sae, tmp_path):
    counted = []
    JOINT.solve(replace(problem, work_folder=tmp_path), counted.append)
    assert sum(counted) == 2 * len(FACTS)
    assert len(counted) == len(FACTS)  # batches of two


def test_finished_batches_are_read_back_and_damaged_ones_solved_again(problem, solution):
    """The module's problem has been solved before: its work folder is full."""
    paths = sorted(problem.work_folder.glob("targets-*.safetensors"))
    assert len(paths) == len(FACTS)
    paths[1].write_bytes(paths[1].read_bytes()[:20])
    again = JOINT.solve(problem, no_progress)
    for name in ("scoring", "edit"):
        assert torch.equal(getattr(again, name).values, getattr(solution, name).values)
        assert torch.equal(getattr(again, name).indices, getattr(solution, name).indices)


def test_facts_trained_in_one_context_only(lm, sae, tmp_path):
    problem = tiny_problem(lm, sae, tmp_path, FACTS[:1], ("bare",))
    operator = operator_of(JOINT.solve(problem, no_progress), sae)
    (prompt,) = flat(problem)
    assert float(operator.ard(*operator.distances(prompt.z[prompt.scored]))) < 0.6


def test_kept_targets_serve_another_choice_of_facts(lm, sae, tmp_path, monkeypatch):
    """One taken out leaves exactly what a solve without it gives; only one added is solved."""
    solved = []

    def counting(lm, layer, batch, settings):
        solved.append(len(batch))
        return solve_targets(lm, layer, batch, settings)

    monkeypatch.setattr(executors, "solve_targets", counting)

    def solve(facts, work):
        problem = tiny_problem(lm, sae, tmp_path / work, facts, ("bare",))
        kept = replace(problem, targets_folder=tmp_path / "targets")
        return JOINT.solve(kept, no_progress)

    solve(FACTS, "whole")
    assert solved == [2, 2]
    fewer = solve(FACTS[1:], "fewer")
    assert solved == [2, 2]
    alone = tiny_problem(lm, sae, tmp_path / "alone", FACTS[1:], ("bare",))
    alone = replace(alone, targets_folder=tmp_path / "targets")
    again = JOINT.solve(alone, no_progress)
    assert torch.equal(fewer.edit.values, again.edit.values)
    assert torch.equal(fewer.scoring.values, again.scoring.values)
    solve([*FACTS, Fact("The longest river of the world is", "Bob", "river")], "more")
    assert solved == [2, 2, 1]


@pytest.mark.parametrize(("num_latents", "rows"), [(4608, 2000), (12_000, 3000), (18_432, 3000)])
def test_a_narrow_decoder_gives_each_fact_fewer_rows(num_latents, rows):
    assert JointSolver().budgets(100, 1310, num_latents)["edit"] == rows


@pytest.mark.parametrize("tokens_per_fact", [14, 120])
@pytest.mark.parametrize(("facts", "most"), [(10, 0.12), (100, 0.60)])
def test_a_set_takes_its_part_of_the_decoder_at_most(facts, most, tokens_per_fact):
    budgets = JointSolver().budgets(facts, tokens_per_fact * facts, 4608)
    assert sum(budgets.values()) <= most * 4608


@pytest.mark.parametrize(
    ("facts", "identifying", "scoring"),
    [(10, 132, 250), (100, 1310, 1000), (300, 3912, 2000), (10, 1122, 250), (100, 10_201, 2500)],
    ids=["10 questions", "100 questions", "300 questions", "10 passages", "100 passages"],
)
def test_the_switch_has_more_rows_for_long_prompts(facts, identifying, scoring):
    assert JointSolver().budgets(facts, identifying, 18_432)["scoring"] == scoring
    given = JointSolver(rows_per_fact=30).budgets(facts, identifying, 18_432)
    assert given["scoring"] == max(250, 10 * facts)


def test_what_stands_in_other_words_gets_the_same_change(problem, solution, sae):
    """z at the decision position moves with the words; the weight brings its change nearer."""
    random = torch.Generator().manual_seed(1)
    prompts = [fact[c] for c in range(len(problem.facts[0])) for fact in problem.facts]
    own = torch.stack([p.z[p.edited.start] for p in prompts])
    reworded = own[:, None].float() + torch.randn(len(own), 2, own.shape[1], generator=random)
    reworded = reworded.to(own.dtype)
    found = JOINT.solve(replace(problem, reworded=list(reworded)), no_progress)
    wanted = operator_of(solution, sae).edited(own).float() - own.float()
    others = reworded.flatten(0, 1)

    def error(of):
        change = operator_of(of, sae).edited(others) - others.float()
        return (change - wanted.repeat_interleave(2, 0)).square().sum()

    assert error(found) < 0.8 * error(solution)


def test_the_models_wordings_switch_on_too(lm, sae, problem, solution):
    said = [replace(FACTS[0], prompt="Which city of Australia is the best-known of all?")]
    worded = [p for fact in stored_prompts(lm, sae, said) for p in fact]
    found = JOINT.solve(replace(problem, worded=worded), no_progress)

    def ards(of, prompts):
        operator = operator_of(of, sae)
        return [float(operator.ard(*operator.distances(p.z[p.scored]))) for p in prompts]

    assert max(ards(found, worded)) < 0.6 < min(ards(solution, worded))
    assert max(ards(found, flat(problem))) < 0.6


def test_wordings_about_other_subjects_are_held(lm, sae, problem, solution):
    """What the scoring change adds to them shrinks; the facts' own ARD stays low."""
    names = dict(zip((fact.subject for fact in FACTS), COUNTRIES, strict=True))
    others = [
        Fact(fact.prompt.replace(fact.subject, names[fact.subject]), "x", names[fact.subject])
        for fact in FACTS
    ]
    prompts = [p for fact in stored_prompts(lm, sae, others) for p in fact]
    swapped = torch.cat([p.z[p.identifying] for p in prompts])
    held = replace(JOINT, swapped_weight=1.0)
    found = held.solve(replace(problem, swapped=prompts), no_progress)
    codes = dense_codes(*sae.encode(swapped), sae.num_latents)

    def added(of):
        change = of.scoring
        return float((codes[:, change.indices.long()] @ change.values.float()).square().sum())

    assert added(found) < 0.2 * added(solution)
    operator = operator_of(found, sae)
    assert max(float(operator.ard(*operator.distances(p.z[p.scored]))) for p in flat(problem)) < 0.6


def test_wordings_about_other_subjects_are_wanted_in_large_sets_so_many_at_most():
    wanted = [JointSolver().swapped_wordings(facts) for facts in (500, 501, 10**4)]
    assert wanted == [0, 501, 2000]
    assert JointSolver(swapped_weight=0).swapped_wordings(10**4) == 0
    assert JointSolver(swapped_weight=1).swapped_wordings(10) == 10


def test_an_earlier_solution_is_a_start_and_leaves_no_trace(lm, sae, tmp_path, monkeypatch):
    """As in a large set: solved iteratively, from what the folder holds of another choice."""
    starts, real = [], KeptSolution.start

    def start(self, *of):
        found = real(self, *of)
        starts.append(found is not None)
        return found

    def iterative(coded, watch):
        return IterativeSystem.of(coded, watch)

    monkeypatch.setattr(KeptSolution, "start", start)
    monkeypatch.setattr(joint, "is_quick", lambda coded: False)
    monkeypatch.setattr(joint, "ridge_system", iterative)

    def solve(facts, folder):
        problem = tiny_problem(lm, sae, tmp_path / "work", facts, ("bare",))
        return JOINT.solve(replace(problem, targets_folder=tmp_path / folder), no_progress)

    solve(FACTS, "kept")
    fewer = solve(FACTS[1:], "kept")
    assert starts == [False, False, True, True]
    alone = solve(FACTS[1:], "fresh")
    assert starts[4:] == [False, False]
    for name in ("scoring", "edit"):
        found, wanted = getattr(fewer, name), getattr(alone, name)
        assert torch.equal(found.indices, wanted.indices)
        error = (found.values.float() - wanted.values.float()).norm()
        assert float(error) < 3e-3 * float(wanted.values.float().norm())  # bf16


def test_the_solves_say_how_far_they_are(problem):
    shown = []

    def stages(name, share, note):
        shown.append((name, share, note))

    JOINT.solve(replace(problem, stages=stages), no_progress)
    names = [name for name, _, _ in shown]
    assert names == sorted(names, reverse=True) and set(names) == {"scoring change", "edit change"}
    assert all(0 <= share <= 1 for _, share, _ in shown)
    assert any("coding" in note for _, _, note in shown)
