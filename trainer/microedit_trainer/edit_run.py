"""From a facts file to an edit set: facts → contexts → stored residuals → solver → τ → set."""

import json
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microedit_trainer.activations import SINK_FACTOR
from microedit_trainer.calibration import Calibration, NearPrompts, calibrate, slack_for
from microedit_trainer.calibration_prompts import CalibrationPrompts, ordinary_lines
from microedit_trainer.contexts import ContextName, Contexts, PromptTokens
from microedit_trainer.device_turns import DeviceTurns
from microedit_trainer.edit_settings import EditSettings
from microedit_trainer.evaluation import Outcome, TorchEngine
from microedit_trainer.facts import Fact, find_conflicts, prompt_digest
from microedit_trainer.language_model import LanguageModel, Progress
from microedit_trainer.other_wordings import OtherWordings
from microedit_trainer.residual_store import HELD_BYTES, ResidualStore
from microedit_trainer.solvers import EditProblem, Solution
from microedit_trainer.solvers.problem import Stages, no_stages
from microedit_trainer.solvers.resume import open_work_folder
from microedit_trainer.stored_residuals import StoredPrompt
from microedit_vllm.artifact import (
    Decision,
    EditOperator,
    EditSet,
    Golden,
    Manifest,
    SparseAutoencoder,
    fingerprint_model,
    with_golden,
)
from microedit_vllm.artifact.edit_set import relative_sae_path
from microedit_vllm.artifact.manifest import (
    CARRYING_VERSION,
    FORMAT_VERSION,
    ModelIdentity,
    SaeIdentity,
)
from microedit_vllm.errors import MicroEditError

GOLDEN_TOKENS = 16


class EditRun:
    """One run of `microedit edit`, resumable through a work folder beside the set."""

    def __init__(
        self, lm: LanguageModel, sae: SparseAutoencoder, sae_folder: Path, settings: EditSettings
    ) -> None:
        self.lm = lm
        self.sae_folder = sae_folder
        self.settings = settings
        self.layer = _layer(lm, sae, settings.layer)
        if sae.d_in != lm.hidden_size:
            raise MicroEditError(
                f"the SAE in {sae_folder} is for residuals of width {sae.d_in}, {lm.name} has "
                f"{lm.hidden_size}; name the SAE that was trained on this model"
            )
        self.turns = DeviceTurns.build(lm, sae, self.layer, settings.offload)
        self.sae = self.turns.sae
        self.max_norm = SINK_FACTOR * (float(sae.report.get("median_norm", 0)) or self._norm())
        self.contexts = Contexts.build(lm.tokenizer, settings.scope, lm.max_length)
        room = None if settings.offload else HELD_BYTES
        self._residuals = ResidualStore(lm, self.layer, self.max_norm, settings.targets, room)

    def edit(
        self, facts: Sequence[Fact], out: Path, progress: Progress, stages: Stages = no_stages
    ) -> EditSet:
        """Train the set and write it to `out`, atomically.

        Args:
            progress: called with the number of prompts (or facts) that the solver has done.
            stages: shown how far everything else is.

        Raises:
            MicroEditError: a fact cannot be edited, or `out` is something else than an edit set.
        """
        _check_target(out)
        started, solver = time.monotonic(), self.settings.solver
        prompts = [self._render(fact) for fact in facts]
        self._check_scored(facts, prompts)
        # Before the work: a held-out record may be too long for the model.
        calibrating = self.calibration_prompts.by_group(facts)
        work = out.absolute().with_name(f".{out.name}-work")
        open_work_folder(work, self._run_description(facts))
        stored, ordinary = self._stored(prompts, stages), self._ordinary_tokens()
        others = OtherWordings(self.lm, self.contexts, self.context_names, self._residuals, stages)
        wordings = others.wordings(facts, solver.model_wordings, self.settings.targets or work)
        worded = others.worded(facts, wordings)
        reworded = others.reworded(facts, wordings) if solver.uses_rewordings else []
        mentions = others.mentions(facts) if solver.uses_mentions(len(facts)) else []
        swapped = others.swapped(facts, solver.swapped_wordings(len(facts)))
        with self.turns.solving() as sae:
            problem = EditProblem(
                lm=self.lm,
                sae=sae,
                layer=self.layer,
                facts=stored,
                reworded=reworded,
                worded=worded,
                mentions=mentions,
                ordinary=ordinary,
                swapped=swapped,
                work_folder=work,
                targets_folder=self.settings.targets,
                origin=json.dumps(
                    [fingerprint_model(self.lm.folder), str(self.lm.dtype), self.layer]
                ),
                executor=self.settings.executor,
                stages=stages,
            )
            solution = solver.solve(problem, progress)
        draft = self._draft(facts, solution, _golden_z(stored, ordinary), out)
        own = [[prompt.to("cpu") for prompt in fact] for fact in stored]
        # Gigabytes of many facts, which would lie on the device beside the model.
        del problem, stored, reworded, worded, mentions, swapped
        seconds = time.monotonic() - started
        edit_set = self._finish(facts, own, draft, solution, calibrating, seconds, stages)
        edit_set.save(out)
        shutil.rmtree(work, ignore_errors=True)
        return edit_set

    def calibrate(self, engine: TorchEngine, facts: Sequence[Fact]) -> Calibration:
        """τ for an engine with a set of these facts, as `edit` chooses it."""
        stored = engine.store.of([prompt for fact in facts for prompt in self._render(fact)])
        prompts = self.calibration_prompts.by_group(facts)
        return self._calibrate(engine, stored, len(facts), prompts)

    def units(self, facts: Sequence[Fact]) -> int:
        """How far `progress` counts for these facts."""
        return len(facts) * self.settings.solver.units_per_fact(len(self.context_names))

    def near_rate(self, facts: int) -> float:
        """Share of the near prompts that τ may let switch on, with so many facts."""
        given = self.settings.near_rate
        return self.settings.solver.near_rate(facts) if given is None else given

    @property
    def context_names(self) -> tuple[ContextName, ...]:
        return self.settings.context_names(self.contexts)

    @property
    def calibration_prompts(self) -> CalibrationPrompts:
        return CalibrationPrompts(
            self.contexts,
            self.context_names,
            self.settings.hold_out,
            swaps=self.settings.solver.name == "joint",
        )

    def _render(self, fact: Fact) -> list[PromptTokens]:
        return [
            self.contexts.render(name, fact.prompt, fact.target, fact.subject)
            for name in self.context_names
        ]

    def _check_scored(self, facts: Sequence[Fact], prompts: Sequence[list[PromptTokens]]) -> None:
        for number, (fact, rendered) in enumerate(zip(facts, prompts, strict=True), start=1):
            shortest = min(p.scored[1] - p.scored[0] for p in rendered)
            if shortest < 2:
                raise MicroEditError(
                    f"fact {number}: the prompt {fact.prompt!r} is too short for the switch to "
                    "recognise it; write at least four words"
                )

    def _stored(
        self, prompts: Sequence[list[PromptTokens]], stages: Stages
    ) -> list[list[StoredPrompt]]:
        def shown(done: int, total: int) -> None:
            stages("layers below", done / total, f"{total} prompts")

        flat = [p for rendered in prompts for p in rendered]
        stored = iter(self._residuals.of(flat, shown))
        return [[next(stored) for _ in rendered] for rendered in prompts]

    def _norm(self) -> float:
        """The median residual norm over the shipped ordinary prompts, for a foreign SAE."""
        ids = [self.lm.tokenizer(line).input_ids for line in ordinary_lines()[:64]]
        norms = [
            self.lm.lower(torch.tensor([i]), self.layer)[0].float().norm(dim=-1) for i in ids if i
        ]
        return float(torch.cat(norms).median())

    def _ordinary(self, lines: Sequence[str]) -> list[StoredPrompt]:
        rendered = [self.contexts.render(c, line) for line in lines for c in self.contexts.names]
        return self._residuals.of(rendered)

    def _ordinary_tokens(self) -> Tensor:
        """Residuals of the even ordinary lines (the odd ones are for τ), sinks left out: [N, d].

        A few of them, for the golden activations alone, where the solver holds none.
        """
        lines = ordinary_lines()[::2]
        stored = self._ordinary(lines if self.settings.solver.holds_ordinary else lines[:2])
        return torch.cat([p.z[1:][~p.is_sink[1:]] for p in stored]).float()

    def _run_description(self, facts: Sequence[Fact]) -> dict[str, Any]:
        return {
            "model": fingerprint_model(self.lm.folder),
            "dtype": str(self.lm.dtype),
            "sae": self.sae.fingerprint,
            "layer": self.layer,
            "contexts": self.context_names,
            "scope": str(self.settings.scope),
            "solver": self.settings.solver.hyperparameters(),
            "facts": [asdict(fact) for fact in facts],
        }

    def _finish(
        self,
        facts: Sequence[Fact],
        stored: Sequence[list[StoredPrompt]],
        draft: EditSet,
        solution: Solution,
        prompts: dict[str, list[PromptTokens]],
        seconds: float,
        stages: Stages,
    ) -> EditSet:
        """Calibrate τ, score the facts, and put the set together."""
        engine = TorchEngine(self.lm, EditOperator.build(draft, self.sae), self._residuals)
        stages("scores", 0.0, "choosing τ")
        if self.settings.offload:
            # Stored before the layers that store them leave the device.
            for group in prompts.values():
                self._residuals.of(group)
        with self.turns.solving() as sae:
            scoring = replace(engine, operator=EditOperator.build(draft, sae))
            own = [prompt for fact in stored for prompt in fact]
            calibration = self._calibrate(scoring, own, len(facts), prompts)
            draft = replace(draft, manifest=_with_tau(draft.manifest, calibration))
            scoring = replace(engine, operator=EditOperator.build(draft, sae))
            stages("scores", 0.4, f"{len(facts)} facts")
            lines = self._fact_lines(scoring, facts, stored)
        stages("scores", 0.9, "golden prompts")
        scores = {
            "rel": _mean([line["rel"] for line in lines]),
            "calibration": calibration.to_json(),
            "seconds_per_edit": round(seconds / len(facts), 4),
            **solution.report,
        }
        engine = replace(engine, operator=EditOperator.build(draft, self.sae))
        golden = self.calibration_prompts.golden(engine, facts)
        stages("scores", 1.0, "")
        manifest = draft.manifest.model_copy(update={"scores": scores})
        return replace(draft, manifest=manifest, facts=lines, golden_prompts=golden)

    def _manifest(self, facts: Sequence[Fact], solution: Solution, out: Path) -> Manifest:
        settings = self.settings
        relative = settings.solver.statistic == "relative"
        solver = settings.solver.hyperparameters()
        return Manifest(
            version=FORMAT_VERSION if solution.carried is None else CARRYING_VERSION,
            model=ModelIdentity(
                name=self.lm.name.rstrip("/").rsplit("/", 1)[-1],
                fingerprint=fingerprint_model(self.lm.folder),
                hidden_size=self.lm.hidden_size,
                num_layers=self.lm.num_layers,
                dtype=str(self.lm.dtype).removeprefix("torch."),
            ),
            sae=SaeIdentity(
                path=relative_sae_path(self.sae_folder, out),
                fingerprint=self.sae.fingerprint,
                num_latents=self.sae.num_latents,
                k=self.sae.k,
            ),
            layer=self.layer,
            solver=settings.solver.name,
            facts=len(facts),
            decision=Decision(
                statistic="relative" if relative else "absolute",
                tau=1.0,  # until it is calibrated
                alpha=None if relative else float(solver["alpha"]),
                scope=settings.scope,
                turn=self.contexts.turn,
                max_norm=self.max_norm,
            ),
            placement=solution.placement,
            position=solver.get("position", "decision"),
            activation=solution.activation,
            theta=solution.theta,
            hyperparameters={
                **solver,
                "contexts": list(self.context_names),
                "near_rate": self.near_rate(len(facts)),
                "held_out": [prompt_digest(f.prompt) for f in settings.hold_out],
                "language": settings.language,
            },
            created_with={
                name: version(name) for name in ("microedit-vllm", "torch", "transformers")
            }
            | {"python": platform.python_version()},
        )

    def _draft(
        self, facts: Sequence[Fact], solution: Solution, golden_z: Tensor, out: Path
    ) -> EditSet:
        """The set before τ is known: golden activations for golden_z [g, d]."""
        manifest = self._manifest(facts, solution, out)
        draft = EditSet(
            *(manifest, solution.scoring, solution.edit, Golden.none()), carried=solution.carried
        )
        return with_golden(draft, self.sae, golden_z.to(self.sae.W_enc.device))

    def _calibrate(
        self,
        engine: TorchEngine,
        edited: Sequence[StoredPrompt],
        facts: int,
        prompts: dict[str, list[PromptTokens]],
    ) -> Calibration:
        ards = {group: engine.ards(of_group).cpu() for group, of_group in prompts.items()}
        near, near_rate = ("held_out", "swapped", "invented"), self.near_rate(facts)
        # Absolute ARD spreads over ordinary prompts, so that τ cannot stay below all of them.
        return calibrate(
            edited=engine.ards_of(edited).cpu(),
            ordinary=ards["ordinary"],
            near={g: NearPrompts(ards[g], near_rate) for g in near if g in ards},
            slack=slack_for(facts),
            ordinary_rate=0.0 if self.settings.solver.statistic == "relative" else 0.05,
            fixed=self.settings.tau,
        )

    def _fact_lines(
        self, engine: TorchEngine, facts: Sequence[Fact], stored: Sequence[list[StoredPrompt]]
    ) -> list[dict[str, Any]]:
        """One line per fact for `facts.jsonl`: its own ARD and scores in each context."""
        conflicts = find_conflicts(facts)
        lines: list[dict[str, Any]] = [
            {
                "prompt": fact.prompt,
                "target": fact.target,
                "subject": fact.subject,
                "paraphrases": list(fact.paraphrases),
                "notes": conflicts.get(index, []),
            }
            for index, fact in enumerate(facts)
        ]
        for place, name in enumerate(self.context_names):
            suffix = f"_{name}" if place else ""
            prompts = [fact[place] for fact in stored]
            outcomes = engine.outcomes_of(prompts)
            for line, prompt, outcome in zip(lines, prompts, outcomes, strict=True):
                line[f"ard{suffix}"] = round(outcome.ard, 5)
                line[f"on{suffix}"] = outcome.on
                line[f"rel{suffix}"] = _accuracy(prompt.tokens, outcome)
        return lines


def _golden_z(stored: Sequence[list[StoredPrompt]], ordinary: Tensor) -> Tensor:
    """Residuals for the golden activations: of edited tokens, then of ordinary ones, [g, d]."""
    own = torch.cat([p.z[p.scored[-2:]] for fact in stored[:4] for p in fact]).float()
    half = GOLDEN_TOKENS // 2
    return torch.cat([own[:half], ordinary[: GOLDEN_TOKENS - half]])


def _layer(lm: LanguageModel, sae: SparseAutoencoder, layer: int | None) -> int:
    chosen = layer if layer is not None else sae.report.get("layer")
    if not isinstance(chosen, int):
        raise MicroEditError(
            "the SAE folder does not say which layer it belongs to; name it with --layer"
        )
    lm.check_layer(chosen)
    return chosen


def _with_tau(manifest: Manifest, calibration: Calibration) -> Manifest:
    found = {
        "tau": calibration.tau,
        "margin_edited": calibration.margin_edited,
        "margin_unrelated": calibration.margin_unrelated,
    }
    decision = manifest.decision.model_copy(update=found)
    return manifest.model_copy(update={"decision": decision})


def _check_target(out: Path) -> None:
    if out.exists() and not (out / "microedit.json").exists():
        raise MicroEditError(f"{out} exists and is not an edit set; name another --out")


def _accuracy(prompt: PromptTokens, outcome: Outcome) -> float:
    right = outcome.answer == torch.tensor(prompt.answer_ids)
    return round(float(right.float().mean()), 4)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
