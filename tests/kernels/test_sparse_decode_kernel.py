"""The Triton decode against the reference, into poisoned buffers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_kernels.sparse_decode import decode, decode_change, row_map, squared_distance
from microedit_kernels.sparse_decode.kernel import (
    Decoder,
    DecodeScratch,
    decode_parts,
    score,
    substitute,
)
from microedit_kernels.sparse_decode.launch import DecodeConfig

SMALL = DecodeConfig(64, 4, 2, 2)


class Case:
    """Random rows, codes and a decoder with some changed rows; `active` are the rows to do."""

    def __init__(self, M, d, n, k, changed, active, device, dtype=torch.float32):
        generator = torch.Generator().manual_seed(M + d + n + k)

        def random(*shape, kind=dtype):
            return torch.randn(*shape, generator=generator).to(device, kind)

        self.device, self.M, self.d, self.k, self.active = device, M, d, k, active
        self.z = random(M, d)
        self.rows = torch.full((M,), 1 << 30, dtype=torch.int32, device=device)
        self.rows[: len(active)] = torch.tensor(active, dtype=torch.int32)
        self.count = torch.tensor([len(active)], dtype=torch.int32, device=device)
        indices = torch.rand(M, n, generator=generator).argsort(-1)[:, :k].sort(-1).values
        self.top_indices = indices.int().to(device)
        self.top_acts = random(M, k, kind=torch.float32).abs()
        changes = torch.randperm(n, generator=generator)[:changed].to(device)
        self.decoder = Decoder(
            random(n, d), random(d), row_map(changes, n).int(), random(max(changed, 1), d)
        )
        count = len(active)
        self.z_hat0 = decode(
            self.top_acts, self.top_indices.long(), self.decoder.W_dec, self.decoder.b_dec
        )[:count]
        self.delta = decode_change(
            self.top_acts,
            self.top_indices.long(),
            self.decoder.row_map.long(),
            self.decoder.values[:changed],
        )[:count]

    @property
    def plan(self):
        return self.rows, self.count, self.top_acts, self.top_indices, self.decoder

    def scratch(self):
        """Poisoned, and for a configuration that splits finer than that of a served shape."""
        made = vars(DecodeScratch.allocate(self.M, self.d, self.k, self.device))
        made["partial"] = torch.empty(self.M, 3 * 64, device=self.device)
        for name in set(made) - {"arrived"}:
            made[name].fill_(torch.nan if made[name].is_floating_point() else 1 << 30)
        return DecodeScratch(**made)

    def scored(self, scratch=None, max_norm=torch.inf):
        """dist, dist0 and counts by slot: the slots are those of another order."""
        slots = torch.arange(self.M, 0, -1, device=self.device)
        dist, dist0 = (torch.full((self.M + 1,), torch.nan, device=self.device) for _ in "01")
        counts = torch.full((self.M + 1,), False, device=self.device)
        if scratch is None:
            scratch = self.scratch()
        score(self.z, *self.plan, slots, dist, dist0, counts, max_norm, scratch, SMALL)
        assert (scratch.arrived == 0).all()
        done = slots[: len(self.active)]
        untouched = torch.ones_like(counts).index_fill(0, done, False)
        assert dist[untouched].isnan().all() and dist0[untouched].isnan().all()
        assert not counts[untouched].any()
        return dist[done], dist0[done], counts[done]

    def check_scores(self, **options):
        dist, dist0, counts = self.scored(**options)
        z = self.z[self.active]
        torch.testing.assert_close(dist, squared_distance(self.z_hat0 + self.delta, z))
        torch.testing.assert_close(dist0, squared_distance(self.z_hat0, z))
        norms = z.float().norm(dim=-1)
        assert torch.equal(counts, norms <= options.get("max_norm", torch.inf))
        return dist, dist0


@pytest.mark.parametrize("changed", [0, 1, 30, 100])
@pytest.mark.parametrize("M, d, k", [(1, 16, 1), (5, 123, 7), (3, 200, 33)])
def test_scores(M, d, k, changed, device):
    Case(M, d, 100, k, changed, list(range(M)), device).check_scores()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_narrow_weights(dtype, device):
    Case(4, 96, 100, 8, 30, [0, 1, 2, 3], device, dtype).check_scores()


@pytest.mark.parametrize("active", [[], [2], [0, 3, 5]])
def test_only_active_rows_are_scored(active, device):
    Case(6, 123, 100, 8, 30, active, device).check_scores()


def test_without_a_changed_latent_the_two_distances_are_the_same_bits(device):
    dist, dist0 = Case(5, 123, 100, 8, 0, [0, 1, 2, 3, 4], device).check_scores()
    assert torch.equal(dist, dist0)


def test_rows_beyond_the_norm_do_not_count(device):
    case = Case(6, 64, 100, 8, 30, list(range(6)), device)
    case.z[2] *= 100
    case.check_scores(max_norm=50.0)


def test_stale_scratch_is_harmless(device):
    first = Case(6, 123, 100, 8, 100, list(range(6)), device)
    scratch = first.scratch()
    first.check_scores(scratch=scratch)
    Case(6, 123, 100, 8, 3, [1, 4], device).check_scores(scratch=scratch)


@pytest.mark.parametrize("placement", ["replace", "delta"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("active", [[], [1, 2, 4], [0, 1, 2, 3, 4]])
def test_substitution_in_place(placement, alone, active, device):
    case = Case(5, 123, 100, 8, 30, active, device)
    hidden = case.z if alone else torch.randn(5, 123, device=device)
    before, z = hidden.clone(), case.z.clone()
    substitute(hidden, case.z, *case.plan, placement, case.scratch(), SMALL)
    target = case.z_hat0 if placement == "replace" else z[active]
    expected = before[active] + (target + case.delta - z[active])
    torch.testing.assert_close(hidden[active], expected, rtol=1e-4, atol=1e-4)
    off = [row for row in range(5) if row not in active]
    assert torch.equal(hidden[off], before[off])
    if not alone:
        assert torch.equal(case.z, z)


def test_delta_without_a_changed_latent_keeps_the_bits(device):
    case = Case(5, 123, 100, 8, 0, [0, 1, 2, 3, 4], device)
    hidden = torch.randn(5, 123, device=device)
    before = hidden.clone()
    substitute(hidden, case.z, *case.plan, "delta", case.scratch(), SMALL)
    assert torch.equal(hidden, before)


def test_parts_of_shards_add_up(device):
    case = Case(5, 123, 100, 8, 30, [0, 1, 3], device)
    total = torch.zeros(2, 5, 123, device=device)
    whole, values = case.decoder, case.decoder.values
    for first, last in ((0, 37), (37, 100)):
        local = case.top_indices - first
        local[(local < 0) | (local >= last - first)] = -1
        shard = Decoder(whole.W_dec[first:last], whole.b_dec, whole.row_map[first:last], values)
        parts = torch.full((2, 5, 123), torch.nan, device=device)
        decode_parts(
            case.z, case.rows, case.count, case.top_acts, local, shard, parts, case.scratch(), SMALL
        )
        assert parts[:, 3:].isnan().all()
        total += parts
    torch.testing.assert_close(total[0, :3] + whole.b_dec, case.z_hat0)
    torch.testing.assert_close(total[1, :3], case.delta)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 150), st.integers(1, 60), st.data())
def test_any_shape(M, d, n, data):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    k, changed = data.draw(st.integers(1, n)), data.draw(st.integers(0, n))
    active = sorted(data.draw(st.sets(st.integers(0, M - 1))))
    Case(M, d, n, k, changed, active, device).check_scores()
