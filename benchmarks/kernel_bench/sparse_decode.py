"""Sparse decode with ARD: inputs, launch, exact check, `embedding_bag`."""

import importlib

import torch
from torch.nn.functional import embedding_bag

from benchmarks.kernel_bench.adapter import Activity, Adapter, Inputs, require
from benchmarks.kernel_bench.floors import Work
from benchmarks.kernel_bench.shapes import Case
from benchmarks.kernel_bench.timing import Launch, rotation
from microedit_kernels.sparse_decode import reference

# One latent in this many is changed by the edit set: 5,041 of LLaMA-3-8B's.
_CHANGED = 26
_TOLERANCE = 1e-4


class SparseDecode(Adapter):
    """Latents are spread at random over all of W_dec, distinct within a row, ascending."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._kernel = importlib.import_module("microedit_kernels.sparse_decode.kernel")
        (n, d, k), M = (case.sae.n, case.sae.d, case.sae.k), case.rows
        self._weights = inputs.weights(case.sae)
        self.activity = Activity(inputs, M)
        self.variants = rotation(M * k * d * 2, inputs.cache)
        self._z = inputs.normal(M, d)
        self._acts = inputs.normal(M, k, dtype=torch.float).abs()
        steps = torch.arange(k, device=inputs.device) + inputs.uniform(self.variants, M, k)
        self._indices = (steps.double() * n / k).long().clamp(max=n - 1).int()
        changed = inputs.uniform(n).argsort()[: n // _CHANGED].sort().values
        self._row_map = reference.row_map(changed, n).int()
        self._values = inputs.normal(len(changed), d, std=d**-0.5)
        w = self._weights
        self._decoder = self._kernel.Decoder(w.W_dec, w.b_dec, self._row_map, self._values)
        self._slots = inputs.uniform(M).argsort().int()
        # Half of the rows pass for sinks.
        self._max_norm = float(self._z.float().norm(dim=-1).median())
        self.dist, self.dist0 = torch.empty(2, M, device=inputs.device)
        self.counts = torch.empty(M, dtype=torch.bool, device=inputs.device)
        self._scratch = self._kernel.DecodeScratch.allocate(M, d, k, inputs.device)

    def launch(self, variant: int) -> None:
        self._kernel.score(
            self._z,
            self.activity.rows,
            self.activity.count,
            self._acts,
            self._indices[variant],
            self._decoder,
            self._slots,
            self.dist,
            self.dist0,
            self.counts,
            self._max_norm,
            self._scratch,
        )

    def check_active(self) -> None:
        for dist in (self.dist, self.dist0):
            dist.fill_(torch.nan)
        self.launch(0)
        compact, rows = self.activity.sample()
        slots = self._slots.long()
        on, off = slots[: self.activity.active], slots[self.activity.active :]
        for name, found, exact in zip(
            ("dist", "dist0"), (self.dist, self.dist0), self._exact(compact, rows), strict=True
        ):
            require(found[off].isnan().all(), f"{name} of a row that is off is written")
            require(found[on].isfinite().all(), f"{name} is not finite")
            errors = (found[slots[compact]] - exact).abs() / exact
            require((errors <= _TOLERANCE).all(), f"{name} is off by more than {_TOLERANCE} of it")
        norm = self._z[rows].double().norm(dim=-1)
        wrong = self.counts[slots[compact]] != (norm <= self._max_norm)
        clear = (norm / self._max_norm - 1).abs() > _TOLERANCE
        require(not (wrong & clear).any(), "a sink is counted, or another row is not")

    def _exact(self, compact: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Both squared distances of the rows, [2, rows] fp64."""
        found = []
        for r, row in zip(compact, rows, strict=True):
            acts, indices = self._acts[r].double(), self._indices[0][r].long()
            z_hat0 = acts @ self._weights.W_dec[indices].double() + self._weights.b_dec.double()
            where = self._row_map[indices].long()
            delta = acts[where >= 0] @ self._values[where[where >= 0]].double()
            z = self._z[row].double()
            found.append(
                torch.stack([(z_hat - z).square().sum() for z_hat in (z_hat0 + delta, z_hat0)])
            )
        if not found:
            return torch.empty(2, 0, device=rows.device)
        return torch.stack(found, -1)

    def work(self) -> Work:
        indices, row = self._indices[0], self._weights.W_dec[0].nbytes
        hit = indices[self._row_map[indices.long()] >= 0]
        # Activation, index and place in the row map of each latent; z, b_dec, both distances.
        codes = 12 * indices.numel()
        other = self._z.nbytes + self._weights.b_dec.nbytes + 2 * self.dist.nbytes + codes
        once = indices.unique().numel() + hit.unique().numel()
        return Work(
            other + (indices.numel() + hit.numel()) * row, distinct_bytes=other + once * row
        )

    def baseline(self, variant: int) -> Launch | None:
        """Gather and sum of W_dec and, densely, ΔW_dec; distances in fp32."""
        acts, indices = self._acts.bfloat16(), self._indices[variant]
        W_dec, b_dec, z = self._weights.W_dec, self._weights.b_dec, self._z
        where = self._row_map[indices.long()]
        changed, places = acts.where(where >= 0, 0), where.clamp(min=0)

        def decode() -> None:
            z_hat0 = embedding_bag(indices, W_dec, per_sample_weights=acts, mode="sum") + b_dec
            delta = embedding_bag(places, self._values, per_sample_weights=changed, mode="sum")
            reference.squared_distance(z_hat0 + delta, z)
            reference.squared_distance(z_hat0, z)

        return decode
