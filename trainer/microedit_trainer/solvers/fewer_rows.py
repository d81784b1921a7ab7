"""A change of many decoder rows, carried over to the few that do most of its work."""

import torch
from torch import Tensor

from microedit_kernels.sparse_decode import decode
from microedit_trainer.solvers.ridge import ridge_system, strongest_rows
from microedit_trainer.solvers.sparse_codes import CodedTerms, Term, Watch, dense_codes
from microedit_vllm.artifact import SparseAutoencoder

# In units of the mean ‖h‖²: only what the tokens leave open is to be small.
RIDGE = 1e-3
TOKENS_AT_ONCE = 2048


@torch.no_grad()
def carry_over(
    sae: SparseAutoencoder, W_dec: Tensor, z: Tensor, count: int, watch: Watch
) -> tuple[Tensor, Tensor]:
    """The `count` strongest rows of a change, solved again so that z is decoded as before.

    Args:
        W_dec: the changed decoder [n, d] fp32; the SAE has the unchanged one.
        z: the tokens that it was changed for, [N, d]: they activate every row that differs.

    Returns:
        The rows [c] int64, ascending, and their change [c, d] fp32.
    """
    wanted = []
    for part in z.split(TOKENS_AT_ONCE):
        codes = sae.encode(part.float())
        wanted.append(decode(*codes, W_dec, sae.b_dec) - decode(*codes, sae.W_dec, sae.b_dec))

    def encode(part: Tensor) -> Tensor:
        return dense_codes(*sae.encode(part.float()), sae.num_latents)

    coded = CodedTerms.of(encode, [Term(z, torch.cat(wanted), 1.0)], watch)
    rows = coded.rows
    change = W_dec[rows] - sae.W_dec[rows]
    kept = strongest_rows(change, coded.survey.rms[rows], count)
    system = ridge_system(coded, watch)
    ridge = RIDGE * coded.survey.mean_square
    return rows[kept], system.solve(ridge, kept, start=change[kept])
