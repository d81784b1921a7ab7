"""The encode through an eight-bit filter against the fp64 product's stable sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_kernels.topk_encode import select_topk
from microedit_kernels.topk_encode.fp8_filter import (
    Fp8Encoder,
    Fp8Scratch,
    approximate,
    fp8_topk_encode,
)
from microedit_kernels.topk_encode.fp8_launch import Fp8Config
from microedit_kernels.topk_encode.fp8_reference import candidates, quantise
from microedit_kernels.topk_encode.launch import EncodeConfig

SMALL = Fp8Config(EncodeConfig(16, 64, 32, 4, 2), candidates=8, depth=256, lanes=2)
UNTOUCHED = -7
CODES = [torch.float8_e4m3fn, torch.int8]


def poisoned(M, n, k, device, **sizes):
    sizes = {"capacity": 64, "segment": 128} | sizes
    scratch = Fp8Scratch.allocate(M, n, k, device, **sizes)
    for buffer in [*vars(scratch).values(), *vars(scratch.encode).values()]:
        if isinstance(buffer, torch.Tensor):
            buffer.fill_(torch.nan if buffer.is_floating_point() else 1 << 30)
    scratch.report.zero_()
    return scratch


class Case:
    """One encode into poisoned buffers, by default of every row of z."""

    def __init__(self, z, encoder, k, rows=None, scratch=None, relu=True, **sizes):
        device, M = z.device, len(z)
        rows = torch.arange(M) if rows is None else torch.tensor(rows, dtype=torch.int64)
        self.z, self.encoder, self.k, self.relu = z, encoder, k, relu
        self.rows = rows.to(device)
        self.scratch = scratch or poisoned(M, len(encoder.W_enc), k, device, **sizes)
        self.top_acts = torch.full((M, k), torch.nan, device=device)
        self.top_indices = torch.full((M, k), UNTOUCHED, dtype=torch.int32, device=device)
        padded = torch.full((M,), 1 << 30, dtype=torch.int32, device=device)
        padded[: len(rows)] = self.rows
        count = torch.tensor([len(rows)], dtype=torch.int32, device=device)
        fp8_topk_encode(
            *(z, padded, count, encoder, k, self.top_acts, self.top_indices, self.scratch),
            relu=relu,
            config=SMALL,
        )

    @property
    def fallen(self):
        return self.scratch.report[1].item()

    def check(self):
        """The fp64 product's stable sort, in ascending order of index; the rest untouched."""
        active = len(self.rows)
        W = self.encoder.W_enc.double()
        exact = self.z[self.rows].double() @ W.T + self.encoder.bias.double()
        exact = exact.relu() if self.relu else exact
        acts, indices = select_topk(exact.float(), self.k)
        order = indices.sort(dim=-1)
        assert torch.equal(self.top_indices[:active].long(), order.values)
        expected = acts.gather(-1, order.indices)
        torch.testing.assert_close(
            self.top_acts[:active], expected, rtol=1e-4, atol=1e-5, equal_nan=True
        )
        assert (self.top_indices[active:] == UNTOUCHED).all()
        assert self.top_acts[active:].isnan().all()
        assert self.scratch.report[0] == active
        return self


def random_case(M, d, n, device, dtype=torch.bfloat16, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(M, d, generator=generator).to(device, dtype)
    W = (torch.randn(n, d, generator=generator) / d**0.5).to(device, dtype)
    bias = (torch.randn(n, generator=generator) / 10).to(device)
    return z, Fp8Encoder.quantise(W, bias, **options)


def integer_case(M, d, n, device, **options):
    """Exact sums, ties by the dozen, and codes without an error."""
    generator = torch.Generator().manual_seed(n)
    z = torch.randint(-2, 3, (M, d), generator=generator).to(device, torch.bfloat16)
    W = torch.randint(-1, 2, (n, d), generator=generator).to(device, torch.bfloat16)
    return z, Fp8Encoder.quantise(W, torch.zeros(n, device=device), **options)


def sparse_case(M, d, n, active, device, noise=0.2, **options):
    """What an SAE is trained for: each z a sum of few directions and noise."""
    generator = torch.Generator().manual_seed(d)
    W = torch.randn(n, d, generator=generator)
    W /= W.norm(dim=-1, keepdim=True)
    latents = torch.rand(M, n, generator=generator).topk(active).indices
    strength = 1 + torch.rand(M, active, generator=generator)
    z = torch.einsum("ma,mad->md", strength, W[latents])
    z += noise * torch.randn(M, d, generator=generator) * (active / d) ** 0.5
    W = W.to(device, torch.bfloat16)
    bias = torch.zeros(n, device=device)
    return z.to(device, torch.bfloat16), Fp8Encoder.quantise(W, bias, **options)


@pytest.mark.parametrize(
    "M, d, n, k",
    [(1, 64, 512, 16), (5, 123, 457, 7), (17, 96, 1000, 19), (3, 32, 40, 40), (2, 33, 1, 1)],
)
@pytest.mark.parametrize("case", [random_case, integer_case])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("relu", [False, True])
def test_odd_shapes_and_ties(M, d, n, k, case, codes, relu, device):
    Case(*case(M, d, n, device, codes=codes), k, relu=relu).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codes", CODES)
def test_dtypes(dtype, codes, device):
    z, encoder = random_case(4, 64, 300, device, dtype, codes=codes)
    assert Case(z, encoder, 10, capacity=300).check().fallen == 0


def test_a_stream_of_another_dtype_than_the_weights(device):
    z, encoder = random_case(4, 64, 300, device)
    Case(z.float() * 1.001, encoder, 10).check()


@pytest.mark.parametrize("codes", CODES)
def test_directions_that_stand_out_need_no_fallback(codes, device):
    z, encoder = sparse_case(6, 256, 700, 5, device, codes=codes)
    case = Case(z, encoder, 5).check()
    assert case.fallen == 0
    assert case.scratch.fallback_share() == 0.0


def test_what_the_bound_cannot_prove_falls_back_and_is_exact(device):
    z, encoder = random_case(6, 256, 700, device)
    case = Case(z, encoder, 20, capacity=20).check()
    assert case.fallen == 6
    assert case.scratch.fallback_share() == 1.0


def test_rows_of_one_batch_fall_back_one_by_one(device):
    z, encoder = sparse_case(6, 256, 700, 5, device)
    z[[1, 4]] = torch.randn(2, 256, device=device).to(z.dtype)
    case = Case(z, encoder, 5, rows=[0, 1, 3, 4, 5], capacity=8).check()
    assert case.fallen == 2
    assert case.scratch.fallback_share() == 0.4


def test_the_report_counts_on(device):
    z, encoder = sparse_case(3, 256, 300, 5, device)
    scratch = poisoned(3, 300, 5, device)
    for _ in range(2):
        Case(z, encoder, 5, scratch=scratch)
    assert scratch.report.tolist() == [6, 0]
    scratch.report.zero_()
    assert scratch.fallback_share() != scratch.fallback_share()  # NaN: no rows


def test_only_active_rows_are_encoded(device):
    z, encoder = random_case(9, 64, 300, device)
    z[[0, 3, 8]] = torch.nan
    Case(z, encoder, 12, rows=[1, 2, 4, 5, 6, 7]).check()


@pytest.mark.parametrize("rows", [[], [2], [0, 1, 2, 3]])
def test_none_one_and_every_row(rows, device):
    Case(*random_case(4, 64, 300, device), 12, rows=rows, capacity=300).check()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, 1e-35])
def test_rows_without_a_bound_fall_back(value, device):
    z, encoder = sparse_case(3, 256, 300, 5, device)
    plain = Case(z, encoder, 5).check()
    z[1, 7] = value
    if value == 1e-35:
        z[1] = value
    odd = Case(z, encoder, 5)
    assert odd.fallen == (value != 1e30)
    for row in (0, 2):
        assert torch.equal(odd.top_indices[row], plain.top_indices[row])
    if value == 1e30:
        odd.check()


@pytest.mark.parametrize("relu", [False, True])
def test_more_ties_than_there_is_space_fall_back(relu, device):
    z, encoder = integer_case(2, 32, 300, device)
    encoder.codes[:] = encoder.codes[:1]
    encoder.W_enc[:] = encoder.W_enc[:1]
    encoder.scale[:] = encoder.scale[:1]
    case = Case(z, encoder, 20, relu=relu).check()
    assert case.fallen == 2


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_biases_that_are_no_number(value, device):
    z, encoder = sparse_case(2, 256, 300, 5, device)
    bias = torch.zeros(300, device=device)
    bias[3] = value
    encoder = Fp8Encoder.quantise(encoder.W_enc, bias)
    Case(z, encoder, 7).check()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_no_number(value, device):
    z, encoder = sparse_case(2, 256, 300, 5, device)
    W = encoder.W_enc.clone()
    W[3, 5] = value
    Case(z.abs(), Fp8Encoder.quantise(W, encoder.bias), 7).check()


def test_chunks_change_nothing(device):
    z, encoder = sparse_case(11, 256, 300, 5, device)
    rows = [0, 2, 3, 4, 5, 6, 8, 9, 10]
    whole = Case(z, encoder, 5, rows=rows).check()
    scratch = poisoned(4, 300, 5, device)
    large = poisoned(11, 300, 5, device)
    shared = ("norms", "fallen", "fallen_rows", "z_rows", "spare_acts", "spare_indices")
    scratch = Fp8Scratch(**vars(scratch) | {name: getattr(large, name) for name in shared})
    chunked = Case(z, encoder, 5, rows=rows, scratch=scratch).check()
    assert torch.equal(chunked.top_indices, whole.top_indices)
    assert chunked.fallen == whole.fallen == 0


def test_stale_scratch_is_harmless(device):
    scratch = poisoned(6, 300, 12, device)
    Case(*random_case(6, 64, 300, device), 12, scratch=scratch)
    z, encoder = integer_case(5, 64, 300, device)
    scratch.report.zero_()
    again = Case(z, encoder, 12, rows=[1, 3], scratch=scratch).check()
    alone = Case(z, encoder, 12, rows=[1, 3]).check()
    assert torch.equal(again.top_indices, alone.top_indices)
    assert again.fallen == alone.fallen


def test_the_error_counts_from_the_center(device):
    z, plain = sparse_case(4, 256, 700, 5, device)
    center = 20 * torch.randn(256, device=device)
    moved = (z.float() + center).to(z.dtype)
    bias = (-plain.W_enc.double() @ center.double()).float()
    away = Case(moved, Fp8Encoder.quantise(plain.W_enc, bias), 5).check()
    near = Case(moved, Fp8Encoder.quantise(plain.W_enc, bias, center), 5).check()
    assert away.fallen == 4
    assert near.fallen == 0


def bounded(z, encoder, k, device):
    """The filter's values and their bounds, [M, n] each, and the exact values in fp64."""
    M, n = len(z), len(encoder.W_enc)
    scratch = poisoned(M, n, k, device)
    rows = torch.arange(M, dtype=torch.int32, device=device)
    norms = torch.stack([(z.float() - encoder.center).norm(dim=-1), z.float().norm(dim=-1)])
    scratch.norms[:] = norms
    count = torch.tensor([M], dtype=torch.int32, device=device)
    approximate(z, rows, count, encoder, k, scratch, 0, M, SMALL.tile)
    pre = scratch.encode.pre.double()
    bound = norms[0][:, None] * encoder.error + norms[1][:, None] * encoder.rounding
    bound = bound.double() + pre.abs() * 2**-20
    exact = z.double() @ encoder.W_enc.double().T + encoder.bias.double()
    return pre, bound, exact


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 5),
    st.integers(1, 200),
    st.integers(1, 150),
    st.sampled_from(CODES),
    st.integers(0, 99),
    st.booleans(),
    st.booleans(),
)
def test_the_error_never_passes_the_bound(M, d, n, codes, seed, worst, outliers):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    z, encoder = random_case(M, d, n, device, seed=seed, codes=codes)
    W = encoder.W_enc
    if outliers:
        W = W.clone()
        W[:, 0] *= 50
        encoder = Fp8Encoder.quantise(W, encoder.bias, torch.full((d,), 0.3, device=device), codes)
    if worst:  # z along the error of a latent: nothing could be worse
        error = W.double() - encoder.scale.double()[:, None] * encoder.codes.double()
        z[:] = (error[n // 2] * 1e3).to(z.dtype)
    pre, bound, exact = bounded(z, encoder, 1, device)
    assert ((pre - exact).abs() <= bound).all()


def test_candidates_hold_the_top_k_and_are_few_where_latents_stand_out(device):
    z, encoder = sparse_case(6, 256, 700, 5, device)
    pre, bound, exact = bounded(z, encoder, 5, device)
    kept = candidates(pre, bound, exact, 5)
    assert kept.gather(-1, exact.topk(5, dim=-1).indices).all()
    assert kept.sum() < 6 * 40


def test_random_rounding_has_a_smaller_bound_that_holds(device):
    z, encoder = random_case(4, 1024, 300, device, codes=torch.int8)
    likely = Fp8Encoder.quantise(encoder.W_enc, encoder.bias, None, torch.int8, chance=1e-9)
    assert (likely.error < 0.6 * encoder.error).all()
    pre, bound, exact = bounded(z, likely, 5, device)
    assert ((pre - exact).abs() <= bound).all()
    Case(z, likely, 12, capacity=300).check()


def test_random_rounding_has_no_bias(device):
    W = torch.full((2000, 4), 0.3, device=device)
    W[:, 0] = 1.0
    codes, scale = quantise(W, torch.int8, torch.Generator(device).manual_seed(0))
    mean = (codes.double() * scale.double()[:, None])[:, 1:].mean()
    assert abs(mean - 0.3) < 0.3 * scale[0] * 0.1
    with pytest.raises(ValueError, match="int8"):
        quantise(W, torch.float8_e4m3fn, torch.Generator(device))
