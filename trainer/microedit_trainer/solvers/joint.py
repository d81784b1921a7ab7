"""All facts together: per-fact targets, then two ridge solves.

The scoring change makes ẑ reconstruct z on the facts' own tokens from the subject on, so that
the switch turns on there and nowhere else; tokens before it are held as they are. The edit change
adds the targets' δ* from the decision position on, there and where the same prompt stands within
other words.

In a large set the subject's tokens alone are reconstructed, and carry the first of the answer's δ*
to the decision position (`carried`); the edit change adds what is left of it, and the rest.
"""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from microedit_kernels.edit_change import threshold_acts
from microedit_kernels.sparse_decode import decode
from microedit_kernels.topk_encode import pre_acts
from microedit_trainer.language_model import Progress
from microedit_trainer.solvers.carried import PooledCodes
from microedit_trainer.solvers.kept_solution import KeptSolution
from microedit_trainer.solvers.problem import EditProblem, Solution
from microedit_trainer.solvers.resume import TargetStore
from microedit_trainer.solvers.ridge import is_quick, ridge_system, strongest_rows
from microedit_trainer.solvers.sparse_codes import (
    CodedTerms,
    Encode,
    Term,
    Unexplained,
    dense_codes,
    tokens_at_once,
)
from microedit_trainer.solvers.targets import TargetSettings
from microedit_trainer.stored_residuals import StoredPrompt
from microedit_vllm.artifact import DecoderChange, Scope, SparseAutoencoder
from microedit_vllm.artifact.edit_set import VALUES_DTYPE
from microedit_vllm.errors import MicroEditError

# Measured at T = 100, n = 18,432: Gen with the switch forced on 0.894 with 20, 0.921 with 30.
ROWS_PER_FACT, FEWER_ROWS_PER_FACT = 30, 20
# Where the answer's first token is carried. Measured at 1,000 facts: 5,000 rows score as all 18,398
# do, with 2,500 the edited prompts in chat lose 1% of their tokens. At 100, 500 rows lose as much,
# so that few facts have `ROWS_PER_FACT`, up to so many rows.
CARRIED_ROWS_PER_FACT, SMALL_CARRIED_SET_ROWS = 5, 3000
# With few facts, or long prompts, the switch needs more rows than the answers do: for each fact up
# to `MOST_SCORING_ROWS`, for long prompts one for so many tokens and no more than a part of the
# decoder. Questions have too few tokens for that to count. Measured on 100 passages about people:
# with 1,000 rows a third of them switch on, with 2,500 62%, at the same near ones.
MOST_SCORING_ROWS, SMALL_SET_SCORING_ROWS = 25, 500
TOKENS_PER_SCORING_ROW, LONG_SCORING_PART = 4, 7

# Large sets carry their answers. Measured: at 1,000 facts Gen rises from 0.28 to 0.73 and near from
# 0.93 to 0.95; at 300 Gen stays, near falls from 0.98 to 0.95 and Gen in chat from 0.90 to 0.88,
# and the set is twice as large.
CARRIED_ABOVE = 500
# There facts' wordings are held about other subjects, so many at most: each is a forward pass.
# Measured: at 1,600 facts the share of ZsRE's paraphrases that switch on rises from 0.57 to 0.70
# where 10% of the near prompts do; at 300 it stays (ordinary prompts bound τ there).
MOST_HELD, SWAPPED_WEIGHT = 2000, 10.0
# Where the subject's tokens alone are reconstructed: how many the switch takes together, and among
# how many it looks. Measured at 1,600 facts on 2,600 passages of an encyclopaedia: 18 switch on
# among 32, 15 among 24, 6 among 16; of edited questions amid a longer message 4% fewer do in chat.
CARRIED_SCOPE = Scope(last=16, run=2)
# Near prompts that may switch on. Short runs within long texts are what τ must be stricter for.
NEAR_RATE, CARRIED_NEAR_RATE = 0.05, 0.04
# Weight of the tokens before the subject there: a short run hardly ever reaches them.
SHARED_WEIGHT = 0.1


@dataclass(frozen=True)
class RidgeSettings:
    """One ridge solve.

    Attributes:
        ridge: in units of the mean ‖h‖².
        unchanged_weight: weight of the tokens that shall not change: ordinary ones, and in the
            scoring those before a fact's subject.
    """

    ridge: float
    unchanged_weight: float


@dataclass(frozen=True)
class JointSolver:
    """The default solver.

    Attributes:
        rows_per_fact: decoder rows of the edit change per fact; the scoring change has a third of
            them. None: `ROWS_PER_FACT`, or `FEWER_ROWS_PER_FACT` where the former would take more
            than a quarter of the decoder; and more to score with in small sets and with long
            prompts. Where there is a carried change `CARRIED_ROWS_PER_FACT`, and more in small
            sets.
        least_rows: rows of each change that a small set may have in any case.
        scoring: the ridge solve of the scoring change, which must not reach other prompts. Its
            high ridge makes what it learns of a fact's tokens hold in other wordings.
        edit: the ridge solve of the edit change, which acts only where the switch is on.
        subject_scoring: in place of `scoring` where there is a carried change. That set has no row
            budget but the edit change's: measured at 1,600 facts, two thirds of the rows cost a
            ninth of the edited prompts that switch on. Its ridge is low, since a short run must be
            reconstructed well to stand out of long texts: with 2e-2 1% fewer of the edited prompts
            switch on, at as many ordinary ones; 2e-3 is no better.
        carried: the ridge solve of the carried change.
        carries: whether the subject's tokens carry the answer to wherever it is asked for. That
            answers paraphrases which end in other words, and whatever else is asked about the
            subject too. None: in sets of more than `CARRIED_ABOVE` facts, which leave the last
            token's residual too little room to tell them apart.
        theta: θ, the pre-activation above which a latent counts in the edit change; None: the
            latents that count are the top k.
        placement: what takes the place of z where the switch is on: z + δ, or as in the paper
            ẑ, whose latents are the top k.
        mentions_weight: weight, in the scoring and the carried change, of the subjects in other
            texts; 0 does without, which saves their forward passes. What stands before a subject
            moves its residuals: at 1,600 facts Gen is 0.63 without them.
        swapped_weight: weight of the facts' wordings about other subjects in the scoring change;
            0 does without, which saves their forward passes. None: `SWAPPED_WEIGHT` in sets of more
            than `CARRIED_ABOVE` facts, else 0.
        reworded_weight: weight of the facts' prompts in other words in the edit change; 0 does
            without, which saves their forward passes.
        model_wordings: how often at most each question is worded anew by the model itself, to be
            switched on and answered as well. Measured with 3 at 300 facts: Gen is 0.85 where it was
            0.83 on an SAE with k = 64, and stays at 0.85 with k = 32. A question takes seconds on a
            CPU.
    """

    rows_per_fact: int | None = None
    least_rows: int = 250
    scoring: RidgeSettings = RidgeSettings(ridge=1e-1, unchanged_weight=1.0)
    edit: RidgeSettings = RidgeSettings(ridge=3e-3, unchanged_weight=0.03)
    subject_scoring: RidgeSettings = RidgeSettings(ridge=5e-3, unchanged_weight=1.0)
    carried: RidgeSettings = RidgeSettings(ridge=1e-2, unchanged_weight=0.3)
    carries: bool | None = None
    theta: float | None = 0.0
    placement: Literal["delta", "replace"] = "delta"
    mentions_weight: float = 1.0
    swapped_weight: float | None = None
    reworded_weight: float = 0.5
    model_wordings: int = 0
    targets: TargetSettings = field(default_factory=TargetSettings)
    name: Literal["joint"] = "joint"

    def __post_init__(self) -> None:
        """Raises MicroEditError: a replaced residual stream with what it has no place for."""
        if self.placement == "replace" and (self.theta is not None or self.carries):
            raise MicroEditError(
                "placement 'replace' decodes the top k alone and carries nothing; "
                "leave theta and carries out (None)"
            )

    @property
    def statistic(self) -> Literal["relative"]:
        return "relative"

    def near_rate(self, facts: int) -> float:
        return CARRIED_NEAR_RATE if self.is_carried(facts) else NEAR_RATE

    def units_per_fact(self, contexts: int) -> int:
        return contexts

    @property
    def holds_ordinary(self) -> bool:
        return True

    @property
    def uses_rewordings(self) -> bool:
        return self.reworded_weight > 0

    def uses_mentions(self, facts: int) -> bool:
        return self.mentions_weight > 0 and self.is_carried(facts)

    def swapped_wordings(self, facts: int) -> int:
        return min(facts, MOST_HELD) if self._swapped_weight(facts) > 0 else 0

    def _swapped_weight(self, facts: int) -> float:
        if self.swapped_weight is not None:
            return self.swapped_weight
        return SWAPPED_WEIGHT if facts > CARRIED_ABOVE else 0.0

    def is_carried(self, facts: int) -> bool:
        """Whether a set of so many facts has a carried change."""
        if self.placement == "replace":
            return False
        return facts > CARRIED_ABOVE if self.carries is None else self.carries

    def scope(self, facts: int) -> Scope:
        return CARRIED_SCOPE if self.is_carried(facts) else Scope()

    def hyperparameters(self) -> dict[str, Any]:
        return asdict(self)

    def solve(self, problem: EditProblem, progress: Progress) -> Solution:
        """Targets of every prompt (resumable), then both solves."""
        deltas = self._all_targets(problem, progress)
        scoring = self._scoring_change(problem)
        carried = None
        if self.is_carried(len(problem.facts)):
            carried, deltas = self._carried_change(problem, scoring, deltas)
        edit, latents = self._edit_change(problem, deltas)
        report = {"least_latents": latents}
        activation: Literal["topk", "threshold"] = "topk" if self.theta is None else "threshold"
        return Solution(
            scoring, edit, self.placement, activation, self.theta, report, carried=carried
        )

    def budgets(self, facts: int, identifying: int, num_latents: int) -> dict[str, int]:
        """Rows that each change may have.

        Args:
            identifying: tokens that tell the facts' prompts, in every context and wording.
        """
        per_fact, more = self.rows_per_fact, 0
        if self.is_carried(facts):
            if per_fact is None:
                per_fact = CARRIED_ROWS_PER_FACT
                more = min(ROWS_PER_FACT * facts, SMALL_CARRIED_SET_ROWS)
            rows = max(self.least_rows, more, per_fact * facts)
            return {"scoring": num_latents, "carried": num_latents, "edit": rows}
        if per_fact is None:
            fits = ROWS_PER_FACT * facts <= num_latents // 4
            per_fact = ROWS_PER_FACT if fits else FEWER_ROWS_PER_FACT
            long = min(identifying // TOKENS_PER_SCORING_ROW, num_latents // LONG_SCORING_PART)
            more = min(MOST_SCORING_ROWS * facts, max(SMALL_SET_SCORING_ROWS, long))
        return {
            "scoring": max(self.least_rows, more, per_fact * facts // 3),
            "edit": max(self.least_rows, per_fact * facts),
        }

    def _all_targets(self, problem: EditProblem, progress: Progress) -> list[Tensor]:
        """δ* of every prompt, in the order of `_prompts`; those solved before are read back."""
        prompts = _prompts(problem)
        folder = problem.targets_folder or problem.work_folder
        origin = json.dumps([problem.origin, asdict(self.targets)])
        store = TargetStore(folder, problem.sae.d_in, origin)
        found = store.read(prompts)
        if found:
            progress(len(found))
        missing = [place for place in range(len(prompts)) if place not in found]
        size = self.targets.batch
        places = [missing[start : start + size] for start in range(0, len(missing), size)]
        batches = [[prompts[place] for place in batch] for batch in places]
        run = problem.executor.targets(problem.lm, problem.layer, self.targets, batches)
        with closing(run) as done:
            for number, deltas in done:
                store.write(batches[number], deltas)
                found.update(zip(places[number], deltas, strict=True))
                progress(len(deltas))
        return [found[place].to(problem.ordinary.device) for place in range(len(prompts))]

    def _scoring_change(self, problem: EditProblem) -> DecoderChange:
        sae, prompts = problem.sae, _told(problem)
        carries = self.is_carried(len(problem.facts))
        settings = self.subject_scoring if carries else self.scoring
        shared_weight = SHARED_WEIGHT if carries else settings.unchanged_weight
        own = torch.cat([p.z[p.about if carries else p.identifying] for p in prompts])
        shared = torch.cat([p.z[p.shared] for p in prompts])

        def encode(part: Tensor) -> Tensor:
            return dense_codes(*sae.encode(part), sae.num_latents)

        terms = [
            Term(own, Unexplained(sae.W_dec, sae.b_dec), 1.0),
            Term(problem.ordinary, None, settings.unchanged_weight),
            Term(shared, None, shared_weight),
        ]
        if problem.swapped:
            held = torch.cat([p.z[p.identifying] for p in problem.swapped])
            terms.append(Term(held, None, self._swapped_weight(len(problem.facts))))
        if any(problem.mentions):
            named = torch.cat([z for mentions in problem.mentions for z in mentions])
            terms.append(Term(named, _unexplained(sae, named), self.mentions_weight))
        return self._solve(problem, "scoring", settings, encode, terms)[0]

    def _carried_change(
        self, problem: EditProblem, scoring: DecoderChange, deltas: Sequence[Tensor]
    ) -> tuple[DecoderChange, list[Tensor]]:
        """The change, and what it leaves of each prompt's δ* to the edit change."""
        sae, device = problem.sae, problem.ordinary.device
        scoring = scoring.to(device)
        own = PooledCodes.of(sae, scoring, (p.z[p.scored] for p in _prompts(problem)))
        named = PooledCodes.of(sae, scoring, (z for some in problem.mentions for z in some))
        held = PooledCodes.of(sae, scoring, (p.z[p.scored] for p in problem.swapped))
        held += PooledCodes.of_tokens(sae, problem.ordinary)
        pooled = own + named + held
        numbers = torch.arange(len(pooled), device=device)
        of_own, of_named, of_held = numbers.split([len(own), len(named), len(held)])
        first = torch.stack([delta[0] for delta in deltas])
        terms = [
            Term(of_own, first, 1.0),
            Term(of_held, None, self.carried.unchanged_weight),
        ]
        if any(problem.mentions):
            counts = torch.tensor([len(some) for some in problem.mentions], device=device)
            wanted = first[: len(counts)].repeat_interleave(counts, dim=0)
            terms.append(Term(of_named, wanted, self.mentions_weight))
        change, _ = self._solve(problem, "carried", self.carried, pooled.dense, terms)
        rest = []
        for delta, done in zip(deltas, own.decode(change, device), strict=True):
            rest.append(torch.cat([delta[:1] - done, delta[1:]]))
        return change, rest

    def _edit_change(
        self, problem: EditProblem, deltas: Sequence[Tensor]
    ) -> tuple[DecoderChange, int]:
        """The change, and how many latents the least active edited token keeps."""
        sae = problem.sae
        own = torch.cat([p.z[p.edited] for p in _prompts(problem)])

        def encode(part: Tensor) -> Tensor:
            if self.theta is None:
                return dense_codes(*sae.encode(part), sae.num_latents)
            return threshold_acts(pre_acts(part, sae.W_enc, sae.b_enc, sae.b_dec), self.theta)

        def wanted(z: Tensor, delta: Tensor) -> Tensor:
            return delta if self.placement == "delta" else delta + _unexplained(sae, z)

        terms = [
            Term(own, wanted(own, torch.cat(list(deltas))), 1.0),
            Term(problem.ordinary, None, self.edit.unchanged_weight),
        ]
        if problem.reworded:
            # A prompt's δ* answers its rewordings as well. What differs between wordings is where
            # the answer begins; behind its first token they are much alike.
            first = [
                delta[:1].expand(len(z), -1)
                for z, delta in zip(problem.reworded, deltas, strict=True)
            ]
            others = torch.cat(list(problem.reworded))
            terms.append(Term(others, wanted(others, torch.cat(first)), self.reworded_weight))
        return self._solve(problem, "edit", self.edit, encode, terms)

    def _solve(
        self,
        problem: EditProblem,
        name: str,
        settings: RidgeSettings,
        encode: Encode,
        terms: Sequence[Term],
    ) -> tuple[DecoderChange, int]:
        """Ridge on all active rows, then again on the strongest within the budget.

        Args:
            terms: the edited tokens, then those that shall not change.

        Returns:
            The change, and how many latents the least active edited token has.
        """

        def watch(share: float, note: str) -> None:
            problem.stages(f"{name} change", share, note)

        coded = CodedTerms.of(encode, terms, watch)
        rows, ridge = coded.rows, settings.ridge * coded.survey.mean_square
        origin = f"{problem.origin} {problem.sae.fingerprint}"
        before = KeptSolution(problem.targets_folder, name, origin)
        start = None if is_quick(coded) else before.start(rows, coded.width)
        system = ridge_system(coded, watch)
        identifying = sum(len(p.identifying) for p in _told(problem))
        budget = self.budgets(len(problem.facts), identifying, problem.sae.num_latents)[name]
        fits = len(rows) <= budget
        change = system.solve(ridge, start=start, last=fits)
        before.keep(rows, change)
        if not fits:
            kept = strongest_rows(change, coded.survey.rms[rows], budget)
            rows, change = rows[kept], system.solve(ridge, kept, start=change[kept], last=True)
        watch(1.0, f"{len(rows)} rows")
        return DecoderChange(rows.cpu(), change.to(VALUES_DTYPE).cpu()), coded.survey.least


def _prompts(problem: EditProblem) -> list[StoredPrompt]:
    """Every prompt of every fact, grouped by context so that batches are of like lengths."""
    contexts = max(len(fact) for fact in problem.facts)
    return [fact[c] for c in range(contexts) for fact in problem.facts if c < len(fact)]


def _told(problem: EditProblem) -> list[StoredPrompt]:
    """Every prompt that shall switch on."""
    return [*_prompts(problem), *problem.worded]


def _unexplained(sae: SparseAutoencoder, z: Tensor) -> Tensor:
    """z − ẑ₀ of tokens [N, d], whatever rows the solve is over: fp32."""
    parts = z.split(tokens_at_once(sae.num_latents))
    return torch.cat(
        [part.float() - decode(*sae.encode(part), sae.W_dec, sae.b_dec) for part in parts]
    )
