import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_kernels.switch import (
    absolute_ard,
    apply_delta,
    apply_replace,
    decide,
    relative_ard,
    smallest_run,
)

M, D = 6, 5
NOTHING = torch.empty(0)


def test_absolute_ard_is_the_mean_over_alpha():
    assert float(absolute_ard(torch.tensor([1.0, 2.0, 6.0]), alpha=600)) == pytest.approx(0.005)


def test_relative_ard_is_a_ratio_of_sums():
    dist, dist0 = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0])
    assert float(relative_ard(dist, dist0)) == 0.25
    assert float(relative_ard(dist0, dist0)) == 1.0


def test_nothing_scored_is_infinitely_far():
    for ard in (
        absolute_ard(NOTHING, 600),
        relative_ard(NOTHING, NOTHING),
        smallest_run(NOTHING, NOTHING, 8),
        smallest_run(NOTHING, NOTHING, 0),
    ):
        assert float(ard) == math.inf
        assert ard.shape == ()
        assert not bool(decide(ard, tau=1e9))


def test_a_perfect_unedited_reconstruction_divides_by_no_zero():
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert math.isfinite(float(relative_ard(zeros, zeros)))
    assert float(relative_ard(ones, zeros)) > 1e30
    assert float(smallest_run(torch.ones(9), torch.zeros(9), 2)) > 1e30


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0.1, 100)), min_size=1, max_size=20),
    st.integers(0, 9),
)
def test_smallest_run_is_the_brute_force_minimum(pairs, run):
    length = len(pairs) if run == 0 else min(run, len(pairs))
    ratios = [
        sum(d for d, _ in pairs[start : start + length])
        / sum(w for _, w in pairs[start : start + length])
        for start in range(len(pairs) - length + 1)
    ]
    dist, weight = (torch.tensor(column) for column in zip(*pairs, strict=True))
    found = float(smallest_run(dist, weight, run))
    assert found == pytest.approx(min(ratios), rel=1e-4, abs=1e-6)


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
