import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_kernels.topk_encode import (
    pre_acts,
    reference,
    select_topk,
    topk_by_key,
    topk_encode,
)
from microedit_kernels.topk_encode.cpu import (
    GROUP,
    LEAST_ELEMENTS,
    LEAST_LATENTS_PER_K,
    topk_by_group,
    topk_on_cpu,
)

# Few distinct values, so that nearly every row has ties, many of them across the k-th place.
VALUES = [0.0, -0.0, 1.0, -1.0, 2.5, math.inf, -math.inf, math.nan]


def sorted_in_full(rows: list[list[float]], k: int) -> list[list[int]]:
    """The definition in plain Python: descending, NaN highest, ties to the lower index."""

    def rank(row: list[float], index: int) -> tuple[bool, float, int]:
        value = row[index]
        return (not math.isnan(value), 0.0 if math.isnan(value) else -value, index)

    return [sorted(range(len(row)), key=lambda index: rank(row, index))[:k] for row in rows]


@st.composite
def rows_and_k(draw):
    n = draw(st.integers(1, 12))
    k = draw(st.integers(1, n))
    row = st.lists(st.sampled_from(VALUES), min_size=n, max_size=n)
    return draw(st.lists(row, min_size=1, max_size=4)), k


@settings(deadline=None, max_examples=300)
@given(rows_and_k())
def test_select_is_a_stable_full_sort(case):
    rows, k = case
    acts = torch.tensor(rows)
    top_acts, top_indices = select_topk(acts, k)
    assert top_indices.tolist() == sorted_in_full(rows, k)
    # Bit for bit: −0.0 and NaN must come out as they went in.
    expected = acts.gather(-1, top_indices)
    assert torch.equal(top_acts.view(torch.int32), expected.view(torch.int32))


@settings(deadline=None, max_examples=300)
@given(rows_and_k())
def test_selecting_by_key_is_the_same_sort(case):
    rows, k = case
    assert topk_by_key(torch.tensor(rows), k).tolist() == sorted_in_full(rows, k)


@settings(deadline=None, max_examples=300)
@given(rows_and_k())
def test_the_reference_is_the_same_sort(case):
    rows, k = case
    top_acts, top_indices = reference.select_topk(torch.tensor(rows), k)
    assert top_indices.tolist() == sorted_in_full(rows, k)
    assert top_acts.shape == top_indices.shape


@st.composite
def long_rows_and_k(draw):
    """A few groups and often an incomplete one: a mass of ties with some latents strewn in."""
    n = draw(st.integers(1, 5 * GROUP))
    k = draw(st.integers(1, n))
    seed = draw(st.integers(0, 2**31))
    random = torch.Generator().manual_seed(seed)
    num_rows = draw(st.integers(1, 3))
    rows = torch.full((num_rows, n), draw(st.sampled_from(VALUES)))
    strewn = torch.rand(num_rows, n, generator=random) < draw(st.sampled_from([0.02, 0.3, 1.0]))
    pool = draw(st.lists(st.sampled_from([*VALUES, 3.0, -2.0, 1e-45]), min_size=1))
    picked = torch.randint(len(pool), (num_rows, n), generator=random)
    return torch.where(strewn, torch.tensor(pool)[picked], rows), k


@settings(deadline=None, max_examples=300)
@given(long_rows_and_k())
def test_selecting_by_group_is_the_same_sort(case):
    rows, k = case
    wanted = sorted_in_full(rows.tolist(), k)
    assert topk_by_group(rows, k).tolist() == wanted
    assert topk_on_cpu(rows, k).tolist() == wanted


@pytest.mark.parametrize("positives", [0, 1, 11, 12, 13, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_relu_leaves_any_number_of_positives(positives, dtype):
    """Of a size that goes by groups, which end in an incomplete one."""
    k, num_rows, n = 12, 9, 8009
    assert num_rows * n >= LEAST_ELEMENTS and n >= LEAST_LATENTS_PER_K * k and n % GROUP
    random = torch.Generator().manual_seed(positives)
    acts = torch.zeros(num_rows, n, dtype=dtype)
    for row in acts:
        where = torch.randperm(n, generator=random)[:positives]
        row[where] = torch.rand(positives, generator=random).to(dtype) + 0.1
    acts[0, -1] = 7.0
    top_acts, top_indices = select_topk(acts, k)
    wanted = acts.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top_indices, wanted.indices[:, :k])
    assert torch.equal(top_acts, wanted.values[:, :k])


def test_selection_does_not_change_what_it_reads():
    for dtype in (torch.float32, torch.bfloat16):
        acts = torch.randn(3, 100, dtype=dtype)
        acts[:, ::7] = -0.0
        before = acts.clone()
        topk_by_key(acts, 5), topk_by_group(acts, 5)
        assert torch.equal(acts.view(torch.int8), before.view(torch.int8))


def test_rows_that_are_a_view_are_selected_as_their_copy():
    whole = torch.randn(4, 6, 300)
    part = whole[:, 1:5:2, 7:]
    assert torch.equal(select_topk(part, 9)[1], select_topk(part.contiguous(), 9)[1])
    rows = whole.view(24, 300).T
    assert torch.equal(topk_by_group(rows, 3), topk_by_key(rows, 3))


def test_doubles_that_agree_in_fp32_are_told_apart():
    acts = torch.tensor([[1.0, 1.0 + 1e-12, 1.0]], dtype=torch.float64)
    assert select_topk(acts, 2)[1].tolist() == [[1, 0]]


@pytest.mark.parametrize("shape", [(5, 123), (1, 7), (3, 2, 41), (129,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_shapes_match_the_stable_sort(shape, dtype):
    torch.manual_seed(0)
    acts = torch.randn(shape).to(dtype)  # bf16 has ties among 123 values
    k = min(6, shape[-1])
    top_acts, top_indices = select_topk(acts, k)
    ordered = acts.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top_indices, ordered.indices[..., :k])
    assert torch.equal(top_acts, ordered.values[..., :k])
    assert top_acts.dtype == dtype


def test_a_tie_across_the_boundary_goes_to_the_lower_index():
    acts = torch.zeros(1, 1000)
    acts[0, [900, 10, 500, 20]] = 1.0
    acts[0, 700] = 2.0
    assert select_topk(acts, 3)[1].tolist() == [[700, 10, 20]]


def test_an_all_equal_row_gives_its_first_indices():
    assert select_topk(torch.full((2, 513), 3.0), 17)[1].tolist() == [list(range(17))] * 2


def test_k_equal_to_n_sorts_the_row():
    acts = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    assert select_topk(acts, 4)[1].tolist() == [[1, 3, 2, 0]]


def test_no_row():
    top_acts, top_indices = select_topk(torch.empty(0, 9), 4)
    assert top_acts.shape == top_indices.shape == (0, 4)
    assert topk_by_group(torch.empty(0, 99), 4).shape == (0, 4)
    acts, indices = topk_encode(torch.empty(0, 3), torch.ones(9, 3), torch.zeros(9), 4)
    assert acts.shape == indices.shape == (0, 4)


def test_selection_passes_gradient_to_the_chosen_places_only():
    acts = torch.tensor([[1.0, 4.0, 2.0, 4.0]], requires_grad=True)
    top_acts, _ = select_topk(acts, 2)
    (top_acts * torch.tensor([10.0, 100.0])).sum().backward()
    assert acts.grad.tolist() == [[0.0, 10.0, 0.0, 100.0]]


def test_pre_acts_subtract_the_decoder_bias_and_accumulate_in_fp32():
    torch.manual_seed(0)
    z = torch.randn(2, 3, 8).bfloat16()
    W_enc, b_enc, b_dec = torch.randn(11, 8), torch.randn(11), torch.randn(8)
    expected = (z.double() - b_dec.double()) @ W_enc.double().T + b_enc.double()
    found = pre_acts(z, W_enc, b_enc, b_dec)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    without = z.double() @ W_enc.double().T + b_enc.double()
    torch.testing.assert_close(pre_acts(z, W_enc, b_enc).double(), without, rtol=1e-5, atol=1e-5)


def test_encode_applies_relu_before_the_selection():
    W_enc = torch.tensor([[1.0], [-1.0], [2.0], [-3.0]])
    acts, indices = topk_encode(torch.tensor([[1.0]]), W_enc, torch.zeros(4), 3)
    assert indices.tolist() == [[2, 0, 1]]
    assert acts.tolist() == [[2.0, 1.0, 0.0]]
