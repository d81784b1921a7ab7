import pytest
import torch

from microedit_kernels.carried_change import carried_change, carried_weights
from microedit_kernels.sparse_decode import row_map

N, D, K = 20, 6, 3


def codes(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    acts = torch.rand(*shape, K, generator=random)
    indices = torch.rand(*shape, N, generator=random).argsort(-1)[..., :K]
    return acts, indices


def change() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.tensor([0, 3, 4, 9, 11, 17, 19])
    random = torch.Generator().manual_seed(1)
    return rows, torch.randn(len(rows), D, generator=random)


def test_weights_are_the_squared_gains_of_the_tokens_that_count():
    dist = torch.tensor([0.2, 1.5, 1.0, 0.4, 0.0])
    counted = torch.tensor([True, True, True, True, False])
    found = carried_weights(dist, torch.ones(5), counted)
    wanted = torch.tensor([0.64, 0.0, 0.0, 0.36, 0.0])
    torch.testing.assert_close(found, wanted / wanted.sum())


@pytest.mark.parametrize("dist", [1.0, 2.0])
def test_where_nothing_is_gained_nothing_is_carried(dist):
    weights = carried_weights(torch.full((2, 4), dist), torch.ones(2, 4), torch.ones(2, 4) > 0)
    assert torch.equal(weights, torch.zeros(2, 4))
    rows, values = change()
    found = carried_change(*codes(2, 4), weights, row_map(rows, N), values)
    assert torch.equal(found, torch.zeros(2, D))


def test_the_change_is_that_of_each_code_times_its_tokens_weight():
    acts, indices = codes(2, 4)
    weights = torch.rand(2, 4, generator=torch.Generator().manual_seed(2))
    rows, values = change()
    dense = torch.zeros(N, D)
    dense[rows] = values
    wanted = torch.zeros(2, D)
    for sequence in range(2):
        for token in range(4):
            for act, index in zip(acts[sequence, token], indices[sequence, token], strict=True):
                wanted[sequence] += weights[sequence, token] * act * dense[index]
    found = carried_change(acts, indices, weights, row_map(rows, N), values)
    torch.testing.assert_close(found, wanted)


def test_neither_places_behind_nor_other_sequences_change_a_bit():
    acts, indices = codes(3, 64)
    random = torch.Generator().manual_seed(3)
    dist, counted = torch.rand(3, 64, generator=random), torch.ones(3, 64, dtype=torch.bool)
    counted[0, 5:] = False
    rows, values = change()

    def carried(some: slice, width: int) -> torch.Tensor:
        place = some, slice(0, width)
        weights = carried_weights(dist[place], torch.ones_like(dist)[place], counted[place])
        return carried_change(acts[place], indices[place], weights, row_map(rows, N), values)

    assert torch.equal(carried(slice(0, 3), 64)[:1], carried(slice(0, 1), 5))
