"""The paper's solver: fact after fact, two stages (Eq. 7 to 16, Algorithm 1).

Encoder and model are frozen. Each fact trains only the decoder rows that its tokens activate
(Eq. 15, 16): they are gathered, trained with a fresh Adam, and put back.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from microedit_kernels.sparse_decode import decode, squared_distance
from microedit_trainer.language_model import Progress
from microedit_trainer.solvers.fewer_rows import carry_over
from microedit_trainer.solvers.problem import EditProblem, Solution
from microedit_trainer.solvers.resume import read_checkpoint, write_checkpoint
from microedit_trainer.stored_residuals import StoredPrompt
from microedit_vllm.artifact import DecoderChange, Scope
from microedit_vllm.artifact.edit_set import VALUES_DTYPE
from microedit_vllm.errors import MicroEditError

CHECKPOINT = "sequential.safetensors"
ROWS_AT_ONCE = 4096
# An edit is forgotten where L_edit is so many times what counted as learnt.
FORGOTTEN = 4
# Of a small set, where a budget by facts would be less than one prompt activates.
LEAST_ROWS = 250


@dataclass(frozen=True)
class SequentialSolver:
    """Attributes:
    alpha: α of Eq. 13, in units of ‖ẑ − z‖² (the paper: 600).
    lr: Adam's learning rate (the paper: 5e-5).
    steps_rec: steps of stage 1, L_rec alone.
    steps_edit: most steps of stage 2, L_rec + L_edit.
    learnt: L_edit below which stage 2 ends.
    position: where ẑ goes: every token of prompt and answer (the paper) or from the decision on.
    passes: how often it goes over the facts (the paper: once). From the second time on, only those
        that a later fact has overwritten are edited again.
    rows_per_fact: decoder rows per fact, `LEAST_ROWS` in any case; None: all that the facts
        activate (the paper). What the others did is carried over to the strongest ones, and one
        more pass edits again what that has lost, on those rows alone.
    statistic: what decides: ARD as in the paper, or relative to the unedited decoder's.
    checkpoint_every: facts between two checkpoints.
    """

    alpha: float
    lr: float = 3e-4
    steps_rec: int = 30
    steps_edit: int = 60
    learnt: float = 0.05
    position: Literal["decision", "sequence"] = "decision"
    passes: int = 1
    rows_per_fact: int | None = None
    statistic: Literal["absolute", "relative"] = "absolute"
    checkpoint_every: int = 10
    name: Literal["sequential"] = "sequential"

    def __post_init__(self) -> None:
        """Raises MicroEditError: numbers that no run can have."""
        for name in ("passes", "rows_per_fact"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MicroEditError(f"{name} is {value}; it must be at least 1")
        for name in ("alpha", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise MicroEditError(f"{name} is {getattr(self, name)}; it must be positive")

    @staticmethod
    def scope(facts: int) -> Scope:
        """The whole prompt, as the paper."""
        return Scope(last=None, run=0)

    def near_rate(self, facts: int) -> float:
        return 0.05 if self.statistic == "relative" else 0.1

    def units_per_fact(self, contexts: int) -> int:
        return self.passes + (self.rows_per_fact is not None)

    @property
    def holds_ordinary(self) -> bool:
        return False

    @property
    def uses_rewordings(self) -> bool:
        return False

    @property
    def model_wordings(self) -> int:
        return 0

    def uses_mentions(self, facts: int) -> bool:
        return False

    def swapped_wordings(self, facts: int) -> int:
        return 0

    def hyperparameters(self) -> dict[str, Any]:
        return asdict(self)

    def solve(self, problem: EditProblem, progress: Progress) -> Solution:
        """Edit one fact after another; a stopped run goes on behind its last checkpoint.

        Beside the problem it holds one copy of W_dec, 4·n·d bytes, and what one fact needs.
        """
        W_dec = problem.sae.W_dec.clone()
        changed = torch.zeros(problem.sae.num_latents, dtype=torch.bool, device=W_dec.device)
        done = self._restore(problem, W_dec, changed)
        progress(done)
        facts = problem.facts
        allowed = None
        for turn in range(done, self.units_per_fact(1) * len(facts)):
            if turn >= self.passes * len(facts) and allowed is None:
                if turn == self.passes * len(facts):
                    self._keep_strongest(problem, W_dec, changed)
                allowed = changed.clone()
            for prompt in facts[turn % len(facts)]:
                if turn >= len(facts) and self._holds(problem, prompt, W_dec):
                    continue
                rows, values = self._edit(problem, prompt, W_dec, allowed)
                W_dec[rows] = values
                if allowed is None:
                    changed[rows] = True
            if (turn + 1) % self.checkpoint_every == 0:
                self._save(problem, W_dec, changed, turn + 1)
            progress(1)
        rows = changed.nonzero()[:, 0]
        # In parts: a whole difference is a third decoder beside the two that are compared.
        parts = [
            (W_dec[part] - problem.sae.W_dec[part]).to(VALUES_DTYPE).cpu()
            for part in rows.split(ROWS_AT_ONCE)
        ]
        change = DecoderChange(rows.cpu(), torch.cat(parts))
        return Solution(change, change, "replace", "topk", None, {})

    def _keep_strongest(self, problem: EditProblem, W_dec: Tensor, changed: Tensor) -> None:
        """Carry the change over to as many rows as the budget has, in place."""
        budget = max(LEAST_ROWS, (self.rows_per_fact or 0) * len(problem.facts))
        if int(changed.sum()) <= budget:
            return
        prompts = [prompt for fact in problem.facts for prompt in fact]
        z = torch.cat([p.z[self._scored(p) | self._substituted(p)] for p in prompts])

        def watch(share: float, note: str) -> None:
            problem.stages("fewer rows", share, note)

        rows, change = carry_over(problem.sae, W_dec, z, budget, watch)
        W_dec.copy_(problem.sae.W_dec)
        W_dec[rows] += change
        changed.zero_()
        changed[rows] = True
        watch(1.0, f"{len(rows)} rows")

    @torch.no_grad()
    def _holds(self, problem: EditProblem, prompt: StoredPrompt, W_dec: Tensor) -> bool:
        """Whether an earlier edit still gives its answer."""
        where = self._substituted(prompt).nonzero()[:, 0]
        top_acts, top_indices = problem.sae.encode(prompt.z.float()[where])
        z_hat = decode(top_acts, top_indices, W_dec, problem.sae.b_dec)
        loss = self._edit_loss(problem, prompt, where, z_hat)
        return float(loss) < FORGOTTEN * self.learnt

    def _edit(
        self,
        problem: EditProblem,
        prompt: StoredPrompt,
        W_dec: Tensor,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Train one prompt's rows: indices [u] and their new values [u, d].

        Args:
            allowed: [n] bool, the rows that may change; None: all.
        """
        sae, z = problem.sae, prompt.z.float()
        substituted, scored = self._substituted(prompt), self._scored(prompt)
        where = (scored | substituted).nonzero()[:, 0]
        top_acts, top_indices = sae.encode(z[where])
        rows, local = top_indices.unique(return_inverse=True)
        values = W_dec[rows].clone().requires_grad_(True)
        if allowed is not None:
            values.register_hook(lambda gradient: gradient * allowed[rows, None])
        optimizer = torch.optim.Adam([values], lr=self.lr)
        is_scored = scored[where]

        def reconstruct() -> tuple[Tensor, Tensor]:
            z_hat = decode(top_acts, local, values, sae.b_dec)
            ard = squared_distance(z_hat[is_scored], z[where][is_scored]).mean() / self.alpha
            return z_hat, ard

        for _ in range(self.steps_rec):
            _step(optimizer, reconstruct()[1])
        inside = substituted[where]
        for _ in range(self.steps_edit):
            z_hat, ard = reconstruct()
            loss = self._edit_loss(problem, prompt, where[inside], z_hat[inside])
            if float(loss.detach()) < self.learnt:
                break
            _step(optimizer, ard + loss)
        return rows, values.detach()

    def _edit_loss(
        self, problem: EditProblem, prompt: StoredPrompt, where: Tensor, z_hat: Tensor
    ) -> Tensor:
        """L_edit = −log P(answer) with ẑ in place of z at `where` (Eq. 10), mean over tokens."""
        z = prompt.z.index_put((where,), z_hat.to(prompt.z.dtype))
        hidden = problem.lm.upper(z[None], problem.layer)[0, prompt.edited]
        return F.cross_entropy(problem.lm.logits(hidden), prompt.answer_with_end.to(z.device))

    def _scored(self, prompt: StoredPrompt) -> Tensor:
        mask = torch.zeros(len(prompt.z), dtype=torch.bool, device=prompt.z.device)
        mask[prompt.scored.to(mask.device)] = True
        return mask

    def _substituted(self, prompt: StoredPrompt) -> Tensor:
        mask = torch.zeros(len(prompt.z), dtype=torch.bool, device=prompt.z.device)
        mask[1 if self.position == "sequence" else prompt.edited.start :] = True
        return mask & ~prompt.is_sink

    def _save(self, problem: EditProblem, W_dec: Tensor, changed: Tensor, done: int) -> None:
        rows = changed.nonzero()[:, 0]
        values = torch.cat([W_dec[part].cpu() for part in rows.split(ROWS_AT_ONCE)])
        checkpoint = {"rows": rows, "values": values, "done": torch.tensor([done])}
        write_checkpoint(problem.work_folder / CHECKPOINT, checkpoint)

    def _restore(self, problem: EditProblem, W_dec: Tensor, changed: Tensor) -> int:
        """Put a checkpoint's rows in place; how many facts it holds."""
        checkpoint = read_checkpoint(problem.work_folder / CHECKPOINT)
        if checkpoint is None:
            return 0
        rows = checkpoint["rows"].to(W_dec.device)
        W_dec[rows] = checkpoint["values"].to(W_dec.device)
        changed[rows] = True
        return int(checkpoint["done"])


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
