import math

import pytest
import torch

from microedit_kernels.edit_change import (
    EditRows,
    GroupedSets,
    edit_change,
    grouped_edit_change,
    threshold_acts,
)
from microedit_kernels.row_plan import group_rows
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


def make_rows(size: int, with_bias: bool = True) -> EditRows:
    b_dec = torch.randn(D) if with_bias else None
    return EditRows(torch.randn(size, D), torch.randn(size), b_dec, torch.randn(size, D), 0.3)


def test_grouped_sets_change_each_row_by_its_own_set():
    torch.manual_seed(0)
    sets = [make_rows(5), make_rows(0), make_rows(70, with_bias=False)]
    z = torch.randn(6, D)
    rows, offsets = group_rows(torch.tensor([2, -1, 0, 1, 2, 0], dtype=torch.int32), 3)
    found = grouped_edit_change(z, rows, offsets, GroupedSets.join(sets))
    for delta, row, key in zip(found, [2, 5, 3, 0, 4], [0, 0, 1, 2, 2], strict=True):
        torch.testing.assert_close(delta, edit_change(z[row], *sets[key]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tile", "part"), [(16, 16), (16, 64), (64, 128)])
def test_joined_sets_are_cut_so_that_every_latent_has_one_program(tile, part):
    sizes = (5, 0, 129, 64, 1)
    joined = GroupedSets.join([make_rows(size) for size in sizes], tile, part)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    assert (joined.sizes, joined.max_latents) == (sizes, 129)
    for work, most, step in (
        (joined.tiles, tile, tile),
        (joined.even_tiles, 16, 16),
        (joined.parts, part, joined.step),
        (joined.even_parts, joined.step, joined.step),
    ):
        covered = [at for _, first, end, *_ in work.tolist() for at in range(first, end)]
        assert covered == list(range(sum(sizes)))
        for key, first, end, place, index, count in work.tolist():
            assert place == first - starts[key]
            assert 0 < end - first <= most
            assert place % step == 0
            assert count == -(-sizes[key] // most)
            assert 0 <= index < count
    assert (joined.shares, joined.even_shares) == (
        joined.parts[:, 5].max(),
        joined.even_parts[:, 5].max(),
    )
    assert joined.max_parts == len(joined.even_parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.empty(4, D)}, r"not both \[c, 7\]"),
        ({"W_enc": torch.empty(5, D + 1)}, r"not both \[c, 7\]"),
        ({"b_enc": torch.empty(4)}, r"b_enc is not \[5\]"),
        ({"b_dec": torch.empty(D + 1)}, r"b_dec is not \[7\]"),
        ({"values": torch.empty(5, D, dtype=torch.bfloat16)}, "dtypes"),
    ],
)
def test_sets_that_do_not_fit_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"set 1: .*{message}"):
        GroupedSets.join([make_rows(5), make_rows(5)._replace(**changes)])


def test_impossible_cuts_are_refused():
    with pytest.raises(ValueError, match="no edit set"):
        GroupedSets.join([])
    for tile, part in [(8, 64), (48, 96), (64, 32), (64, 96)]:
        with pytest.raises(ValueError, match=f"tile {tile} "):
            GroupedSets.join([make_rows(5)], tile, part)
