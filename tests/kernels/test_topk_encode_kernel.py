"""The Triton encode against a stable sort of its own pre-activations, and those against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_kernels.topk_encode import folded_bias, input_norm, select_topk
from microedit_kernels.topk_encode.kernel import (
    EncodeScratch,
    InputNorm,
    merge_candidates,
    topk_encode,
)
from microedit_kernels.topk_encode.launch import EncodeConfig

SMALL = EncodeConfig(16, 64, 32, 4, 2)
UNTOUCHED = -7


class Case:
    """One encode of poisoned buffers, by default every row of z."""

    def __init__(self, z, W_enc, bias, k, rows=None, scratch=None, **options):
        device, M = z.device, len(z)
        rows = torch.arange(M) if rows is None else torch.tensor(rows, dtype=torch.int64)
        self.z, self.W_enc, self.bias, self.k = z, W_enc, bias, k
        self.rows = rows.to(device)
        self.scratch = scratch or EncodeScratch.allocate(M, len(W_enc), k, device)
        for buffer in vars(self.scratch).values():
            buffer.fill_(torch.nan if buffer.is_floating_point() else 1 << 30)
        self.top_acts = torch.full((M, k), torch.nan, device=device)
        self.top_indices = torch.full((M, k), UNTOUCHED, dtype=torch.int32, device=device)
        padded = torch.full((M,), 1 << 30, dtype=torch.int32, device=device)
        padded[: len(rows)] = self.rows
        count = torch.tensor([len(rows)], dtype=torch.int32, device=device)
        options = {"config": SMALL, "relu": True} | options
        self.relu = options["relu"]
        topk_encode(
            *(z, padded, count, W_enc, bias, k, self.top_acts, self.top_indices, self.scratch),
            **options,
        )

    def check(self):
        """Exactly the stable sort's set, acts to match, in ascending order; the rest untouched."""
        active = len(self.rows)
        pre = self.scratch.pre[:active]
        acts, indices = select_topk(pre, self.k)
        order = indices.sort(dim=-1)
        torch.testing.assert_close(self.top_indices[:active].long(), order.values, rtol=0, atol=0)
        expected = acts.gather(-1, order.indices)
        torch.testing.assert_close(self.top_acts[:active], expected, rtol=0, atol=0, equal_nan=True)
        assert (self.top_indices[active:] == UNTOUCHED).all()
        assert self.top_acts[active:].isnan().all()
        return self

    def check_pre(self, z=None, tolerance=1e-5):
        exact = (self.z if z is None else z)[self.rows].double() @ self.W_enc.double().T
        exact += self.bias.double()
        if self.relu:
            exact = exact.relu()
        error = (self.scratch.pre[: len(self.rows)].double() - exact).norm()
        assert error <= tolerance * exact.norm(), error / exact.norm()
        return self


def random_case(M, d, n, device, dtype=torch.bfloat16, integers=False):
    generator = torch.Generator().manual_seed(M + d + n)
    if integers:  # exact sums, and ties by the dozen
        z = torch.randint(-2, 3, (M, d), generator=generator)
        W = torch.randint(-1, 2, (n, d), generator=generator)
        bias = torch.zeros(n)
    else:
        z = torch.randn(M, d, generator=generator)
        W = torch.randn(n, d, generator=generator) / d**0.5
        bias = torch.randn(n, generator=generator) / 10
    return z.to(device, dtype), W.to(device, dtype), bias.to(device)


@pytest.mark.parametrize(
    "M, d, n, k",
    [(1, 64, 512, 16), (5, 123, 457, 7), (17, 96, 1000, 19), (3, 32, 40, 40), (2, 33, 1, 1)],
)
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_odd_shapes_and_ties(M, d, n, k, integers, relu, device):
    case = Case(*random_case(M, d, n, device, integers=integers), k, relu=relu)
    case.check().check_pre()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype, device):
    Case(*random_case(4, 64, 200, device, dtype), 10).check().check_pre()


def test_a_stream_of_another_dtype_than_the_weights(device):
    z, W, bias = random_case(4, 64, 200, device)
    Case(z.float() * 1.001, W, bias, 10).check().check_pre()


def test_only_active_rows_are_encoded(device):
    z, W, bias = random_case(9, 64, 300, device)
    z[[0, 3, 8]] = torch.nan
    Case(z, W, bias, 12, rows=[1, 2, 4, 5, 6, 7]).check().check_pre()


@pytest.mark.parametrize("rows", [[], [2], [0, 1, 2, 3]])
def test_none_one_and_every_row(rows, device):
    Case(*random_case(4, 64, 300, device), 12, rows=rows).check()


def test_chunks_bound_the_scratch_and_change_nothing(device):
    # Integers: the interpreter's dot is numpy's, whose rounding depends on a row's place.
    z, W, bias = random_case(11, 64, 300, device, integers=True)
    whole = Case(z, W, bias, 12, rows=[0, 2, 3, 4, 5, 6, 8, 9, 10])
    scratch = EncodeScratch.allocate(4, 300, 12, device)
    chunked = Case(z, W, bias, 12, rows=whole.rows.tolist(), scratch=scratch)
    assert torch.equal(chunked.top_indices, whole.top_indices)
    assert torch.equal(chunked.top_acts.nan_to_num(), whole.top_acts.nan_to_num())


def test_the_scratch_is_as_large_as_it_says(device):
    del device
    sizes = EncodeScratch.allocate(16384, 131072, 192, torch.device("meta"))
    assert sizes.pre.numel() * 4 <= EncodeScratch.BYTES
    assert len(EncodeScratch.allocate(16384, 262144, 512, torch.device("meta")).pre) >= 128


def test_stale_scratch_is_harmless(device):
    scratch = EncodeScratch.allocate(6, 300, 12, device)
    first = random_case(6, 64, 300, device)
    Case(*first, 12, scratch=scratch)
    z, W, bias = random_case(5, 64, 300, device, integers=True)
    again = Case(z, W, bias, 12, rows=[1, 3], scratch=scratch).check()
    alone = Case(z, W, bias, 12, rows=[1, 3]).check()
    assert torch.equal(again.top_indices, alone.top_indices)


def test_normalised_input(device):
    z, W, bias = random_case(6, 64, 300, device)
    z = z * 3 + 1
    for kind in ("rms", "layer"):
        scale, shift = input_norm(z, kind)
        norm = InputNorm(scale, shift, W.float().sum(-1))
        wanted = (z.double() - shift.double()[:, None]) * scale.double()[:, None]
        Case(z, W, bias, 12, norm=norm).check().check_pre(wanted)


def test_b_dec_folded_into_the_bias_is_b_dec_subtracted(device):
    z, W, b_enc = random_case(6, 64, 300, device)
    b_dec = torch.randn(64, device=device)
    case = Case(z, W, folded_bias(W, b_enc, b_dec), 12).check()
    exact = ((z.double() - b_dec.double()) @ W.double().T + b_enc.double()).relu()
    assert (case.scratch.pre.double() - exact).norm() / exact.norm() < 1e-5


VALUES = [0.0, -0.0, 1.0, -1.0, 2.5, torch.inf, -torch.inf, torch.nan]


@st.composite
def planted(draw):
    n = draw(st.integers(1, 70))
    k = draw(st.integers(1, n))
    row = st.lists(st.sampled_from(VALUES), min_size=n, max_size=n)
    return torch.tensor(draw(row)), k, draw(st.booleans())


@settings(deadline=None, max_examples=60)
@given(planted())
def test_special_values_rank_as_torch_ranks_them(case):
    """The bias alone is the pre-activation, so that any value can be planted."""
    bias, k, relu = case
    z, W = torch.zeros(1, 16, dtype=torch.bfloat16), torch.zeros(len(bias), 16)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case(z.to(device), W.bfloat16().to(device), bias.to(device), k, relu=relu).check()
    expected = bias.relu() if relu else bias
    torch.testing.assert_close(case.scratch.pre[0].cpu(), expected, equal_nan=True)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(16, 70), st.integers(1, 300), st.data())
def test_any_shape(M, d, n, data):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    k = data.draw(st.integers(1, min(n, 64)))
    rows = sorted(data.draw(st.sets(st.integers(0, M - 1))))
    integers = data.draw(st.booleans())
    Case(*random_case(M, d, n, device, integers=integers), k, rows=rows).check()


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "one group", "spread"])
def test_adversarial_orders(order, device):
    n, k = 700, 40
    values = torch.arange(n).float()
    bias = {
        "ascending": values,
        "descending": values.flip(0),
        "equal": torch.ones(n),
        "one group": torch.where((values >= 64) & (values < 128), values, 0.0),
        "spread": torch.where(values % 16 == 0, values, -values),
    }[order]
    z = torch.zeros(2, 16, dtype=torch.bfloat16, device=device)
    W = torch.zeros(n, 16, dtype=torch.bfloat16, device=device)
    Case(z, W, bias.to(device), k).check()


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("k", [8, 150])
def test_candidates_of_shards_merge_into_the_whole_top_k(shards, k, device):
    z, W, bias = random_case(5, 64, 300, device, integers=True)
    whole = Case(z, W, bias, k).check()
    offers = [torch.full((5, shards * k), fill, device=device) for fill in (torch.nan, -1.0)]
    acts, indices = offers[0], offers[1].int()
    for shard in range(shards):
        first, last = 300 * shard // shards, 300 * (shard + 1) // shards
        own = min(k, last - first)
        part = Case(z, W[first:last].contiguous(), bias[first:last], own)
        at = slice(shard * k, shard * k + own)
        acts[:, at], indices[:, at] = part.top_acts, part.top_indices + first
    top_acts = torch.full((5, k), torch.nan, device=device)
    top_indices = torch.full((5, k), UNTOUCHED, dtype=torch.int32, device=device)
    count = torch.tensor([5], dtype=torch.int32, device=device)
    merge_candidates(acts, indices, count, k, top_acts, top_indices)
    assert torch.equal(top_indices, whole.top_indices)
    assert torch.equal(top_acts, whole.top_acts)
