from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from microedit_vllm.artifact import Decision, EditOperator, EditSet, Scope
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_edit_set, tiny_sae


def dense_codes(sae, z):
    pre = ((z - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    kept = pre.topk(sae.k, dim=-1).indices
    return torch.zeros_like(pre).scatter(-1, kept, pre.gather(-1, kept))


def dense_change(sae, change):
    full = torch.zeros_like(sae.W_dec)
    full[change.indices] = change.values.float()
    return full


@pytest.fixture
def sae():
    return tiny_sae()


@pytest.fixture
def z(sae):
    return torch.randn(7, sae.d_in, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("shared", [False, True])
def test_distances_against_dense_algebra(sae, z, shared):
    edit_set = tiny_edit_set(sae, shared=shared)
    dist, dist0 = EditOperator.build(edit_set, sae).distances(z)
    codes = dense_codes(sae, z)
    z_hat0 = codes @ sae.W_dec + sae.b_dec
    z_hat = z_hat0 + codes @ dense_change(sae, edit_set.scoring)
    torch.testing.assert_close(dist, (z_hat - z).square().sum(-1))
    torch.testing.assert_close(dist0, (z_hat0 - z).square().sum(-1))


def test_edited_by_threshold_against_dense_algebra(sae, z):
    edit_set = tiny_edit_set(sae)
    pre = (z - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    codes = torch.where(pre > edit_set.manifest.theta, pre, 0.0)
    expected = z + codes @ dense_change(sae, edit_set.edit)
    torch.testing.assert_close(EditOperator.build(edit_set, sae).edited(z), expected)


@pytest.mark.parametrize(("shared", "placement"), [(False, "delta"), (True, "replace")])
def test_a_cpu_converts_no_weight_in_a_step(sae, z, shared, placement):
    edit_set = tiny_edit_set(sae, shared=shared, placement=placement)
    assert edit_set.edit.values.dtype == torch.bfloat16
    operator = EditOperator.build(edit_set, sae)
    assert (operator.edit is operator.scoring) == shared
    as_stored = replace(operator, scoring=edit_set.scoring, edit=edit_set.edit)
    with Conversions() as counted:
        found = operator.edited(z), *operator.distances(z)
    assert not counted.seen
    with Conversions() as counted:
        wanted = as_stored.edited(z), *as_stored.distances(z)
    assert edit_set.edit.values.shape in counted.seen
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Conversions(TorchDispatchMode):
    """Shapes of the matrices that were converted to another float type."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and output.is_floating_point():
            self.seen.append(output.shape)
        return output


@pytest.mark.parametrize("placement", ["replace", "delta"])
def test_edited_by_topk_against_dense_algebra(sae, z, placement):
    edit_set = tiny_edit_set(sae, shared=True, placement=placement)
    codes = dense_codes(sae, z)
    delta = codes @ dense_change(sae, edit_set.edit)
    base = z if placement == "delta" else codes @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(EditOperator.build(edit_set, sae).edited(z), base + delta)


def operator(sae, **fields):
    decision = Decision(max_norm=1e4, **fields)
    return EditOperator.build(tiny_edit_set(sae, decision=decision), sae)


def test_the_statistic_follows_the_decision(sae):
    dist, dist0 = torch.tensor([6.0, 1.0, 1.0, 6.0]), torch.tensor([2.0, 2.0, 4.0, 4.0])

    def ard(**fields):
        return float(operator(sae, tau=0.9, **fields).ard(dist, dist0))

    whole, run = Scope(last=None, run=0), Scope(run=2)
    assert ard(statistic="relative", scope=whole) == pytest.approx(14 / 12)
    assert ard(statistic="relative", scope=run) == pytest.approx(2 / 6)
    assert ard(statistic="absolute", alpha=10, scope=whole) == pytest.approx(14 / 40)
    assert ard(statistic="absolute", alpha=10, scope=run) == pytest.approx(2 / 20)


def test_the_statistic_of_each_run(sae):
    dist, dist0 = torch.tensor([6.0, 1.0, 1.0, 6.0]), torch.tensor([2.0, 2.0, 4.0, 4.0])

    def runs(size, **fields):
        found = operator(sae, tau=0.9, scope=Scope(run=size), **fields)
        return found.run_ards(dist, dist0).tolist()

    assert runs(2, statistic="relative") == pytest.approx([7 / 4, 2 / 6, 7 / 8])
    assert runs(0, statistic="relative") == runs(9, statistic="relative")
    assert runs(0, statistic="relative") == pytest.approx([14 / 12])
    assert runs(3, statistic="absolute", alpha=10) == pytest.approx([8 / 30, 8 / 30])


@pytest.mark.parametrize("shared", [False, True])
def test_the_changes_are_their_acts_times_their_values(sae, z, shared):
    edit_set = tiny_edit_set(sae, shared=shared)
    found = EditOperator.build(edit_set, sae)
    codes = dense_codes(sae, z)
    assert torch.equal(found.scoring_acts(z) > 0, codes[:, edit_set.scoring.indices] > 0)
    torch.testing.assert_close(found.scoring_acts(z), codes[:, edit_set.scoring.indices])
    base = codes @ sae.W_dec + sae.b_dec if shared else z
    added = found.edit_acts(z) @ edit_set.edit.values.float()
    assert added.any()
    torch.testing.assert_close(base + added, found.edited(z))


def test_too_few_scored_tokens_leave_the_switch_off(sae):
    found = operator(sae, statistic="relative", tau=0.9, scope=Scope(), min_tokens=3)
    few, enough = torch.full((2,), 1e-3), torch.full((3,), 1e-3)
    assert not bool(found.is_on(found.ard(few, torch.ones(2))))
    assert bool(found.is_on(found.ard(enough, torch.ones(3))))


@pytest.mark.parametrize("form", [{}, {"shared": True}, {"carries": True}])
def test_golden_activations_reproduce(tmp_path, sae, form):
    saved = sae.save(tmp_path / "sae")
    tiny_edit_set(saved, **form).save(tmp_path / "set")
    EditOperator.build(EditSet.load(tmp_path / "set"), saved).check_golden()


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_an_sae_read_in_another_way_is_refused(sae, name):
    edit_set = tiny_edit_set(sae)
    changed = replace(sae, **{name: getattr(sae, name) * 1.5 + 0.05})
    with pytest.raises(MicroEditError, match="do not reproduce"):
        EditOperator.build(edit_set, changed).check_golden()


@pytest.mark.parametrize("change", ["scoring", "edit", "carried"])
def test_a_changed_set_is_refused(sae, change):
    edit_set = tiny_edit_set(sae, carries=True)
    old = getattr(edit_set, change)
    broken = replace(edit_set, **{change: replace(old, values=-old.values)})
    with pytest.raises(MicroEditError, match="do not reproduce"):
        EditOperator.build(broken, sae).check_golden()


@pytest.mark.parametrize(
    "name", ["z", "top_indices", "z_hat", "dist", "dist0", "edited", "carried"]
)
def test_every_golden_tensor_is_compared(sae, name):
    edit_set = tiny_edit_set(sae, carries=True)
    stored = getattr(edit_set.golden, name)
    golden = replace(edit_set.golden, **{name: stored.flip(0) * 2 + 1})
    with pytest.raises(MicroEditError, match="do not reproduce"):
        EditOperator.build(replace(edit_set, golden=golden), sae).check_golden()
