import math

import pytest
import torch

from microedit_kernels.edit_change import edit_change, threshold_acts
from microedit_kernels.topk_encode import pre_acts

N, D = 23, 7


def test_threshold_keeps_what_lies_above_it():
    pre = torch.tensor([-1.0, 0.0, 0.5, 0.5000001, 2.0, math.nan])
    assert threshold_acts(pre, 0.5).tolist() == [0.0, 0.0, 0.0, pytest.approx(0.5), 2.0, 0.0]


def test_a_negative_threshold_is_relu():
    assert threshold_acts(torch.tensor([-1.0, -0.1, 0.3]), -5.0).tolist() == [
        0.0,
        0.0,
        pytest.approx(0.3),
    ]


@pytest.mark.parametrize("shape", [(5,), (1,), (2, 3), (0,)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_change_is_the_dense_product_over_all_latents(shape, with_bias):
    torch.manual_seed(0)
    W_enc, b_enc = torch.randn(N, D), torch.randn(N)
    b_dec = torch.randn(D) if with_bias else None
    rows, values = torch.tensor([2, 3, 11, 22]), torch.randn(4, D)
    z, theta = torch.randn(*shape, D), 0.4
    W_change = torch.zeros(N, D)
    W_change[rows] = values
    pre = pre_acts(z, W_enc, b_enc, b_dec)
    expected = torch.where(pre > theta, pre, 0.0) @ W_change
    found = edit_change(z, W_enc[rows], b_enc[rows], b_dec, values.bfloat16(), theta)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # bf16 values
    found = edit_change(z, W_enc[rows], b_enc[rows], b_dec, values, theta)
    torch.testing.assert_close(found, expected)


def test_a_row_under_the_threshold_is_exactly_zero():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    delta = edit_change(
        z, torch.tensor([[1.0, 0.0]]), torch.zeros(1), None, torch.ones(1, 2), theta=0.5
    )
    assert delta.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_no_changed_row_is_zero():
    nothing = torch.empty(0, D)
    delta = edit_change(torch.randn(3, D), nothing, torch.empty(0), None, nothing, 0.0)
    assert torch.equal(delta, torch.zeros(3, D))
