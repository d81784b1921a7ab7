import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_kernels.switch import (
    apply_delta,
    apply_replace,
    decide,
    smallest_runs,
)

M, D = 6, 5


def ard(dist, weight, run=0, counted=None):
    """`smallest_runs` of one sequence."""
    dist, weight = torch.tensor(dist), torch.tensor(weight)
    counted = torch.ones(len(dist)) if counted is None else torch.tensor(counted)
    found = smallest_runs(dist[None], weight[None], counted.bool()[None], run)
    assert found.shape == (1,)
    return float(found)


def test_absolute_ard_is_the_mean_over_alpha():
    assert ard([1.0, 2.0, 6.0], [600.0] * 3) == pytest.approx(0.005)


def test_relative_ard_is_a_ratio_of_sums():
    assert ard([1.0, 2.0], [4.0, 8.0]) == 0.25
    assert ard([4.0, 8.0], [4.0, 8.0]) == 1.0


@pytest.mark.parametrize("run", [0, 8])
@pytest.mark.parametrize("size", [0, 3, 20])
def test_nothing_scored_is_infinitely_far(run, size):
    found = ard([1.0] * size, [1.0] * size, run, [False] * size)
    assert found == math.inf
    assert not bool(decide(torch.tensor(found), tau=1e9))


def test_a_perfect_unedited_reconstruction_divides_by_no_zero():
    assert math.isfinite(ard([0.0] * 3, [0.0] * 3))
    assert ard([1.0] * 3, [0.0] * 3) > 1e30
    assert ard([1.0] * 9, [0.0] * 9, run=2) > 1e30


@st.composite
def sequences(draw):
    """Sequences of one batch: (dist, weight, counts) per token, padded with tokens to ignore."""
    token = st.tuples(st.floats(0, 100), st.floats(0.1, 100), st.booleans())
    return draw(st.lists(st.lists(token, max_size=20), min_size=1, max_size=4))


@settings(deadline=None, max_examples=200)
@given(sequences(), st.integers(0, 9))
def test_smallest_runs_are_the_brute_force_minima(batch, run):
    width = max(map(len, batch))
    padded = [[*tokens, *[(math.nan, 0.0, False)] * (width - len(tokens))] for tokens in batch]
    columns = torch.tensor(padded, dtype=torch.float).reshape(len(batch), width, 3).unbind(-1)
    found = smallest_runs(columns[0], columns[1], columns[2].bool(), run)
    for tokens, smallest in zip(batch, found.tolist(), strict=True):
        pairs = [(d, w) for d, w, counts in tokens if counts]
        length = len(pairs) if run == 0 else min(run, len(pairs))
        ratios = [
            sum(d for d, _ in pairs[start : start + length])
            / sum(w for _, w in pairs[start : start + length])
            for start in range(len(pairs) - length + 1 if pairs else 0)
        ]
        assert smallest == pytest.approx(min(ratios, default=math.inf), rel=1e-4, abs=1e-6)


def test_the_switch_is_on_at_tau_and_off_for_nan():
    ard = torch.tensor([0.5, 0.9, 0.90001, math.inf, math.nan])
    assert decide(ard, 0.9).tolist() == [True, True, False, False, False]
    assert decide(ard, 0.9).dtype == torch.bool


@pytest.fixture(params=["fused", "single"])
def stream(request):
    """hidden_states and residual; every row but 1 and 4 is NaN, so that touching one shows."""
    hidden_states, residual = torch.full((M, D), math.nan), torch.full((M, D), math.nan)
    torch.manual_seed(0)
    hidden_states[[1, 4]], residual[[1, 4]] = torch.randn(2, D), torch.randn(2, D)
    return hidden_states, residual if request.param == "fused" else None


def total(hidden_states, residual):
    return hidden_states if residual is None else hidden_states + residual


def untouched(tensor, before):
    others = [0, 2, 3, 5]
    return torch.equal(tensor[others].view(torch.int32), before[others].view(torch.int32))


def check_untouched(stream, before):
    assert all(
        untouched(now, then) for now, then in zip(stream, before, strict=True) if now is not None
    )


def copied(stream):
    return tuple(None if t is None else t.clone() for t in stream)


def test_replace_puts_z_hat_into_its_rows_and_no_other(stream):
    before, z_hat = copied(stream), torch.randn(2, D)
    apply_replace(*stream, torch.tensor([4, 1]), z_hat)
    assert torch.equal(total(*stream)[[4, 1]], z_hat)
    check_untouched(stream, before)


def test_a_masked_row_keeps_its_bits(stream):
    before, z_hat = copied(stream), torch.randn(3, D)
    apply_replace(*stream, torch.tensor([4, 0, 1]), z_hat, torch.tensor([True, False, False]))
    assert torch.equal(total(*stream)[4], z_hat[0])
    for now, then in zip(stream, before, strict=True):
        if now is not None:
            assert torch.equal(now[:4].view(torch.int32), then[:4].view(torch.int32))


def test_delta_adds_to_its_rows_and_no_other(stream):
    before, delta = copied(stream), torch.randn(2, D)
    z = total(*before)[[4, 1]]
    apply_delta(*stream, torch.tensor([4, 1]), delta)
    assert torch.equal(total(*stream)[[4, 1]], z + delta)
    check_untouched(stream, before)


def test_no_row_changes_nothing(stream):
    before, nothing = copied(stream), torch.empty(0, dtype=torch.int64)
    apply_replace(*stream, nothing, torch.empty(0, D))
    apply_delta(*stream, nothing, torch.empty(0, D))
    for now, then in zip(stream, before, strict=True):
        assert now is None or torch.equal(now.view(torch.int32), then.view(torch.int32))


def test_delta_in_bf16_is_added_in_fp32():
    """256 + 1.003 lies above the midpoint of 256 and 258; with δ rounded to 1.0 it would not."""
    hidden_states = torch.tensor([[0.0]]).bfloat16()
    residual = torch.tensor([[256.0]]).bfloat16()
    apply_delta(hidden_states, residual, torch.tensor([0]), torch.tensor([[1.003]]))
    assert (hidden_states + residual).tolist() == [[258.0]]
    assert hidden_states.dtype == residual.dtype == torch.bfloat16


def test_delta_sums_z_in_the_streams_own_dtype():
    """256 + 1 is 256 in bf16, which is the z that the model itself goes on with."""
    hidden_states = torch.tensor([[1.0]]).bfloat16()
    residual = torch.tensor([[256.0]]).bfloat16()
    apply_delta(hidden_states, residual, torch.tensor([0]), torch.tensor([[0.5]]))
    assert (hidden_states + residual).tolist() == [[256.0]]
