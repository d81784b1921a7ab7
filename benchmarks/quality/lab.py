"""Edit sets made and measured as experiments ask, with all that can be kept in a work folder.

    sae-*/  sae-text/  sets/*/  targets/  rows/*.json

Texts with their residuals are kept for SAEs of other widths, prompts with theirs (in `targets`) for
other sets.

Rows and sets are known by what they were made with, not by the code that made them: after a change
of a solver start with --fresh, which keeps SAEs and targets.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.quality import recipe
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.records import Records, Split
from benchmarks.quality.store import Figures, ResultStore, digest
from microedit_trainer.cli.progress import counting, stage_bars
from microedit_trainer.contexts import Contexts
from microedit_trainer.edit_run import EditRun
from microedit_trainer.edit_settings import EditSettings
from microedit_trainer.evaluation import TorchEngine, evaluate
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.sae import SaeSettings, train_sae
from microedit_vllm.artifact import EditOperator, EditSet, SparseAutoencoder, fingerprint_model
from microedit_vllm.artifact.atomic import write_atomically


@dataclass(frozen=True)
class Lab:
    """Model, records, and the work folder.

    Attributes:
        given_sae: in place of the one that the recipe would train.
        one_sae: in place of its variations, too.
    """

    model: str
    records: Records
    work: Path
    given_sae: Path | None
    console: Console
    one_sae: bool = False

    @cached_property
    def lm(self) -> LanguageModel:
        return LanguageModel.load(self.model)

    @cached_property
    def _model_fingerprint(self) -> str:
        return fingerprint_model(self.lm.folder)

    @property
    def rows(self) -> ResultStore:
        return ResultStore(self.work / "rows")

    def forget_results(self) -> None:
        """Drop rows and sets; SAEs and targets stay."""
        for name in ("rows", "sets"):
            shutil.rmtree(self.work / name, ignore_errors=True)

    def sae_folder(self, experiment: Experiment) -> Path:
        """The experiment's SAE, trained where it is not there."""
        if self.given_sae is not None and (self.one_sae or not experiment.sae):
            return self.given_sae
        fields = {**recipe.SAE, **experiment.sae}
        folder = self.work / f"sae-{digest([self._model_fingerprint, fields])}"
        if not folder.exists():
            held_out = self.work / "held_out.jsonl"
            write_atomically(held_out, self.records.held_out_lines())
            named = {recipe.HELD_OUT: str(held_out)}
            text = tuple(named.get(source, source) for source in fields["text"])
            self.say(f"training an SAE of {fields['width']:,} latents")
            with stage_bars() as progress:
                train_sae(
                    self.lm,
                    SaeSettings(**{**fields, "text": text}),
                    folder,
                    progress=progress,
                    collected=self.work / "sae-text",
                )
        return folder

    def described(self, experiment: Experiment) -> dict[str, Any]:
        """All that the experiment's set depends on."""
        sae = SparseAutoencoder.load(self.sae_folder(experiment))
        return {
            "model": self._model_fingerprint,
            "sae": sae.fingerprint,
            "facts": experiment.facts,
            "solver": experiment.build_solver(sae).hyperparameters(),
            "settings": experiment.build_settings(),
            "timed": experiment.timed,
        }

    def split(self, experiment: Experiment) -> Split:
        """The experiment's records."""
        return self.records.split(experiment.facts)

    def edit_set(self, experiment: Experiment) -> EditSet:
        """The experiment's set, made where it is not there."""
        out = self.work / "sets" / digest(self.described(experiment))
        if out.exists():
            return EditSet.load(out)
        run, edited = self.run(experiment), self.split(experiment).edited
        with counting(self.console, "editing", run.units(edited)) as progress:
            return run.edit(edited, out, progress)

    def run(self, experiment: Experiment) -> EditRun:
        """What makes the experiment's set."""
        folder = self.sae_folder(experiment)
        sae = SparseAutoencoder.load(folder)
        settings = EditSettings(
            solver=experiment.build_solver(sae),
            hold_out=self.split(experiment).hold_out,
            targets=None if experiment.timed else self.work / "targets",
            **experiment.build_settings(),
        )
        return EditRun(self.lm, sae, folder, settings)

    def engine(self, experiment: Experiment) -> TorchEngine:
        """The experiment's set in plain torch."""
        sae = SparseAutoencoder.load(self.sae_folder(experiment)).to(self.lm.device)
        operator = EditOperator.build(self.edit_set(experiment), sae)
        return TorchEngine.build(self.lm, operator, self.work / "targets")

    def contexts(self, experiment: Experiment) -> Contexts:
        """How prompts are asked under the experiment's scope."""
        decision = self.edit_set(experiment).manifest.decision
        return Contexts(self.lm.tokenizer, decision.scope, decision.turn, self.lm.max_length)

    def scores(self, experiment: Experiment) -> Figures:
        """Size, seconds, τ, and the scores bare and in chat, as `evaluate` gives them."""
        return self.row("scores", experiment, lambda: self._scores(experiment))

    def row(self, kind: str, experiment: Experiment, measure: Callable[[], Figures]) -> Figures:
        """Figures of one kind of an experiment, measured where they are not there."""
        return self.rows.get(kind, self.described(experiment), measure)

    def description(self, experiment: Experiment) -> str:
        """Model, SAE and machine on one line."""
        sae = SparseAutoencoder.load(self.sae_folder(experiment))
        fvu = sae.report.get("fvu")
        quality = "" if fvu is None else f", FVU {fvu:.2f}"
        return (
            f"Model: {self.lm.folder.resolve().name}, {self.lm.num_layers} layers of width "
            f"{self.lm.hidden_size}. SAE: {sae.num_latents:,} latents, k = {sae.k}, layer "
            f"{sae.report.get('layer')}{quality}. {os.cpu_count()} CPU cores, torch "
            f"{torch.__version__}."
        )

    def say(self, what: str) -> None:
        """A line on the screen about what comes next."""
        self.console.print(what, markup=False, highlight=False)

    def _scores(self, experiment: Experiment) -> Figures:
        edit_set, split = self.edit_set(experiment), self.split(experiment)
        engine, contexts = self.engine(experiment), self.contexts(experiment)
        changed = [len(change.indices) for change in edit_set.changes.values()]
        figures: Figures = {
            "facts": len(split.edited),
            "near": len(split.near),
            "rows": changed,
            "share_of_decoder": sum(changed) / edit_set.manifest.sae.num_latents,
            "tau": edit_set.manifest.decision.tau,
            "seconds_per_edit": edit_set.manifest.scores["seconds_per_edit"],
        }
        for name in contexts.names:
            self.say(f"  scoring, {name}")
            found = evaluate(engine, contexts, split.edited, split.near, name, split.subjects)
            figures[name] = asdict(found)
        return figures
