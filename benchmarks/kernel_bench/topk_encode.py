"""Top-k encode: inputs, launch, exact check, `torch.matmul` and `torch.topk`."""

import importlib

import torch
from torch import Tensor

from benchmarks.kernel_bench.adapter import Activity, Adapter, Inputs, require
from benchmarks.kernel_bench.floors import Work
from benchmarks.kernel_bench.shapes import Case
from benchmarks.kernel_bench.timing import Launch, rotation

_UNWRITTEN = 1 << 30
# Of ‖z‖·‖W_enc row‖: what an fp32 sum of exact products in some order may be off by.
_TOLERANCE = 4e-6
_CHUNK = 16_384


class TopkEncode(Adapter):
    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._kernel = importlib.import_module("microedit_kernels.topk_encode.kernel")
        self._sae, self._weights = case.sae, inputs.weights(case.sae)
        self.activity = Activity(inputs, case.rows)
        self.variants = min(16, rotation(self._weights.W_enc.nbytes, inputs.cache))
        self._z = inputs.normal(self.variants, case.rows, case.sae.d)
        shape = (case.rows, case.sae.k)
        self.top_acts = torch.empty(shape, device=inputs.device)
        self.top_indices = torch.empty(shape, dtype=torch.int32, device=inputs.device)
        self._scratch = self._kernel.EncodeScratch.allocate(
            case.rows, case.sae.n, case.sae.k, inputs.device
        )

    def launch(self, variant: int) -> None:
        self._kernel.topk_encode(
            self._z[variant],
            self.activity.rows,
            self.activity.count,
            self._weights.W_enc,
            self._weights.b_enc,
            self._sae.k,
            self.top_acts,
            self.top_indices,
            self._scratch,
        )

    def check_active(self) -> None:
        self.top_acts.fill_(torch.nan)
        self.top_indices.fill_(_UNWRITTEN)
        self.launch(0)
        active = self.activity.active
        require((self.top_indices[active:] == _UNWRITTEN).all(), "a row that is off is written")
        require(self.top_acts[active:].isnan().all(), "a row that is off is written")
        if not active:
            return
        ordered = self.top_indices[:active].sort(-1).values
        inside = (ordered[:, 0] >= 0).all() & (ordered[:, -1] < self._sae.n).all()
        require(inside, "an index is no latent")
        require((ordered.diff() > 0).all(), "a latent is selected twice")
        require((self.top_acts[:active] >= 0).all(), "an activation is negative or NaN")
        self._check_values()

    def _check_values(self) -> None:
        """Against the fp64 product, whatever latents within its tolerance are ranked as."""
        compact, rows = self.activity.sample()
        z = self._z[0][rows].double()
        acts, largest = self._exact(z)
        indices = self.top_indices[compact].long()
        tolerance = (_TOLERANCE * z.norm(dim=-1, keepdim=True) * largest).clamp(min=1e-6)
        chosen = acts.gather(-1, indices)
        off = (self.top_acts[compact] - chosen).abs()
        require((off <= tolerance).all(), f"an activation is off by {float(off.max()):.1e}")
        others = acts.scatter(-1, indices, -torch.inf).amax(-1, keepdim=True)
        missed = others - chosen.amin(-1, keepdim=True)
        require((missed <= 2 * tolerance).all(), "a larger activation is left out")

    def _exact(self, z: Tensor) -> tuple[Tensor, float]:
        """ReLU(z·W_enc + b_enc), [rows, n] fp64, and the largest ‖W_enc row‖."""
        parts, norms = [], []
        for W_enc, b_enc in zip(
            self._weights.W_enc.split(_CHUNK), self._weights.b_enc.split(_CHUNK), strict=True
        ):
            exact = W_enc.double()
            parts.append((z @ exact.T + b_enc).relu())
            norms.append(exact.norm(dim=-1).max())
        return torch.cat(parts, -1), float(max(norms))

    def work(self) -> Work:
        W_enc, out = self._weights.W_enc, self.top_acts.nbytes + self.top_indices.nbytes
        moved = W_enc.nbytes + self._weights.b_enc.nbytes + self._z[0].nbytes + out
        return Work(moved, 2 * len(self._z[0]) * W_enc.numel())

    def baseline(self, variant: int) -> Launch | None:
        """Ranks pre-activations that were rounded to bf16; neither bias nor ReLU."""
        W_enc, z, k = self._weights.W_enc, self._z[variant], self._sae.k
        return lambda: torch.topk(torch.matmul(z, W_enc.T), k)
