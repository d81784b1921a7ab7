import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_trainer.solvers.ridge import Term, solve_ridge, strongest_rows


def term(tokens: int, rows: int, weight: float, seed: int) -> Term:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randn(tokens, rows, generator=random).relu()
    return Term(codes, torch.randn(tokens, 3, generator=random), weight)


def least_squares(terms: list[Term], ridge: float) -> torch.Tensor:
    """The same minimum by a dense least-squares solver, in fp64: √w and √ridge stacked."""
    rows = terms[0].codes.shape[1]
    codes = [t.weight**0.5 * t.codes.double() for t in terms]
    wanted = [t.weight**0.5 * t.wanted.double() for t in terms]
    codes.append(ridge**0.5 * torch.eye(rows, dtype=torch.double))
    wanted.append(torch.zeros(rows, 3, dtype=torch.double))
    return torch.linalg.lstsq(torch.cat(codes), torch.cat(wanted)).solution.float()


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 12), rows=st.integers(1, 12), seed=st.integers(0, 99))
def test_tall_and_wide_systems_give_the_least_squares_solution(tokens, rows, seed):
    """More tokens than rows is solved in the rows, fewer in the tokens."""
    terms = [term(tokens, rows, 1.0, seed), term(2, rows, 0.1, seed + 1)]
    found = solve_ridge(terms, ridge=0.05)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, least_squares(terms, 0.05), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [4, 40], ids=["primal", "dual"])
def test_the_minimum_has_no_gradient(rows):
    terms = [term(10, rows, 1.0, 0), term(6, rows, 0.1, 1)]
    change = solve_ridge(terms, ridge=0.02).double().requires_grad_()
    loss = 0.02 * change.square().sum()
    for t in terms:
        loss = loss + t.weight * (t.codes.double() @ change - t.wanted).square().sum()
    loss.backward()
    assert float(change.grad.abs().max()) < 1e-4


def test_a_heavier_term_is_met_more_closely():
    def error(weight: float) -> float:
        first, second = term(8, 4, weight, 0), term(8, 4, 1.0, 1)
        change = solve_ridge([first, second], ridge=1e-3)
        return float((first.codes @ change - first.wanted).norm())

    assert error(100.0) < error(1.0) < error(0.01)


def test_an_empty_term_changes_nothing():
    full, empty = term(6, 4, 1.0, 0), Term(torch.empty(0, 4), torch.empty(0, 3), 0.1)
    assert torch.equal(solve_ridge([full, empty], 0.1), solve_ridge([full], 0.1))


def test_the_rows_that_do_the_work_are_kept_in_order():
    change = torch.tensor([[1.0, 0.0], [0.0, 3.0], [9.0, 0.0], [0.0, 2.0]])
    codes = torch.tensor([[6.0, 1.0, 0.1, 1.0], [0.0, 1.0, 0.1, 1.0]])
    # Strengths: 1·√18 = 4.24, 3, 0.9, 2.
    assert strongest_rows(change, codes, 1).tolist() == [0]
    assert strongest_rows(change, codes, 2).tolist() == [0, 1]
    assert strongest_rows(change, codes, 3).tolist() == [0, 1, 3]


def test_rows_without_effect_never_fill_the_budget():
    change = torch.tensor([[1.0], [0.0], [1.0]])
    codes = torch.tensor([[1.0, 1.0, 0.0]])
    assert strongest_rows(change, codes, 3).tolist() == [0]
