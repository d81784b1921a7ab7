"""Edit change: inputs, launch, exact check, two `torch.matmul`s."""

import importlib

import torch

from benchmarks.kernel_bench.adapter import Activity, Adapter, Inputs, require
from benchmarks.kernel_bench.floors import Work
from benchmarks.kernel_bench.shapes import Case
from benchmarks.kernel_bench.timing import Launch, rotation

# About a third of the pre-activations, which are nearly normal, are above it.
_THETA = 0.5
# Of the changed row's norm. Two roundings to bf16 are within it, one latent too few is not.
_TOLERANCE = 8e-3
# Of a pre-activation: within it of θ, a latent may be on or off.
_NEAR = 1e-3
# Weights of the size that edits have would drown in what hundreds of replays add up to.
_VALUE = 1e-2


class EditChange(Adapter):
    """Every set has weights of its own; so has every variant."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._kernel = importlib.import_module("microedit_kernels.edit_change.kernel")
        grouped = importlib.import_module("microedit_kernels.edit_change.grouped_sets")
        launches = importlib.import_module("microedit_kernels.edit_change.launch_config")
        assert case.edit is not None
        c, d, M = case.edit.latents, case.sae.d, case.rows
        self._d = d
        self.activity = Activity(inputs, M, case.edit.sets)
        self.variants = min(64, rotation(min(case.edit.sets, M) * c * d * 4, inputs.cache))
        self._sets = [
            [
                grouped.EditRows(
                    inputs.normal(c, d, std=d**-0.5),
                    inputs.normal(c, std=0.1, dtype=torch.float),
                    None,
                    inputs.normal(c, d, std=_VALUE),
                    _THETA,
                )
                for _ in range(case.edit.sets)
            ]
            for _ in range(self.variants)
        ]
        self._grouped = [grouped.GroupedSets.join(sets) for sets in self._sets]
        self._z = inputs.normal(M, d)
        self._before = inputs.normal(M, d, std=_VALUE)
        self.hidden_states = self._before.clone()
        self._scratch = self._kernel.EditChangeScratch.allocate(M, self._grouped[0])
        self._config = launches.launch_config(M, c, d)

    def launch(self, variant: int) -> None:
        self._kernel.add_edit_change(
            self.hidden_states,
            self._z,
            self.activity.rows,
            self.activity.offsets,
            self._grouped[variant],
            self._scratch,
            self._config,
        )

    def check_active(self) -> None:
        self.hidden_states.copy_(self._before)
        self.launch(0)
        off = self.activity.keys < 0
        require(
            torch.equal(self.hidden_states[off], self._before[off]), "a row that is off is written"
        )
        require(self.hidden_states.isfinite().all(), "a row is not finite")
        for row in self.activity.sample()[1]:
            self._check_row(int(row))

    def _check_row(self, row: int) -> None:
        edits = self._sets[0][int(self.activity.keys[row])]
        theta, values = edits.theta, edits.values.double()
        pre = edits.W_enc.double() @ self._z[row].double() + edits.b_enc
        delta = pre.where(pre > theta, 0.0) @ values
        want = self._before[row].double() + delta
        near = (pre - theta).abs() < _NEAR
        allowed = _TOLERANCE * want.norm() + theta * values[near].norm(dim=-1).sum()
        off = (self.hidden_states[row].double() - want).norm()
        require(off <= allowed, f"a row is off by {float(off / want.norm()):.1e} of its norm")

    def work(self) -> Work:
        used = int(self.activity.keys.unique().numel())
        edits = self._sets[0][0]
        weights = used * (edits.W_enc.nbytes + edits.b_enc.nbytes + edits.values.nbytes)
        # z is read, hidden_states read and written.
        moved = weights + self._z.nbytes + 2 * self.hidden_states.nbytes
        return Work(moved, 4 * len(self._z) * edits.W_enc.numel())

    def baseline(self, variant: int) -> Launch | None:
        """For one set and all rows; several sets have no plain form worth timing."""
        if self.activity.num_keys > 1:
            return None
        edits = self._sets[variant][0]
        bias = edits.b_enc.bfloat16()

        def change() -> None:
            pre = torch.addmm(bias, self._z, edits.W_enc.T)
            acts = torch.where(pre > edits.theta, pre, 0.0)
            self.hidden_states.addmm_(acts, edits.values)

        return change
