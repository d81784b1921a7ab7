from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from microedit_trainer.solvers import SequentialSolver, sequential
from microedit_vllm.errors import MicroEditError
from tests.trainer.tiny_edits import FACTS, LAYER, SEQUENTIAL, no_progress, tiny_problem


@pytest.fixture(scope="module")
def problem(lm, sae, tmp_path_factory):
    """One fact in one context."""
    return tiny_problem(lm, sae, tmp_path_factory.mktemp("one"), FACTS[:1], ("bare",))


@pytest.fixture(scope="module")
def two(lm, sae, tmp_path_factory):
    """Two facts, bare."""
    return tiny_problem(lm, sae, tmp_path_factory.mktemp("two"), FACTS[:2], ("bare",))


@pytest.fixture
def solve(problem, tmp_path_factory):
    """Solve a problem in a fresh work folder: the whole decoder, and the rows that changed."""

    def solve(solver: SequentialSolver, of=problem) -> tuple[torch.Tensor, torch.Tensor]:
        of = replace(of, work_folder=tmp_path_factory.mktemp("work"))
        solution = solver.solve(of, no_progress)
        assert solution.edit is solution.scoring
        W_dec = of.sae.W_dec.clone()
        W_dec[solution.scoring.indices] += solution.scoring.values.float()
        return W_dec, solution.scoring.indices

    return solve


def dense_codes(sae, z):
    acts, indices = sae.encode(z.float())
    return torch.zeros(len(z), sae.num_latents).scatter_(1, indices, acts)


def ard(problem, W_dec) -> torch.Tensor:
    """Eq. 13 over the scored tokens, by a dense product."""
    ((prompt,),) = problem.facts
    z = prompt.z[prompt.scored]
    z_hat = dense_codes(problem.sae, z) @ W_dec + problem.sae.b_dec
    return (z_hat - z).square().sum(-1).mean() / SEQUENTIAL.alpha


def edit_loss(problem, W_dec) -> torch.Tensor:
    """Eq. 10 with ẑ from the decision position on."""
    ((prompt,),) = problem.facts
    z = prompt.z.clone()
    z_hat = dense_codes(problem.sae, z[prompt.edited]) @ W_dec + problem.sae.b_dec
    z = torch.cat([z[: prompt.edited.start], z_hat])
    hidden = problem.lm.upper(z[None], LAYER)[0, prompt.edited]
    return F.cross_entropy(problem.lm.logits(hidden), prompt.answer_with_end)


def test_stage_1_lowers_the_distance(problem, solve):
    trained, _ = solve(replace(SEQUENTIAL, steps_rec=30, steps_edit=0))
    assert ard(problem, trained) < 0.8 * ard(problem, problem.sae.W_dec)


def test_stage_2_makes_the_answer_likely(problem, solve):
    first, _ = solve(replace(SEQUENTIAL, steps_edit=0))
    second, _ = solve(replace(SEQUENTIAL, steps_edit=80))
    with torch.no_grad():
        assert edit_loss(problem, second) < 0.5 * edit_loss(problem, first)


def test_stage_2_ends_when_the_fact_is_learnt(solve):
    learnt, _ = solve(replace(SEQUENTIAL, learnt=1e9))
    first, _ = solve(replace(SEQUENTIAL, steps_edit=0))
    assert torch.equal(learnt, first)


@pytest.mark.parametrize("position", ["decision", "sequence"])
def test_exactly_the_activated_rows_may_change(problem, solve, position):
    """Eq. 15, 16: M(i,·) = 1 for i ∈ I_k of the fact's scored and substituted tokens."""
    ((prompt,),) = problem.facts
    trained, rows = solve(replace(SEQUENTIAL, position=position))
    where = torch.arange(1, len(prompt.z))  # here every token but the first is one or the other
    active = problem.sae.encode(prompt.z[where])[1].unique()
    assert rows.tolist() == active.tolist()
    untouched = torch.ones(problem.sae.num_latents, dtype=torch.bool)
    untouched[active] = False
    assert torch.equal(trained[untouched], problem.sae.W_dec[untouched])
    assert not torch.equal(trained[active], problem.sae.W_dec[active])


def test_a_step_is_adams_on_the_whole_matrix_with_the_gradient_masked(problem, solve):
    """The paper's form: dense W_dec, autograd, mask of Eq. 15, one Adam for both stages."""
    ((prompt,),) = problem.facts
    solver = replace(SEQUENTIAL, steps_rec=2, steps_edit=2, learnt=0.0)
    trained, _ = solve(solver)
    W_dec = problem.sae.W_dec.clone().requires_grad_()
    mask = torch.zeros(problem.sae.num_latents, 1)
    mask[problem.sae.encode(prompt.z[1:])[1].unique()] = 1.0
    adam = torch.optim.Adam([W_dec], lr=solver.lr)
    for step in range(4):
        loss = ard(problem, W_dec)
        if step >= 2:
            loss = loss + edit_loss(problem, W_dec)
        adam.zero_grad()
        loss.backward()
        W_dec.grad *= mask
        adam.step()
    change, wanted = trained - problem.sae.W_dec, W_dec.detach() - problem.sae.W_dec
    # The set's rows are bf16; an element whose gradient is about 0 may go either way.
    assert float((change - wanted).norm()) < 1e-2 * float(wanted.norm())
    assert float(wanted.norm()) > 0.1


def test_the_sae_itself_is_left_as_it_is(problem, solve):
    before = problem.sae.W_dec.clone()
    solve(SEQUENTIAL)
    assert torch.equal(problem.sae.W_dec, before)


def test_facts_are_edited_one_after_the_other(lm, sae, solve, tmp_path):
    """Rows of the first fact that the second does not activate stay as the first left them."""
    both = tiny_problem(lm, sae, tmp_path, FACTS[:2], ("bare",))
    first, rows = solve(SEQUENTIAL, replace(both, facts=both.facts[:1]))
    after, all_rows = solve(SEQUENTIAL, both)
    _, (second,) = both.facts
    theirs = sae.encode(second.z[1:])[1].unique()
    kept = rows[~torch.isin(rows, theirs)]
    assert 0 < len(kept) < len(rows)
    assert torch.equal(after[kept], first[kept])
    shared = rows[torch.isin(rows, theirs)]
    assert not torch.equal(after[shared], first[shared])
    assert all_rows.tolist() == torch.cat([rows, theirs]).unique().tolist()


def test_a_fact_goes_on_from_where_those_before_it_left_the_rows(problem, solve):
    twice = replace(problem, facts=[*problem.facts, *problem.facts])
    solver = replace(SEQUENTIAL, steps_rec=8, steps_edit=0)
    once, _ = solve(solver)
    again, _ = solve(solver, twice)
    assert ard(problem, again) < 0.95 * ard(problem, once)


def test_sequence_puts_z_hat_in_the_prompt_too(problem, solve, monkeypatch):
    ((prompt,),) = problem.facts
    seen = []
    upper = type(problem.lm).upper

    def spy(self, z, layer):
        seen.append((z[0].detach() - prompt.z).norm(dim=-1) > 0)
        return upper(self, z, layer)

    monkeypatch.setattr(type(problem.lm), "upper", spy)
    places = {}
    for position in ("sequence", "decision"):
        seen.clear()
        solve(replace(SEQUENTIAL, position=position, steps_edit=1))
        places[position] = seen[0].nonzero()[:, 0].tolist()
    assert places["sequence"] == list(range(1, len(prompt.z)))
    assert places["decision"] == list(range(prompt.edited.start, len(prompt.z)))


def test_sinks_are_neither_scored_nor_replaced(problem, solve):
    ((prompt,),) = problem.facts
    sinks = torch.zeros(len(prompt.z), dtype=torch.bool)
    sinks[[4, prompt.edited.start + 1]] = True
    blind = replace(problem, facts=[[replace(prompt, is_sink=sinks)]])
    _, rows = solve(SEQUENTIAL, blind)
    used = ~sinks
    used[0] = False
    assert rows.tolist() == problem.sae.encode(prompt.z[used])[1].unique().tolist()


def test_the_solution_is_the_papers_form(problem, tmp_path):
    solution = SEQUENTIAL.solve(replace(problem, work_folder=tmp_path), no_progress)
    assert (solution.placement, solution.activation) == ("replace", "topk")
    assert solution.theta is None


@pytest.mark.parametrize(
    "wrong", [{"passes": 0}, {"rows_per_fact": 0}, {"lr": 0.0}, {"alpha": float("inf")}]
)
def test_numbers_that_no_run_can_have_are_refused(wrong):
    with pytest.raises(MicroEditError, match=next(iter(wrong))):
        replace(SEQUENTIAL, **wrong)


@pytest.mark.parametrize(
    ("learnt", "again"), [(1e9, []), (1e-9, [0, 1])], ids=["all hold", "none holds"]
)
def test_a_second_pass_edits_again_what_does_not_hold(
    lm, sae, tmp_path, monkeypatch, learnt, again
):
    problem = tiny_problem(lm, sae, tmp_path, FACTS[:2], ("bare",))
    edited: list[int] = []
    edit = SequentialSolver._edit

    def watched(self, of, prompt, W_dec, allowed):
        assert allowed is None
        edited.append([fact[0] for fact in of.facts].index(prompt))
        return edit(self, of, prompt, W_dec)

    monkeypatch.setattr(SequentialSolver, "_edit", watched)
    counted: list[int] = []
    solver = replace(SEQUENTIAL, passes=2, steps_edit=2, learnt=learnt)
    solver.solve(problem, counted.append)
    assert edited == [0, 1, *again]
    assert sum(counted) == 2 * solver.units_per_fact(1) == 4


class TestRowBudget:
    BUDGET = replace(SEQUENTIAL, rows_per_fact=12, steps_rec=4, steps_edit=12)

    @pytest.fixture(autouse=True)
    def few_rows(self, monkeypatch):
        monkeypatch.setattr(sequential, "LEAST_ROWS", 0)

    def test_a_small_set_may_have_some_in_any_case(self, two, solve, monkeypatch):
        monkeypatch.setattr(sequential, "LEAST_ROWS", 30)
        assert len(solve(self.BUDGET, two)[1]) == 30

    def test_no_more_rows_change_than_the_budget_has(self, two, solve):
        _, all_rows = solve(replace(self.BUDGET, rows_per_fact=None), two)
        _, rows = solve(self.BUDGET, two)
        assert len(rows) == 24 < len(all_rows)
        assert set(rows.tolist()) < set(all_rows.tolist())

    def test_what_the_others_did_is_carried_over(self, two, solve):
        """Before the last pass ẑ is nearer to what all rows gave than with the others left out."""
        all_rows, _ = solve(replace(self.BUDGET, rows_per_fact=None), two)
        # Everything holds, so that the last pass edits nothing.
        few, rows = solve(replace(self.BUDGET, learnt=1e9), two)
        trained, _ = solve(replace(self.BUDGET, learnt=1e9, rows_per_fact=None), two)
        z = torch.cat([prompt.z[prompt.scored] for fact in two.facts for prompt in fact])
        codes = dense_codes(two.sae, z)
        left_out = two.sae.W_dec.clone()
        left_out[rows] = trained[rows]
        carried = (codes @ (few - trained)).norm()
        assert carried < 0.9 * (codes @ (left_out - trained)).norm()
        assert not torch.equal(all_rows, trained)

    def test_a_pass_on_the_kept_rows_learns_again_what_was_lost(self, two, solve, monkeypatch):
        turns = []
        edit = SequentialSolver._edit

        def watched(self, of, prompt, W_dec, allowed):
            turns.append(None if allowed is None else int(allowed.sum()))
            return edit(self, of, prompt, W_dec, allowed)

        monkeypatch.setattr(SequentialSolver, "_edit", watched)
        solver = replace(self.BUDGET, learnt=1e-9)
        solve(solver, two)
        assert turns == [None, None, 24, 24]
        assert solver.units_per_fact(1) == 2

    @pytest.mark.parametrize("stopped_behind", [1, 2, 3])
    def test_a_stopped_run_goes_on_to_the_same_rows(self, two, tmp_path, stopped_behind):
        solver = replace(self.BUDGET, learnt=1e-9, checkpoint_every=1)
        whole = solver.solve(replace(two, work_folder=tmp_path / "whole"), no_progress)
        done = 0

        def stop(count: int) -> None:
            nonlocal done
            done += count
            if done > stopped_behind:
                raise KeyboardInterrupt

        stopped = replace(two, work_folder=tmp_path / "stopped")
        with pytest.raises(KeyboardInterrupt):
            solver.solve(stopped, stop)
        resumed = solver.solve(stopped, no_progress)
        assert torch.equal(resumed.edit.indices, whole.edit.indices)
        torch.testing.assert_close(resumed.edit.values, whole.edit.values)
