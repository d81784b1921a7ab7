"""The carried change: from what a prompt's scored tokens say to the δ that answers it.

One row of the regression is one prompt: the codes of its scored tokens, weighted as they are when
the set is served (`microedit_kernels.carried_change`), so that the tokens which the scoring change
reconstructs, the subject's, are what the answer is looked up by.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from microedit_kernels.carried_change import carried_weights
from microedit_kernels.sparse_decode import decode, decode_change, row_map, squared_distance
from microedit_trainer.solvers.sparse_codes import tokens_at_once
from microedit_vllm.artifact import DecoderChange, SparseAutoencoder

# Prompts that are encoded together.
TOGETHER = 64


@dataclass(frozen=True)
class PooledCodes:
    """Codes of prompts [N, n], sparse; prompts are named by their numbers.

    Attributes:
        rows, values: per prompt, its latents and their weighted codes, int64 and fp32.
    """

    rows: list[Tensor]
    values: list[Tensor]
    num_latents: int

    @classmethod
    def of(
        cls, sae: SparseAutoencoder, scoring: DecoderChange, scored: Iterable[Tensor]
    ) -> "PooledCodes":
        """What each prompt's scored tokens, z [S, d], carry under a scoring change."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        where, changed = row_map(scoring.indices, sae.num_latents), scoring.values.float()
        prompts = iter(scored)
        while some := list(islice(prompts, TOGETHER)):
            z = torch.cat(some).float()
            acts, indices = sae.encode(z)
            z_hat0 = decode(acts, indices, sae.W_dec, sae.b_dec)
            z_hat = z_hat0 + decode_change(acts, indices, where, changed)
            parts = (acts, indices, squared_distance(z_hat, z), squared_distance(z_hat0, z))
            sizes = [len(own) for own in some]
            for own in zip(*(part.split(sizes) for part in parts), strict=True):
                _add(found, sae.num_latents, *own)
        return cls(*found, sae.num_latents)

    @classmethod
    def of_tokens(cls, sae: SparseAutoencoder, z: Tensor) -> "PooledCodes":
        """Tokens [N, d] that stand alone, each as a prompt of its own."""
        acts, indices = sae.encode(z.float())
        return cls(list(indices), list(acts), sae.num_latents)

    def __len__(self) -> int:
        return len(self.rows)

    def __add__(self, other: "PooledCodes") -> "PooledCodes":
        return PooledCodes(self.rows + other.rows, self.values + other.values, self.num_latents)

    def dense(self, numbers: Tensor) -> Tensor:
        """Codes [B, n] fp32 of some prompts, [B] int64."""
        codes = torch.zeros(len(numbers), self.num_latents, device=numbers.device)
        for line, number in enumerate(numbers.tolist()):
            codes[line, self.rows[number]] = self.values[number]
        return codes

    def decode(self, change: DecoderChange, device: torch.device) -> Tensor:
        """What a change makes of every prompt: [N, d] fp32."""
        rows, values = change.indices.to(device), change.values.float().to(device)
        return torch.cat([self.dense(some)[:, rows] @ values for some in self._numbers(device)])

    def _numbers(self, device: torch.device) -> Iterator[Tensor]:
        yield from torch.arange(len(self), device=device).split(tokens_at_once(self.num_latents))


def _add(
    found: tuple[list[Tensor], list[Tensor]],
    num_latents: int,
    acts: Tensor,
    indices: Tensor,
    dist: Tensor,
    dist0: Tensor,
) -> None:
    """Pool the codes [S, k] of one prompt."""
    weights = carried_weights(dist, dist0, torch.ones_like(dist, dtype=torch.bool))
    pooled = acts.new_zeros(num_latents)
    pooled.index_add_(0, indices.flatten(), (acts * weights[:, None]).flatten())
    rows = pooled.nonzero()[:, 0]
    found[0].append(rows)
    found[1].append(pooled[rows])
