import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_trainer.solvers import ridge
from microedit_trainer.solvers.ridge import (
    RowSystem,
    Term,
    TokenSystem,
    ridge_system,
    strongest_rows,
    survey,
)

D = 3


def encoder(rows: int, seed: int = 7):
    """z [N, 3] → codes [N, rows], some of them 0."""
    weights = torch.randn(D, rows, generator=torch.Generator().manual_seed(seed))
    return lambda z: (z @ weights).relu()


def term(tokens: int, weight: float, seed: int, wanted: bool = True) -> Term:
    random = torch.Generator().manual_seed(seed)
    z, target = (torch.randn(tokens, D, generator=random) for _ in "zr")
    return Term(z, target if wanted else None, weight)


def least_squares(encode, terms: list[Term], ridge: float, rows: torch.Tensor) -> torch.Tensor:
    """The same minimum by a dense least-squares solver, in fp64: √w and √ridge stacked."""
    codes = [t.weight**0.5 * encode(t.z)[:, rows].double() for t in terms]
    wanted = [
        t.weight**0.5 * (torch.zeros(len(t.z), D) if t.wanted is None else t.wanted).double()
        for t in terms
    ]
    codes.append(ridge**0.5 * torch.eye(len(rows), dtype=torch.double))
    wanted.append(torch.zeros(len(rows), D, dtype=torch.double))
    return torch.linalg.lstsq(torch.cat(codes), torch.cat(wanted)).solution.float()


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 12), rows=st.integers(1, 12), seed=st.integers(0, 99))
def test_tall_and_wide_systems_give_the_least_squares_solution(tokens, rows, seed):
    """More tokens than rows is solved in the rows, fewer in the tokens."""
    encode, every = encoder(rows, seed), torch.arange(rows)
    terms = [term(tokens, 1.0, seed), term(2, 0.1, seed + 1, wanted=False)]
    system = ridge_system(encode, terms, every)
    assert type(system) is (TokenSystem if tokens + 2 <= rows else RowSystem)
    found = system.solve(0.05)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, least_squares(encode, terms, 0.05, every), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("tokens", [4, 40], ids=["fewer tokens", "more tokens"])
def test_solved_again_on_some_rows(tokens):
    encode, rows = encoder(20), torch.tensor([0, 2, 3, 7, 9, 11, 12, 15, 17, 19])
    terms = [term(tokens, 1.0, 0), term(3, 0.5, 1, wanted=False)]
    kept = torch.tensor([1, 4, 8])
    found = ridge_system(encode, terms, rows).solve(0.02, kept)
    wanted = least_squares(encode, terms, 0.02, rows[kept])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_both_systems_agree_however_the_tokens_are_cut(monkeypatch):
    encode, rows = encoder(15), torch.arange(15)
    terms = [term(30, 1.0, 0), term(11, 0.3, 1, wanted=False)]
    whole = RowSystem.of(encode, terms, rows).solve(0.01)
    sizes = []
    monkeypatch.setattr(ridge, "CHUNK", 4)

    def watched(z):
        sizes.append(len(z))
        return encode(z)

    torch.testing.assert_close(RowSystem.of(watched, terms, rows).solve(0.01), whole)
    torch.testing.assert_close(TokenSystem.of(watched, terms, rows).solve(0.01), whole)
    # Never more codes at once than a chunk's.
    assert max(sizes) == 4 and sum(sizes) == 2 * 41


def test_a_survey_is_of_all_tokens(monkeypatch):
    monkeypatch.setattr(ridge, "CHUNK", 5)
    encode, own = encoder(9), term(13, 1.0, 3)
    codes = encode(own.z)
    codes[:, 4] = 0

    def without_the_fifth(z):
        found = encode(z)
        found[:, 4] = 0
        return found

    found = survey(without_the_fifth, own)
    assert found.active.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    torch.testing.assert_close(found.rms, codes.square().mean(0).sqrt())
    assert found.mean_square == pytest.approx(float(codes.square().sum(1).mean()))
    assert found.least == int((codes > 0).sum(1).min())


def test_a_heavier_term_is_met_more_closely():
    encode, rows = encoder(4), torch.arange(4)

    def error(weight: float) -> float:
        first, second = term(8, weight, 0), term(8, 1.0, 1)
        change = ridge_system(encode, [first, second], rows).solve(1e-3)
        return float((encode(first.z) @ change - first.wanted).norm())

    assert error(100.0) < error(1.0) < error(0.01)


def test_an_empty_term_changes_nothing():
    encode, rows = encoder(4), torch.arange(4)
    full, empty = term(6, 1.0, 0), term(0, 0.1, 1, wanted=False)
    both, alone = (RowSystem.of(encode, terms, rows) for terms in ([full, empty], [full]))
    assert torch.equal(both.solve(0.1), alone.solve(0.1))


def test_the_rows_that_do_the_work_are_kept_in_order():
    change = torch.tensor([[1.0, 0.0], [0.0, 3.0], [9.0, 0.0], [0.0, 2.0]])
    rms = torch.tensor([4.24, 1.0, 0.1, 1.0])
    # Strengths: 4.24, 3, 0.9, 2.
    assert strongest_rows(change, rms, 1).tolist() == [0]
    assert strongest_rows(change, rms, 2).tolist() == [0, 1]
    assert strongest_rows(change, rms, 3).tolist() == [0, 1, 3]


def test_rows_without_effect_never_fill_the_budget():
    change = torch.tensor([[1.0], [0.0], [1.0]])
    rms = torch.tensor([1.0, 1.0, 0.0])
    assert strongest_rows(change, rms, 3).tolist() == [0]
