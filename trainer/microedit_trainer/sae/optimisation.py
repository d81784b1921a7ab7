"""The state of an SAE's training and one step of it.

The batch of a step depends on the seed and the step's number alone, so that a run continued from
a checkpoint takes the very steps of an unbroken one.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from microedit_trainer.sae.settings import SaeSettings
from microedit_trainer.sae.sparse_gradient import TopkEncode, top_rows
from microedit_vllm.artifact.sae import SparseAutoencoder

WARM_UP_STEPS = 20
LEAST_RATE = 0.02
DEAD_AFTER_STEPS = 100
AUX_WEIGHT = 1 / 32

_ROWS_AT_ONCE = 16_384
_PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Standard:
    """x = (z − mean) / scale: mean is [d] fp32, and x has about unit variance per dimension."""

    mean: Tensor
    scale: float

    @classmethod
    def of(cls, rows: Tensor, indices: Tensor) -> "Standard":
        """Mean and mean distance from it over the chosen rows."""
        parts = indices.split(_ROWS_AT_ONCE)
        mean = torch.stack([rows[p].double().sum(0) for p in parts]).sum(0) / len(indices)
        spread = sum(float((rows[p].double() - mean).norm(dim=1).sum()) for p in parts)
        return cls(mean.float(), spread / len(indices) / math.sqrt(rows.shape[1]))


class SaeOptimisation:
    """Parameters, Adam's moments, and when each latent was last active."""

    def __init__(
        self, rows: Tensor, indices: Tensor, settings: SaeSettings, device: torch.device
    ) -> None:
        """Start from the data.

        Args:
            rows: [N, d] bf16 activations; indices: [M] int64, those to train on.
        """
        self.rows, self.indices, self.settings, self.device = rows, indices, settings, device
        self.standard = Standard.of(rows, indices)
        self._mean = self.standard.mean.to(device)
        self.step_number = 0
        width = settings.width
        directions = self._first_directions(torch.Generator().manual_seed(settings.seed))
        self.W_dec = directions.to(device, copy=True).requires_grad_()
        # Half the transpose: with k latents per token, more overshoots the reconstruction.
        self.W_enc = (0.5 * directions).to(device).requires_grad_()
        self.b_enc = torch.zeros(width, device=device, requires_grad=True)
        self.b_dec = torch.zeros(rows.shape[1], device=device, requires_grad=True)
        self.last_active = torch.zeros(width, dtype=torch.long, device=device)
        self.adam = torch.optim.Adam(
            [getattr(self, name) for name in _PARAMETERS], lr=settings.lr, fused=True
        )

    def _first_directions(self, generator: torch.Generator) -> Tensor:
        """Unit rows along data points, [n, d] fp32, with noise where points must repeat."""
        width = self.settings.width
        order = torch.randperm(len(self.indices), generator=generator)
        chosen = self.indices[order.repeat(math.ceil(width / len(order)))[:width]]
        points = (self.rows[chosen].float() - self.standard.mean) / self.standard.scale
        return F.normalize(points + 0.1 * torch.randn(points.shape, generator=generator), dim=1)

    def _batch(self) -> Tensor:
        seed = self.settings.seed * 1_000_003 + self.step_number
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.indices), (self.settings.batch,), generator=generator)
        rows = self.rows[self.indices[chosen]].to(self.device)
        return (rows.float() - self._mean) / self.standard.scale

    def _rate(self) -> float:
        """Warm-up, constant to the half, then down in a line."""
        done = self.step_number / self.settings.total_steps
        decay = max(LEAST_RATE, min(1.0, 2 * (1 - done)))
        return self.settings.lr * decay * min(1.0, (self.step_number + 1) / WARM_UP_STEPS)

    def step(self) -> float:
        """One optimiser step; returns the batch's share of variance not explained."""
        x = self._batch()
        for group in self.adam.param_groups:
            group["lr"] = self._rate()
        self.adam.zero_grad(set_to_none=True)
        centred = x - self.b_dec
        acts, indices = TopkEncode.apply(centred, self.W_enc, self.b_enc, self.settings.k, True)
        residual = centred - top_rows(acts, indices, self.W_dec)
        variance = (x - x.mean(dim=0)).square().sum()
        unexplained = residual.square().sum() / variance
        loss = unexplained + self._auxiliary_loss(centred.detach(), residual.detach())
        loss.backward()
        self.adam.step()
        with torch.no_grad():
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
            self.step_number += 1
            self.last_active[indices[acts > 0]] = self.step_number
        return float(unexplained.detach())

    def _auxiliary_loss(self, centred: Tensor, residual: Tensor) -> Tensor | float:
        """AuxK: the latents that have died reconstruct what the living ones miss."""
        dead = self.dead
        k = max(1, min(2 * self.settings.k, self.W_dec.shape[1] // 2))
        if len(dead) < k:
            return 0.0
        # A part of the batch is enough to bring them back and costs a quarter.
        some = slice(0, max(1, len(centred) // 4))
        acts, indices = TopkEncode.apply(
            centred[some], self.W_enc[dead], self.b_enc[dead], k, False
        )
        missed = residual[some]
        miss = missed - top_rows(acts, indices, self.W_dec[dead])
        return AUX_WEIGHT * miss.square().sum() / missed.square().sum()

    @property
    def dead(self) -> Tensor:
        """Latents that were not active for a while: [m] int64."""
        return (self.step_number - self.last_active > DEAD_AFTER_STEPS).nonzero().flatten()

    def autoencoder(self) -> SparseAutoencoder:
        """The SAE of z itself: the standardisation folded into its biases."""
        scale = self.standard.scale
        weights = {name: getattr(self, name).detach().cpu() for name in _PARAMETERS}
        return SparseAutoencoder(
            W_enc=weights["W_enc"].clone(),
            b_enc=weights["b_enc"] * scale,
            W_dec=weights["W_dec"].clone(),
            b_dec=weights["b_dec"] * scale + self.standard.mean,
            k=self.settings.k,
        )

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name."""
        tensors = {
            "last_active": self.last_active,
            "step_number": torch.tensor(self.step_number),
        }
        for name in _PARAMETERS:
            parameter = getattr(self, name)
            tensors[name] = parameter.detach()
            for moment in _MOMENTS:
                if parameter in self.adam.state:
                    tensors[f"{name}.{moment}"] = self.adam.state[parameter][moment]
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` gave.

        Raises:
            KeyError, RuntimeError: of another run.
        """
        self.step_number = int(tensors["step_number"])
        self.last_active.copy_(tensors["last_active"])
        for name in _PARAMETERS:
            parameter = getattr(self, name)
            with torch.no_grad():
                parameter.copy_(tensors[name])
            if self.step_number:
                self.adam.state[parameter] = {
                    moment: tensors[f"{name}.{moment}"].to(self.device) for moment in _MOMENTS
                }
