"""`microedit edit`: facts in, edit set out."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from microedit_trainer.cli.config_option import config_option
from microedit_trainer.cli.estimates import announce_edit
from microedit_trainer.cli.progress import edit_bars
from microedit_trainer.run_config import RunConfig
from microedit_vllm.errors import MicroEditError

if TYPE_CHECKING:
    from microedit_trainer.solvers import Executor
    from microedit_vllm.artifact import EditSet, SparseAutoencoder

# From docs/quality.md, "Rows".
SEQUENTIAL_ROWS_PER_FACT = 40


class SolverName(StrEnum):
    joint = "joint"
    sequential = "sequential"


class TrainedIn(StrEnum):
    bare = "bare"
    chat = "chat"


class Statistic(StrEnum):
    absolute = "absolute"
    relative = "relative"


class Position(StrEnum):
    decision = "decision"
    sequence = "sequence"


def edit(
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    sae: Annotated[Path, typer.Option(help="SAE folder (sparsify's format).")],
    data: Annotated[Path, typer.Option(help="Facts file: JSON Lines, a JSON array, or CSV.")],
    out: Annotated[Path, typer.Option(help="Folder of the edit set.")],
    solver: Annotated[SolverName, typer.Option(help="How to solve.")] = SolverName.joint,
    limit: Annotated[int | None, typer.Option(min=1, help="Edit the first N facts.")] = None,
    hold_out: Annotated[
        str | None,
        typer.Option(
            metavar="N|SHARE|FILE",
            help="Records for calibrating τ alone, never edited: so many of --data's, a share of "
            "them, or those of another file.",
        ),
    ] = None,
    hold_out_seed: Annotated[int, typer.Option(help="Which records N or SHARE takes.")] = 0,
    language: Annotated[
        str | None, typer.Option(help="Edit in this language, where records have several (de).")
    ] = None,
    context: Annotated[
        list[TrainedIn] | None, typer.Option(help="Train in this context; repeatable.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Layer; default: the SAE's.")] = None,
    tau: Annotated[float | None, typer.Option(min=0, help="Fix τ, do not calibrate.")] = None,
    near_rate: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of near prompts that may switch on; default 0.05, where answers are "
            "carried 0.04, with --statistic absolute 0.1.",
        ),
    ] = None,
    targets: Annotated[
        Path | None,
        typer.Option(
            help="Keep what was found in this folder: residuals, and the joint solver's targets "
            "and solution. In a later run, with facts added or taken out, those that are there are "
            "not trained again."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="joint: find targets in N processes, each with the model in memory and its share "
            "of the threads. With --ray: at most N batches at a time.",
        ),
    ] = None,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="joint: find targets on a Ray cluster, that of RAY_ADDRESS or else one started "
            "here. Every node needs the model under the same path, or as a hub id.",
        ),
    ] = False,
    rows_per_fact: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Decoder rows per fact; 0: all that the facts activate (the paper). joint: of the "
            "edit change, the scoring change has a third of them; default 30, or 20 where that "
            "would take more than a quarter of the decoder. Without this option the scoring "
            "change of few facts or long prompts, or with --model-wordings, has more. Where "
            "answers are carried: of the edit change alone; default 5, and more in small sets. "
            "sequential: of its one change; default 40.",
        ),
    ] = None,
    reworded_weight: Annotated[
        float,
        typer.Option(
            min=0,
            help="joint: weight of the facts' prompts in other words; 0 does without, which saves "
            "time and costs Gen.",
        ),
    ] = 0.5,
    model_wordings: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="joint: have the model itself word each question anew, up to N times, and train "
            "those wordings too: more paraphrases switch on and are answered. Takes seconds a "
            "question on a CPU.",
        ),
    ] = 0,
    swapped_weight: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="joint: weight of the facts' wordings about other subjects, which shall not "
            "switch on; 0 does without, which saves time and in large sets costs Gen. Default: 10 "
            "with more than 500 facts, else 0.",
            show_default=False,
        ),
    ] = None,
    carry: Annotated[
        bool | None,
        typer.Option(
            "--carry/--no-carry",
            help="joint: carry the answer from the subject's tokens to wherever it is asked for: "
            "more paraphrases are answered, and more of what else is asked about the subject is "
            "changed. Default: with more than 500 facts.",
            show_default=False,
        ),
    ] = None,
    mentions_weight: Annotated[
        float,
        typer.Option(
            min=0,
            help="joint, where answers are carried: weight of the facts' subjects in other texts; "
            "0 does without, which saves time and costs Gen.",
        ),
    ] = 1.0,
    lr: Annotated[float | None, typer.Option(help="sequential: Adam's rate (paper 5e-5).")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="sequential: α of ARD; default: the SAE's mean ‖ẑ−z‖².")
    ] = None,
    steps_rec: Annotated[int | None, typer.Option(min=0, help="sequential: stage 1.")] = None,
    passes: Annotated[
        int,
        typer.Option(
            min=1,
            help="sequential: passes over the facts; from the second on, those that others have "
            "overwritten are edited again (the paper: 1).",
        ),
    ] = 3,
    statistic: Annotated[
        Statistic,
        typer.Option(
            help="sequential: decide by the ARD itself (the paper) or by its ratio to the unedited "
            "decoder's.",
        ),
    ] = Statistic.relative,
    steps_edit: Annotated[int | None, typer.Option(min=1, help="sequential: stage 2.")] = None,
    position: Annotated[
        Position,
        typer.Option(help="sequential: ẑ in the whole sequence (the paper) or from e on."),
    ] = Position.sequence,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="On a GPU: the layers up to the edited one wait in the CPU's memory while edits "
            "are solved, and the SAE while they run. The set is the same.",
        ),
    ] = False,
    config: Annotated[str | None, config_option("edit")] = None,
) -> None:
    """Train an edit set. A stopped run goes on where it was when the command is given again."""
    from microedit_trainer.edit_run import EditRun
    from microedit_trainer.edit_settings import EditSettings
    from microedit_trainer.facts import Split, read_facts, read_split
    from microedit_trainer.language_model import LanguageModel
    from microedit_trainer.solvers import JointSolver, SequentialSolver, Solver
    from microedit_vllm.artifact import SparseAutoencoder

    console = Console()
    if hold_out is None:
        split = Split(read_facts(data, limit, language), [], "")
    else:
        split = read_split(data, hold_out, hold_out_seed, limit, language)
        stated = f"held out for τ, never edited: {split.description}"
        console.print(stated, markup=False, highlight=False, soft_wrap=True)
    executor = _executor(solver, workers, ray)
    encoder = SparseAutoencoder.load(sae)
    if config is not None:
        shared = RunConfig.find(config)
        layer = _configured_layer(console, shared, encoder, layer)
        tau = shared.tau(len(split.edited)) if tau is None else tau
    chosen: Solver
    if solver is SolverName.joint:
        chosen = JointSolver(
            rows_per_fact=encoder.num_latents if rows_per_fact == 0 else rows_per_fact,
            carries=carry,
            reworded_weight=reworded_weight,
            model_wordings=model_wordings,
            swapped_weight=swapped_weight,
            mentions_weight=mentions_weight,
        )
    else:
        if rows_per_fact is None:
            rows_per_fact = SEQUENTIAL_ROWS_PER_FACT
        options = {"lr": lr, "steps_rec": steps_rec, "steps_edit": steps_edit}
        given: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
        distance = encoder.report.get("mean_distance") if alpha is None else alpha
        if distance is None:
            raise MicroEditError("the SAE folder does not state its mean ‖ẑ−z‖²; give --alpha")
        chosen = SequentialSolver(
            alpha=float(distance),
            position=position.value,
            passes=passes,
            rows_per_fact=rows_per_fact or None,
            statistic=statistic.value,
            **given,
        )
    settings = EditSettings(
        solver=chosen,
        scope=chosen.scope(len(split.edited)),
        layer=layer,
        tau=tau,
        near_rate=near_rate,
        hold_out=split.held_out,
        targets=targets,
        language=language,
        executor=executor,
        contexts=tuple(c.value for c in context) if context else None,
        offload=offload,
    )
    announce_edit(console, model, dtype, encoder, settings, split.edited)
    run = EditRun(LanguageModel.load(model, dtype), encoder, sae, settings)
    with edit_bars(console, run.units(split.edited)) as (progress, stages):
        edit_set = run.edit(split.edited, out, progress, stages)
    _report(console, edit_set, out)


def _executor(solver: SolverName, workers: int | None, ray: bool) -> "Executor":
    """Who finds the targets."""
    from microedit_trainer.solvers import InProcess, Processes, RayCluster

    if solver is SolverName.sequential and (workers is not None or ray):
        raise MicroEditError(
            "the sequential solver edits one fact after another; leave --workers and --ray out, "
            "or take --solver joint"
        )
    if ray:
        return RayCluster(workers)
    return InProcess() if workers in (None, 1) else Processes(workers)


def _configured_layer(
    console: Console, config: RunConfig, sae: "SparseAutoencoder", layer: int | None
) -> int | None:
    """The config's layer where neither the command line nor the SAE names one.

    Says where the SAE is another than the one that the config is for.
    """
    own = sae.report.get("layer") if layer is None else layer
    others = config.other_sae(own, sae.num_latents, sae.k)
    if others:
        console.print(
            f"[yellow]config {escape(config.name)} is for another SAE:[/] {'; '.join(others)}; "
            "its τ and α may not suit this one",
            soft_wrap=True,
        )
    return config.sae.get("layer") if own is None else layer


def _report(console: Console, edit_set: "EditSet", out: Path) -> None:
    manifest = edit_set.manifest
    decision = manifest.decision
    table = Table(show_header=False, box=None)
    off = [fact for fact in edit_set.facts if not fact["on"]]
    notes = [(fact["prompt"], note) for fact in edit_set.facts for note in fact["notes"]]
    rows = {
        "edit set": str(out),
        "facts": f"{manifest.facts}, {len(off)} of them do not switch on",
        "rel": f"{manifest.scores['rel']:.3f}",
        "tau": f"{decision.tau:.3f} ({decision.statistic} ARD)",
        "margin to edited": f"{decision.margin_edited:+.3f}",
        "margin to unrelated": f"{decision.margin_unrelated:+.3f}",
        "rows to score": str(len(edit_set.scoring.indices)),
        "rows to edit": str(len(edit_set.edit.indices)),
        "rows that carry": str(len(edit_set.carried.indices)) if edit_set.carried else "none",
        "seconds per edit": f"{manifest.scores['seconds_per_edit']:.2f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if manifest.serve_flags:
        console.print(f"to serve it, start with {' '.join(manifest.serve_flags)}")
    for fact in off[:10]:
        console.print(f"[yellow]does not switch on:[/] {escape(fact['prompt'])}")
    for prompt, note in notes[:20]:
        console.print(f"[yellow]{note}:[/] {escape(prompt)}")
