import pytest
import torch
import torch.nn.functional as F

from microedit_trainer.sae.sparse_gradient import TopkEncode, scatter_rows

BATCH, HIDDEN, WIDTH, K = 17, 12, 53, 5


def tensors(seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    # Whole numbers up to 8: their products are exact in bf16, so that the choice is too.
    x = torch.randint(-8, 9, (BATCH, HIDDEN), generator=random).float()
    W_enc = torch.randint(-8, 9, (WIDTH, HIDDEN), generator=random).float()
    b_enc = torch.rand(WIDTH, generator=random)
    return [tensor.requires_grad_() for tensor in (x, W_enc, b_enc)]


@pytest.mark.parametrize("relu", [True, False])
def test_gradient_is_the_dense_ones(relu):
    weights = torch.randn(BATCH, K, generator=torch.Generator().manual_seed(1))
    sparse, dense = tensors(), tensors()
    acts, indices = TopkEncode.apply(*sparse, K, relu)
    (acts * weights).sum().backward()
    x, W_enc, b_enc = dense
    expected = F.linear(x.bfloat16().float(), W_enc.bfloat16().float()).bfloat16().float() + b_enc
    expected = expected.gather(1, indices)
    expected = expected.relu() if relu else expected
    torch.testing.assert_close(acts, expected)
    (expected * weights).sum().backward()
    for mine, theirs in zip(sparse, dense, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.01, atol=0.5)


def test_rows_are_summed_where_they_belong():
    random = torch.Generator().manual_seed(2)
    indices = torch.randint(WIDTH, (BATCH, K), generator=random)
    weights = torch.randn(BATCH, K, generator=random)
    x = torch.randn(BATCH, HIDDEN, generator=random)
    rows, sums = scatter_rows(indices, weights, x, WIDTH)
    dense = torch.zeros(BATCH, WIDTH)
    for token in range(BATCH):
        for j in range(K):
            dense[token, indices[token, j]] += weights[token, j]
    torch.testing.assert_close(rows, dense.T @ x)
    torch.testing.assert_close(sums, dense.sum(0))


def test_a_latent_that_is_never_active_has_no_gradient():
    sparse = tensors()
    acts, indices = TopkEncode.apply(*sparse, K, True)
    acts.sum().backward()
    never = torch.ones(WIDTH, dtype=torch.bool)
    never[indices[acts > 0]] = False
    assert never.any()
    assert not sparse[1].grad[never].any()
