"""Every way to solve against a dense least-squares solver, in fp64."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_trainer.solvers import conjugate_gradients as cg
from microedit_trainer.solvers import ridge, sparse_codes
from microedit_trainer.solvers.dense_systems import RowSystem, TokenSystem
from microedit_trainer.solvers.ridge import (
    IterativeSystem,
    RefinedSystem,
    ridge_system,
    strongest_rows,
)
from microedit_trainer.solvers.sparse_codes import CodedTerms, Term, Unexplained
from microedit_vllm.errors import MicroEditError

D = 3
WAYS = (RowSystem, TokenSystem, RefinedSystem, IterativeSystem)


def unwatched(share: float, note: str) -> None:
    """Shows nothing."""


def encoder(rows: int, seed: int = 7):
    """z [N, 3] → codes [N, rows], some of them 0."""
    weights = torch.randn(D, rows, generator=torch.Generator().manual_seed(seed))
    return lambda z: (z @ weights).relu()


def term(tokens: int, weight: float, seed: int, wanted: bool = True) -> Term:
    random = torch.Generator().manual_seed(seed)
    z, target = (torch.randn(tokens, D, generator=random) for _ in "zr")
    return Term(z, target if wanted else None, weight)


def coded(encode, terms) -> CodedTerms:
    return CodedTerms.of(encode, terms, unwatched)


def least_squares(encode, terms: list[Term], ridge: float, rows: torch.Tensor) -> torch.Tensor:
    """The same minimum by √w and √ridge stacked."""
    codes = [t.weight**0.5 * encode(t.z)[:, rows].double() for t in terms]
    wanted = [
        t.weight**0.5 * (torch.zeros(len(t.z), D) if t.wanted is None else t.wanted).double()
        for t in terms
    ]
    codes.append(ridge**0.5 * torch.eye(len(rows), dtype=torch.double))
    wanted.append(torch.zeros(len(rows), D, dtype=torch.double))
    return torch.linalg.lstsq(torch.cat(codes), torch.cat(wanted)).solution.float()


def close(found, wanted) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=25)
@given(tokens=st.integers(1, 12), rows=st.integers(1, 12), seed=st.integers(0, 99))
def test_each_way_gives_the_least_squares_solution(way, tokens, rows, seed):
    encode = encoder(rows, seed)
    terms = [term(tokens, 1.0, seed), term(2, 0.1, seed + 1, wanted=False)]
    own = coded(encode, terms)
    assert own.rows.tolist() == encode(terms[0].z).any(0).nonzero()[:, 0].tolist()
    if not len(own.rows):
        return
    found = way.of(own, unwatched).solve(0.05)
    assert found.dtype == torch.float32
    close(found, least_squares(encode, terms, 0.05, own.rows))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [4, 40], ids=["fewer tokens", "more tokens"])
def test_solved_again_on_some_rows(way, tokens):
    encode = encoder(20)
    terms = [term(tokens, 1.0, 0), term(3, 0.5, 1, wanted=False)]
    own, kept = coded(encode, terms), torch.tensor([1, 4, 8])
    system = way.of(own, unwatched)
    whole = system.solve(0.02)
    close(
        system.solve(0.02, kept, start=whole[kept]),
        least_squares(encode, terms, 0.02, own.rows[kept]),
    )
    close(system.solve(0.02), whole)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codes", [0, 100, 1 << 30], ids=["none kept", "some kept", "all kept"])
def test_the_solution_is_the_same_however_much_is_kept_and_made_at_once(monkeypatch, way, codes):
    encode = encoder(15)
    terms = [term(30, 1.0, 0), term(11, 0.3, 1, wanted=False)]
    wanted = least_squares(encode, terms, 0.01, torch.arange(15))
    monkeypatch.setattr(sparse_codes, "CODES_BYTES", codes * sparse_codes.BYTES_PER_CODE)
    monkeypatch.setattr(sparse_codes, "PIECE_BYTES", 3 * 15 * 4)
    monkeypatch.setattr(sparse_codes, "PART", 8)
    monkeypatch.setattr(sparse_codes, "COLUMNS", 2)
    sizes = []

    def watched(z):
        sizes.append(len(z))
        return encode(z)

    own = coded(watched, terms)
    assert own.is_kept == (codes > 1000)
    kept = sum(len(part.kept.rows) for part in own.parts if part.kept is not None)
    assert kept <= codes and (kept > 50) == (codes > 0)
    close(way.of(own, unwatched).solve(0.01), wanted)
    assert max(sizes) <= 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codes", [0, 1 << 30], ids=["made anew", "kept"])
def test_what_a_decoder_fails_to_reconstruct_can_be_wanted(monkeypatch, way, codes):
    monkeypatch.setattr(sparse_codes, "CODES_BYTES", codes)
    encode, plain = encoder(9), term(14, 2.0, 5)
    W_dec, b_dec = torch.randn(9, D), torch.randn(D)
    rest = plain.z - encode(plain.z) @ W_dec - b_dec
    given = coded(encode, [Term(plain.z, Unexplained(W_dec, b_dec), 2.0)])
    wanted = least_squares(encode, [Term(plain.z, rest, 2.0)], 0.1, torch.arange(9))
    close(way.of(given, unwatched).solve(0.1), wanted)


def test_a_survey_is_of_all_tokens_of_the_first_term(monkeypatch):
    monkeypatch.setattr(sparse_codes, "PART", 5)
    encode, own = encoder(9), term(13, 0.25, 3)
    codes = encode(own.z)
    codes[:, 4] = 0

    def without_the_fifth(z):
        found = encode(z)
        found[:, 4] = 0
        return found

    found = coded(without_the_fifth, [own, term(4, 1.0, 8, wanted=False)]).survey
    assert found.active.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    torch.testing.assert_close(found.rms, codes.square().mean(0).sqrt())
    assert found.mean_square == pytest.approx(float(codes.square().sum(1).mean()))
    assert found.least == int((codes > 0).sum(1).min())


def test_a_heavier_term_is_met_more_closely():
    encode = encoder(4)

    def error(weight: float) -> float:
        first, second = term(8, weight, 0), term(8, 1.0, 1)
        change = ridge_system(coded(encode, [first, second]), unwatched).solve(1e-3)
        return float((encode(first.z) @ change - first.wanted).norm())

    assert error(100.0) < error(1.0) < error(0.01)


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_term_changes_nothing(way):
    full, empty = term(6, 1.0, 0), term(0, 0.1, 1, wanted=False)
    both, alone = (way.of(coded(encoder(4), t), unwatched) for t in ([full, empty], [full]))
    assert torch.equal(both.solve(0.1), alone.solve(0.1))


def chosen(tokens, rows, nonzeros):
    """The way that is taken for a problem of this size, at d = 576."""

    class Sized:
        is_kept = True
        width = 576

    sized = Sized()
    sized.tokens, sized.rows, sized.nonzeros = tokens, range(rows), tokens * nonzeros
    costs = ridge._costs(sized)
    return min(costs, key=costs.__getitem__).__self__


@pytest.mark.parametrize(
    ("tokens", "rows", "nonzeros", "way"),
    [
        (600, 4_000, 1_000, TokenSystem),
        (80_000, 4_608, 1_200, RowSystem),
        (280_000, 4_608, 64, IterativeSystem),
        # Dense codes of many rows: normal equations of 2.5 GiB in fp64.
        (80_000, 18_432, 3_000, RefinedSystem),
        (80_000, 24_576, 4_000, IterativeSystem),
        (7_000, 131_072, 192, IterativeSystem),
    ],
)
def test_the_way_is_chosen_by_size(tokens, rows, nonzeros, way):
    assert chosen(tokens, rows, nonzeros) is way


def iterative(rows=30, tokens=60, d=4, seed=0, spread=1.0):
    """A system with known fp64 solution: codes, right side, ridge."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randn(tokens, rows, generator=random) * torch.logspace(0, spread, rows)
    right = codes.T @ torch.randn(tokens, d, generator=random)
    gram = codes.double().T @ codes.double()
    wanted = torch.linalg.solve(gram + 0.1 * torch.eye(rows), right.double()).float()
    return partial(torch.matmul, gram.float()), right, gram.diagonal().float(), wanted


def test_a_block_takes_far_fewer_steps_than_its_columns_alone():
    product, right, diagonal, wanted = iterative(rows=60, tokens=70, d=12)
    together = cg.conjugate_gradients(product, right, cg.Jacobi(diagonal + 0.1), 0.1)
    alone = cg.conjugate_gradients(product, right[:, :1], cg.Jacobi(diagonal + 0.1), 0.1)
    close(together.solution, wanted)
    close(alone.solution, wanted[:, :1])
    assert together.steps <= 12 < alone.steps / 2
    assert together.residual <= cg.TOLERANCE


def test_columns_are_cut_into_blocks_that_fit(monkeypatch):
    product, right, diagonal, wanted = iterative()
    widths = []

    def watched(panel):
        widths.append(panel.shape[1])
        return product(panel)

    monkeypatch.setattr(cg, "PANELS_BYTES", 3 * 4 * cg.PANELS * 30)
    close(cg.conjugate_gradients(watched, right, cg.Jacobi(diagonal + 0.1), 0.1).solution, wanted)
    assert set(widths) == {3, 1}


def test_columns_that_depend_on_each_other_do_no_harm():
    product, right, diagonal, wanted = iterative()
    again = torch.cat([right, right, torch.zeros_like(right)], dim=1)
    found = cg.conjugate_gradients(product, again, cg.Jacobi(diagonal + 0.1), 0.1).solution
    close(found, torch.cat([wanted, wanted, torch.zeros_like(wanted)], dim=1))


def test_a_start_near_the_solution_saves_steps_and_a_far_one_is_not_taken():
    product, right, diagonal, wanted = iterative(rows=80, tokens=90, d=2)
    cold = cg.conjugate_gradients(product, right, cg.Jacobi(diagonal + 0.1), 0.1)
    near = wanted * (1 + 1e-3 * torch.randn_like(wanted))
    warm = cg.conjugate_gradients(product, right, cg.Jacobi(diagonal + 0.1), 0.1, near)
    there = cg.conjugate_gradients(product, right, cg.Jacobi(diagonal + 0.1), 0.1, cold.solution)
    far = cg.conjugate_gradients(
        product, right, cg.Jacobi(diagonal + 0.1), 0.1, 1e3 * torch.ones_like(wanted)
    )
    for found in (warm, there, far):
        close(found.solution, wanted)
    assert there.steps == 0 < warm.steps < cold.steps
    assert far.steps == cold.steps


def test_steps_are_shown_with_their_residual():
    product, right, diagonal, _ = iterative()
    shown = []
    cg.conjugate_gradients(
        product,
        right,
        cg.Jacobi(diagonal + 0.1),
        0.1,
        watch=lambda share, note: shown.append((share, note)),
    )
    shares = [share for share, _ in shown]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert shown[0][1].startswith("step 1, residual ")


def test_a_system_that_rounding_spoils_is_refused():
    own = coded(encoder(6), [term(9, 1.0, 0)])
    system = IterativeSystem.of(own, unwatched)
    system.right[0] = torch.nan
    with pytest.raises(MicroEditError, match=r"relative residual of .*; raise the solver.s ridge"):
        system.solve(0.1)


@pytest.mark.parametrize("last", [False, True])
def test_a_factor_that_rounding_spoils_is_taken_of_a_little_more(last):
    """Two rows with the same codes: in fp32 their ridge is lost."""
    own = coded(lambda z: z[:, :1].abs().expand(-1, 2) + 0.5, [term(9, 1.0, 0)])
    system = RefinedSystem.of(own, unwatched)
    gram = system._gram.clone()
    lower = system._factored(1e-7, None, last)
    torch.testing.assert_close((lower.tril() @ lower.tril().T), gram.tril() + gram.tril(-1).T)
    assert (system._gram is None) == last
    system._gram = torch.full((2, 2), torch.nan)
    if not last:
        with pytest.raises(MicroEditError, match="cannot be factored"):
            system._factored(1.0, None, last)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kept", [None, torch.tensor([1, 4, 8])], ids=["all", "some"])
def test_the_last_solve_is_as_the_others(way, kept):
    own = coded(encoder(20), [term(30, 1.0, 0), term(3, 0.5, 1, wanted=False)])
    system = way.of(own, unwatched)
    wanted = system.solve(0.02, kept)
    assert torch.equal(system.solve(0.02, kept, last=True), wanted)


def test_a_factor_far_off_costs_steps_alone():
    product, right, _, wanted = iterative(rows=60, tokens=70, d=2)
    gram = product(torch.eye(60)) + 0.1 * torch.eye(60)
    near = cg.Factor(torch.linalg.cholesky(gram))
    far = cg.Factor(torch.linalg.cholesky(gram * 3 + 50 * torch.eye(60)))
    found = [cg.conjugate_gradients(product, right, which, 0.1) for which in (near, far)]
    for each in found:
        close(each.solution, wanted)
    assert found[0].steps <= 2 < found[1].steps


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
