"""The edit change's kernels against their definition, and what they must leave alone."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_kernels.edit_change import EditRows, GroupedSets, grouped_edit_change, kernel
from microedit_kernels.edit_change.launch_config import LaunchConfig, launch_config
from microedit_kernels.edit_change.scratch import EditChangeScratch
from microedit_kernels.row_plan import group_rows
from tests.microedit_vllm.engine.dispatch_guards import ForbiddenError, NoAllocation

D = 123
SMALL = LaunchConfig(16, 32, 2, 4, 2, 32, 16, 4, 2)
EVEN = replace(SMALL, even=True, ahead=8, overlap=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_sets(
    device: torch.device,
    sizes: list[int],
    d: int = D,
    dtype: torch.dtype = torch.float32,
    values_dtype: torch.dtype | None = None,
    tile: int = 32,
    part: int = 64,
    multiprocessors: int | None = None,
) -> GroupedSets:
    generator = torch.Generator().manual_seed(sum(sizes) + d)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    sets = [
        EditRows(
            (random(size, d) / math.sqrt(d)).to(dtype).to(device),
            random(size).mul_(0.1).to(device),
            random(d).mul_(0.1).to(device) if number % 2 else None,
            random(size, d).to(values_dtype or dtype).to(device),
            0.2 * number,
        )
        for number, size in enumerate(sizes)
    ]
    return GroupedSets.join(sets, tile, part, multiprocessors)


def poisoned(max_rows: int, sets: GroupedSets) -> EditChangeScratch:
    scratch = EditChangeScratch.allocate(max_rows, sets)
    for buffer in (scratch.acts, scratch.pre_shares, scratch.delta_shares):
        buffer.fill_(math.nan)
    return scratch


def residuals(
    device: torch.device, M: int, d: int = D, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden_states, and z that is another tensor."""
    generator = torch.Generator().manual_seed(seed)
    hidden, z = (torch.randn(M, d, generator=generator).to(dtype).to(device) for _ in range(2))
    return hidden, z


def plan(keys: list[int], num_sets: int, device: torch.device):
    rows, offsets = group_rows(torch.tensor(keys, dtype=torch.int32, device=device), num_sets)
    beyond = torch.full((len(keys) - len(rows),), 1 << 30, dtype=torch.int32, device=device)
    return torch.cat([rows, beyond]), offsets


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def exact_change(
    z: torch.Tensor, keys: list[int], sets: GroupedSets
) -> tuple[torch.Tensor, torch.Tensor]:
    """δ of every row in fp64, zero where a row is off; the norm of its terms without their signs.

    An error may be a share of the latter: terms cancel. Beside bf16 values activations are bf16.
    """
    delta = torch.zeros(z.shape, dtype=torch.float64, device=z.device)
    terms = torch.zeros_like(delta)
    starts = [sum(sets.sizes[:key]) for key in range(len(sets.sizes))]
    for row, key in enumerate(keys):
        if key >= 0:
            latents = slice(starts[key], starts[key] + sets.sizes[key])
            pre = sets.W_enc[latents].double() @ z[row].double() + sets.bias[latents].double()
            acts = torch.where(pre > sets.theta[key].clamp(min=0), pre, 0.0)
            if sets.values.dtype == torch.bfloat16:
                acts = acts.bfloat16().double()
            delta[row] = acts @ sets.changes(latents).double()
            terms[row] = acts @ sets.changes(latents).double().abs()
    return delta, terms.norm()


def check(hidden, z, keys, sets, scratch=None, config=SMALL):
    """Run the kernels; compare rows that are on with fp64, and the bits of all others."""
    rows, offsets = plan(keys, len(sets.sizes), hidden.device)
    exact, size = exact_change(z, keys, sets)
    reference = grouped_edit_change(z, rows, offsets, sets)
    active = rows[: offsets[-1]].long()
    narrow = sets.values.dtype == torch.bfloat16
    assert (reference - exact[active]).norm() <= (2**-8 if narrow else 1e-5) * size
    before = hidden.clone()
    fresh = scratch is None
    scratch = scratch or poisoned(len(hidden), sets)
    kernel.add_edit_change(hidden, z, rows, offsets, sets, scratch, config)
    # The interpreter runs sets in order, so that a block reaching into the next set's rows would
    # be overwritten in time; behind the last set it shows.
    assert not fresh or scratch.acts[len(active) :].isnan().all()
    assert not fresh or scratch.pre_shares[:, len(active) :].isnan().all()
    off = torch.tensor([key < 0 for key in keys], dtype=torch.bool, device=hidden.device)
    assert torch.equal(bits(hidden[off]), bits(before[off]))
    error = (hidden.double() - before.double() - exact).norm()
    # An activation in the middle between two of bf16 may be rounded to the other one.
    tolerance = 1e-4 if narrow else 1e-5
    assert error <= tolerance * size, float(error / size)
    assert not scratch.pre_arrived.any()
    assert not scratch.delta_arrived.any()


@pytest.mark.parametrize("latents", [1, 37, 130])
@pytest.mark.parametrize("config", [SMALL, EVEN])
def test_odd_shapes(latents, config, device):
    sets = make_sets(device, [latents])
    check(*residuals(device, 5), [0, -1, 0, 0, 0], sets, config=config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values_dtype", DTYPES)
@pytest.mark.parametrize("stream", DTYPES)
def test_dtypes_of_weights_values_and_stream(dtype, values_dtype, stream, device):
    """fp32 outputs, so that only the products' own error is seen."""
    sets = make_sets(device, [70], 64, dtype, values_dtype)
    hidden, z = residuals(device, 7, 64)
    check(hidden, z.to(stream), [0, 0, -1, 0, 0, 0, -1], sets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stream_is_rounded_to_the_nearest(dtype, device):
    sets = make_sets(device, [70], 64, torch.bfloat16, torch.float32)
    hidden, z = residuals(device, 7, 64, dtype)
    rows, offsets = plan([0] * 7, 1, device)
    exact = hidden.float() + grouped_edit_change(z, rows, offsets, sets)
    scratch = poisoned(7, sets)
    kernel.add_edit_change(hidden, z, rows, offsets, sets, scratch, SMALL)
    # Sums in another order fall on the other side of a tie; bits cut off would be half of all.
    torch.testing.assert_close(hidden.float(), exact.to(dtype).float(), rtol=1e-2, atol=1e-3)
    assert (hidden != exact.to(dtype)).float().mean() < 0.01


@pytest.mark.parametrize("alias", [True, False])
def test_sets_of_different_size_interleaved_in_the_batch(alias, device):
    """Blocks of rows end within a set, and a set's block reaches into the next set's rows."""
    sets = make_sets(device, [37, 0, 130, 1, 64], dtype=torch.bfloat16)
    keys = [2, 0, -1, 4, 2, 3, 1, 0, -1, 2, 2, 0] * 5
    hidden, z = residuals(device, len(keys))
    check(hidden, hidden if alias else z, keys, sets)


def test_rows_beyond_those_of_one_launch(device):
    sets = make_sets(device, [20, 33], 32)
    keys = [(0, 1, 1, -1)[i % 4] for i in range(75)]
    scratch = poisoned(20, sets)
    assert scratch.rows == 20
    check(*residuals(device, 75, 32), keys, sets, scratch)


@pytest.mark.parametrize("keys", [[-1] * 5, [1, 1, -1, 1, 1]])
def test_nothing_to_add_changes_nothing(keys, device):
    sets = make_sets(device, [37, 0])
    hidden, z = residuals(device, 5)
    before = hidden.clone()
    check(hidden, z, keys, sets)
    assert torch.equal(bits(hidden), bits(before))


def test_no_rows_and_no_latents_launch_nothing(device):
    nothing = torch.empty(0, D, device=device)
    for sets in (make_sets(device, [37]), make_sets(device, [0, 0])):
        rows, offsets = plan([], len(sets.sizes), device)
        kernel.add_edit_change(nothing, nothing, rows, offsets, sets, poisoned(0, sets), SMALL)
    hidden, z = residuals(device, 3)
    check(hidden, z, [0, 1, 0], sets)


def test_weights_of_a_set_without_rows_are_not_used(device):
    """NaN weights would show: 0·NaN is NaN."""
    sets = make_sets(device, [40, 40, 40])
    for weights in (sets.W_enc, sets.bias, sets.values.transpose(0, 1)):
        weights[:40].fill_(math.nan)
        weights[80:].fill_(math.nan)
    hidden, z = residuals(device, 6)
    check(hidden, z, [1, -1, 1, 1, -1, 1], sets)
    assert hidden.isfinite().all()


def test_what_an_earlier_call_left_behind_does_not_matter(device):
    sets = make_sets(device, [70, 130], dtype=torch.bfloat16)
    scratch = poisoned(40, sets)
    check(*residuals(device, 40), [1] * 40, sets, scratch)
    check(*residuals(device, 9, seed=1), [0, -1, 1] * 3, sets, scratch)
    hidden, z = residuals(device, 9, seed=1)
    again = hidden.clone()
    rows, offsets = plan([0, -1, 1] * 3, 2, device)
    kernel.add_edit_change(hidden, z, rows, offsets, sets, scratch, SMALL)
    kernel.add_edit_change(again, z, rows, offsets, sets, poisoned(9, sets), SMALL)
    assert torch.equal(bits(hidden), bits(again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's own
def test_ties_zeros_and_values_that_are_not_finite(dtype, splits, device):
    """One latent reads the first column of z; its pre-activation is that very number."""
    special = [1.0, 1.0078125, -0.0, 0.0, -1.0, math.inf, -math.inf, math.nan, 3e38]
    z = torch.zeros(len(special), 64, device=device)
    z[:, 0] = torch.tensor(special)
    W_enc = torch.zeros(1, 64, dtype=dtype, device=device)
    W_enc[0, 0] = 1
    values = torch.ones(1, 64, dtype=dtype, device=device)
    values[0, 1] = 0
    config = replace(SMALL, acts_splits=splits)
    for theta in (1.0, 0.0, -2.0):
        bias = torch.zeros(1, device=device)
        sets = GroupedSets.join([EditRows(W_enc, bias, None, values, theta)], 16, 16)
        rows, offsets = plan([0] * len(special), 1, device)
        # 0·inf is NaN in either, but within the latent's own columns only.
        z_rows = z.clone()
        expected = grouped_edit_change(z_rows, rows, offsets, sets)
        hidden = torch.zeros_like(z)
        scratch = poisoned(len(special), sets)
        kernel.add_edit_change(hidden, z_rows, rows, offsets, sets, scratch, config)
        rtol = 2e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(hidden, expected, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [8, 64, 65])
def test_configs_for_the_gpu_compute_the_same(rows, device):
    sets = make_sets(device, [70, 65], 256, torch.bfloat16, tile=64, part=128)
    hidden, z = residuals(device, 18, 256)
    config = launch_config(rows, 5000, 4096)
    check(hidden, z.bfloat16(), [0, 1, -1] * 6, sets, config=config)


@pytest.mark.parametrize(
    ("multiprocessors", "longest", "splits"), [(9, 20, 1), (5, 32, 1), (132, 16, 4)]
)
def test_even_tiles_of_any_length_compute_the_same(multiprocessors, longest, splits, device):
    sizes = [37, 0, 130, 8]
    sets = make_sets(device, sizes, 64, multiprocessors=multiprocessors)
    lengths = (sets.even_tiles[:, 2] - sets.even_tiles[:, 1]).tolist()
    assert (max(lengths), sum(lengths), sets.even_splits) == (longest, sum(sizes), splits)
    check(*residuals(device, 9, 64), [2, 0, 3, -1, 2, 1, 2, 0, 3], sets, config=EVEN)


def test_even_tiles_of_one_scratch_leave_nothing_to_the_next_batch(device):
    """The zeros behind a set's last latent are written anew: a longer set was there before."""
    sets = make_sets(device, [130, 37], 64, multiprocessors=5)
    scratch = poisoned(4, sets)
    for keys in ([0] * 4, [1] * 4, [1, 0, 1, 0]):
        check(*residuals(device, 4, 64), keys, sets, scratch, config=EVEN)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 4096])
def test_the_chosen_config_fits_its_sets(rows, element_size):
    for latents, d in [(1, 5), (5000, 4096)]:
        config = launch_config(rows, latents, d, element_size)
        assert 128 % config.delta_latents == 0
        assert min(rows, 128) <= config.rows


cases = st.tuples(
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
    st.lists(st.integers(-1, 2), min_size=1, max_size=12),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
)


@settings(deadline=None, max_examples=25)
@given(cases)
def test_any_batch_is_changed_as_the_reference_says(device, case):
    sizes, keys, d, dtype, values_dtype, even = case
    keys = [min(key, len(sizes) - 1) for key in keys]
    sets = make_sets(device, sizes, d, dtype, values_dtype, tile=32, part=32, multiprocessors=3)
    config = replace(SMALL, even=even)
    check(*residuals(device, len(keys), d), keys, sets, config=config)


class Recorder:
    """In a kernel's place: what it would be launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.grids.append(grid)

        return launch


def test_a_launch_allocates_nothing_and_reads_nothing_back(monkeypatch, device):
    """The kernels themselves are left out: the interpreter copies tensors."""
    acts, delta = Recorder(), Recorder()
    monkeypatch.setattr(kernel, "compute_acts", acts)
    monkeypatch.setattr(kernel, "add_delta", delta)
    sets = make_sets(device, [37, 0, 130])
    hidden, z = residuals(device, 50)
    rows, offsets = plan([0, 1, 2, -1, 2] * 10, 3, device)
    scratch = EditChangeScratch.allocate(20, sets)
    with NoAllocation():
        kernel.add_edit_change(hidden, z, rows, offsets, sets, scratch, SMALL)
        with pytest.raises(ForbiddenError):
            hidden + z
    assert acts.grids == [(2 + 5, 2, blocks) for blocks in (2, 2, 1)]
    assert delta.grids == [(4, 1 + 3, blocks) for blocks in (2, 2, 1)]


def test_misfits_are_refused(device):
    sets = make_sets(device, [37])
    scratch = EditChangeScratch.allocate(4, sets)
    hidden, z = residuals(device, 4)
    rows, offsets = plan([0] * 4, 1, device)
    with pytest.raises(ValueError, match="not both"):
        kernel.add_edit_change(hidden, z[:, 1:], rows, offsets, sets, scratch, SMALL)
    with pytest.raises(ValueError, match="contiguous"):
        turned = z.T.contiguous().T
        kernel.add_edit_change(hidden, turned, rows, offsets, sets, scratch, SMALL)
    with pytest.raises(ValueError, match="don't divide"):
        deep = replace(SMALL, delta_latents=128)
        kernel.add_edit_change(hidden, z, rows, offsets, sets, scratch, deep)
    with pytest.raises(ValueError, match="smaller ones"):
        larger = make_sets(device, [130])
        kernel.add_edit_change(hidden, z, rows, offsets, larger, scratch, SMALL)


def test_a_scratch_holds_what_its_docstring_says(device):
    scratch = EditChangeScratch.allocate(1000, make_sets(device, [37, 130]))
    assert scratch.rows == 256
    assert {f.name: getattr(scratch, f.name).shape for f in fields(scratch)} == {
        "acts": (384, 192),
        "pre_shares": (8, 384, 192),
        "delta_shares": (3, 256, D),
        "pre_arrived": (16, 12),
        "delta_arrived": (16, 4, 4),
    }
