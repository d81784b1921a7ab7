"""Train a Top-k SAE on one layer of a model: texts → sequences → activations → weights → report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from microedit_trainer.activations import Activations, collect_activations
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.sae.collected import Collected
from microedit_trainer.sae.interrupt import deferred_interrupt
from microedit_trainer.sae.optimisation import SaeOptimisation
from microedit_trainer.sae.report import report_reconstruction
from microedit_trainer.sae.self_sampling import SELF, sample_texts
from microedit_trainer.sae.settings import SaeSettings
from microedit_trainer.sae.work_folder import WorkFolder, describe, one_line_disk_errors
from microedit_trainer.text_sources import read_texts
from microedit_trainer.token_sequences import TokenSequences, build_sequences
from microedit_vllm.artifact.fingerprint import fingerprint_model
from microedit_vllm.artifact.sae import CONFIG, SparseAutoencoder
from microedit_vllm.errors import MicroEditError

Progress = Callable[[str, int, int, str], None]
"""Called with the stage, what is done of it, its total, and a note."""

_CHARACTERS_PER_TOKEN = 20
"""Read this much text per wanted token: enough in any tokenizer, and files are shuffled."""


def train_sae(
    model: LanguageModel,
    settings: SaeSettings,
    out: Path,
    fresh: bool = False,
    progress: Progress | None = None,
    offload: bool = False,
    collected: Path | None = None,
) -> SparseAutoencoder:
    """Train, measure and save an SAE; continue a stopped run with the same settings.

    While it runs, everything lies in `.OUT-work` beside `out`; `out` appears when all is done.

    Args:
        fresh: throw a stopped run away.
        offload: the model waits in the CPU's memory while the SAE is trained; same weights.
        collected: folder that keeps sequences and residuals for the next SAE of the same text and
            layer, and has those of the last one; None keeps nothing.

    Raises:
        MicroEditError: bad settings or text, or a full disk.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
    """
    model.check_layer(settings.layer)
    check_out(out)
    fingerprint = fingerprint_model(model.folder)
    run = _Run(model, settings, WorkFolder(out, settings, fingerprint))
    run.progress = progress or (lambda *_: None)
    run.offload = offload
    run.collected = Collected(collected, settings, fingerprint) if collected else None
    run.work.open(fresh)
    try:
        return run.whole(out)
    finally:
        run.work.close()


class _Run:
    """One training run and the seconds that its stages took."""

    progress: Progress
    offload: bool
    collected: Collected | None

    def __init__(self, model: LanguageModel, settings: SaeSettings, work: WorkFolder) -> None:
        self.model, self.settings, self.work = model, settings, work
        self.device = model.device
        self.seconds: dict[str, float] = {}
        self._running: tuple[str, float] | None = None

    def whole(self, out: Path) -> SparseAutoencoder:
        """All stages; the work folder goes when `out` is there."""
        if self.collected:
            self.collected.lend(self.work)
        try:
            sequences = self.sequences()
        except MicroEditError:
            self.work.remove()  # nothing is in it yet that a resumed run could use
            raise
        activations = self.activations(sequences)
        if self.collected:
            self.collected.keep(self.work)
        with self.model.offloaded() if self.offload else nullcontext():
            sae, measured = self.trained(activations)
        report = self.report(activations, measured)
        with one_line_disk_errors(out):
            saved = replace(sae, report=report).save(out)
        self.work.remove()
        return saved

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Time a stage and yield its progress callback."""
        self._running = (name, time.perf_counter())
        try:
            yield lambda done, total: self.progress(name, done, total, "")
        finally:
            self.seconds, self._running = self.spent(), None

    def spent(self) -> dict[str, float]:
        """Seconds by stage, with the running one up to now; a resumed run's add up."""
        spent = dict(self.seconds)
        if self._running:
            name, started = self._running
            spent[name] = round(spent.get(name, 0.0) + time.perf_counter() - started, 2)
        return spent

    def sequences(self) -> TokenSequences:
        stored = self.work.load_sequences()
        if stored is not None:
            return stored
        settings, tokenizer = self.settings, self.model.tokenizer
        specs = [spec for spec in dict.fromkeys(settings.text) if spec != SELF]
        # Named sources first: a wrong path shows before the model samples for minutes.
        limit = _CHARACTERS_PER_TOKEN * settings.tokens
        sources = [read_texts(spec, tokenizer, settings.seed, limit) for spec in specs]
        wanted = self._sample_tokens(len(specs))
        if wanted:
            with self.stage("sample") as advance:
                sources.append(
                    sample_texts(
                        self.model, wanted, settings.sequence_length, settings.seed, advance
                    )
                )
        if not sources:
            raise MicroEditError("no text to train on; pass --text or --sample-tokens")
        built = build_sequences(
            sources,
            tokenizer,
            settings.tokens,
            min(settings.sequence_length, self.model.max_length),
            settings.heldout_share,
            settings.seed,
        )
        self._check_amount(built)
        self.work.save_sequences(built)
        return built

    def _sample_tokens(self, named_sources: int) -> int:
        if self.settings.sample_tokens or SELF not in self.settings.text:
            return self.settings.sample_tokens
        return self.settings.tokens // (named_sources + 1)

    def _check_amount(self, sequences: TokenSequences) -> None:
        training = int(sequences.used[~sequences.held_out].sum())
        if training < self.settings.width:
            raise MicroEditError(
                f"{training:,} tokens of text are too few for {self.settings.width:,} latents: at "
                f"least {self.settings.width:,} are needed and 20 times as many are better; "
                "add --text, raise --tokens, or lower --width"
            )
        if not bool(sequences.held_out.any()):
            raise MicroEditError("one short text leaves nothing to measure on; add --text")

    def activations(self, sequences: TokenSequences) -> Activations:
        settings, d = self.settings, self.model.hidden_size
        activation_bytes = 2 * d * int(sequences.used.sum())
        stored = self.work.activations.stat().st_size if self.work.activations.exists() else 0
        # Parameters and two moments of encoder and decoder, in two checkpoints while they swap.
        self.work.check_space(activation_bytes - stored + 2 * 6 * 4 * d * settings.width)
        with self.stage("collect") as advance:
            return collect_activations(
                self.model, settings.layer, sequences, self.work.activations, advance
            )

    def optimise(self, activations: Activations) -> SaeOptimisation:
        settings, total = self.settings, self.settings.total_steps
        optimisation = SaeOptimisation(activations.rows, activations.train, settings, self.device)
        checkpoint = self.work.load_checkpoint()
        if checkpoint:
            optimisation.restore(checkpoint[0])
            self.seconds = checkpoint[1]
        with deferred_interrupt() as interrupted, self.stage("train"):
            while optimisation.step_number < total:
                fvu = optimisation.step()
                done = optimisation.step_number
                self.progress("train", done, total, f"FVU {fvu:.3f}")
                if interrupted() or (done % settings.checkpoint_every == 0 and done < total):
                    self.work.save_checkpoint(optimisation.state(), self.spent())
                if interrupted():
                    raise KeyboardInterrupt
        return optimisation

    def trained(self, activations: Activations) -> tuple[SparseAutoencoder, dict[str, Any]]:
        """The SAE, in the CPU's memory, and what it is worth; the optimiser's state ends first."""
        sae = self.optimise(activations).autoencoder()
        with self.stage("report"):
            measured = report_reconstruction(sae.to(self.device), activations)
        return sae, measured

    def report(self, activations: Activations, measured: dict[str, Any]) -> dict[str, Any]:
        training = activations.train
        return {
            "layer": self.settings.layer,
            "model": self.model.name,
            "model_fingerprint": fingerprint_model(self.model.folder),
            "tokens": len(training),
            "sinks_left_out": int((~activations.is_ordinary).sum()),
            "steps": self.settings.total_steps,
            "seed": self.settings.seed,
            "seconds": round(sum(self.seconds.values()), 1),
            "seconds_by_stage": self.seconds,
            "max_norm": activations.max_norm,
            "median_norm": activations.median_norm,
            **measured,
            "settings": describe(self.settings),
        }


def check_out(out: Path) -> None:
    """Refuse to put an SAE in the place of something else.

    Raises:
        MicroEditError: `out` exists and is not an SAE folder.
    """
    if out.exists() and not (out / CONFIG).is_file():
        raise MicroEditError(
            f"{out} exists and is not an SAE folder; name a new folder or remove it first"
        )
