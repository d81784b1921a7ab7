import pytest
import torch

from microedit_kernels.sparse_decode import (
    decode,
    decode_change,
    row_map,
    squared_distance,
)

N, D, K = 37, 11, 4


@pytest.fixture
def dictionary():
    torch.manual_seed(0)
    return torch.randn(N, D), torch.randn(D)


def codes(shape: tuple[int, ...], below: int = N):
    top_indices = torch.rand(*shape, below).argsort(-1)[..., :K]
    return torch.rand(*shape, K) + 0.1, top_indices


def dense(top_acts, top_indices, n: int = N):
    return torch.zeros(*top_acts.shape[:-1], n).scatter(-1, top_indices, top_acts)


@pytest.mark.parametrize("shape", [(5,), (1,), (2, 3), (), (0,)])
def test_decode_is_the_dense_product(dictionary, shape):
    W_dec, b_dec = dictionary
    top_acts, top_indices = codes(shape)
    z_hat = decode(top_acts, top_indices, W_dec, b_dec)
    assert z_hat.dtype == torch.float32
    torch.testing.assert_close(z_hat, dense(top_acts, top_indices) @ W_dec + b_dec)


def test_decode_of_bf16_rows_is_in_fp32(dictionary):
    W_dec, b_dec = (t.bfloat16() for t in dictionary)
    top_acts, top_indices = codes((3,))
    expected = dense(top_acts, top_indices) @ W_dec.float() + b_dec.float()
    torch.testing.assert_close(decode(top_acts, top_indices, W_dec, b_dec), expected)


def test_decode_passes_gradient_to_acts_and_rows(dictionary):
    W_dec, b_dec = dictionary[0].requires_grad_(), dictionary[1]
    top_acts, top_indices = codes((3,))
    top_acts.requires_grad_()
    decode(top_acts, top_indices, W_dec, b_dec).sum().backward()
    torch.testing.assert_close(top_acts.grad, W_dec.detach().sum(-1)[top_indices])
    untouched = dense(torch.ones(3, K), top_indices).sum(0) == 0
    assert bool((W_dec.grad[untouched] == 0).all())
    assert bool((W_dec.grad[~untouched] != 0).all())


def test_row_map_points_back_at_the_changed_rows():
    rows = row_map(torch.tensor([7, 2, 30]), N)
    assert rows[[7, 2, 30]].tolist() == [0, 1, 2]
    assert int((rows == -1).sum()) == N - 3


def test_change_is_the_dense_product_with_the_changed_rows():
    torch.manual_seed(1)
    changed = torch.tensor([3, 5, 8, 13, 21])
    values = torch.randn(5, D)
    top_acts, top_indices = codes((40,))
    W_change = torch.zeros(N, D)
    W_change[changed] = values
    delta = decode_change(top_acts, top_indices, row_map(changed, N), values)
    torch.testing.assert_close(delta, dense(top_acts, top_indices) @ W_change)


def test_tokens_without_a_changed_row_are_exactly_unchanged(dictionary):
    W_dec, b_dec = dictionary
    changed = torch.arange(30, 37)
    values = torch.randn(7, D)
    top_acts, top_indices = codes((20,), below=30)
    rows = row_map(changed, N)
    delta = decode_change(top_acts, top_indices, rows, values)
    assert bool((delta == 0).all())
    z_hat0 = decode(top_acts, top_indices, W_dec, b_dec)
    assert torch.equal(z_hat0 + delta, z_hat0)


def test_an_empty_change_is_zero():
    top_acts, top_indices = codes((2, 3))
    rows = row_map(torch.empty(0, dtype=torch.int64), N)
    delta = decode_change(top_acts, top_indices, rows, torch.empty(0, D))
    assert delta.shape == (2, 3, D)
    assert delta.dtype == torch.float32
    assert bool((delta == 0).all())


def test_both_reconstructions_are_those_of_a_dense_decoder(dictionary):
    W_dec, b_dec = dictionary
    changed, values = torch.arange(0, N, 2), torch.randn(19, D)
    top_acts, top_indices = codes((6,))
    edited = W_dec.clone()
    edited[changed] += values
    z_hat0 = decode(top_acts, top_indices, W_dec, b_dec)
    z_hat = z_hat0 + decode_change(top_acts, top_indices, row_map(changed, N), values)
    for found, decoder in ((z_hat, edited), (z_hat0, W_dec)):
        torch.testing.assert_close(found, dense(top_acts, top_indices) @ decoder + b_dec)


def test_squared_distance_of_bf16_is_in_fp32():
    z_hat, z = torch.full((2, 3), 256.0).bfloat16(), torch.full((2, 3), 1.0).bfloat16()
    distance = squared_distance(z_hat, z)
    assert distance.dtype == torch.float32
    assert distance.tolist() == [3 * 255.0**2] * 2
