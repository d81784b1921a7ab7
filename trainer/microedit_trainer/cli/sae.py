"""`microedit sae`: train a sparse autoencoder, or use one that was published."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from microedit_trainer.cli.config_option import config_option
from microedit_trainer.cli.estimates import announce_sae
from microedit_trainer.cli.progress import stage_bars
from microedit_trainer.cli.sae_published import check_command, import_command

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command("import")(import_command)
app.command("check")(check_command)


@app.callback()
def sae() -> None:
    """Sparse autoencoders: the ground that edits are written on."""


@app.command()
def train(
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    layer: Annotated[int, typer.Option(help="Decoder layer whose output is used, from 0.")],
    width: Annotated[int, typer.Option(help="Number of latents.")],
    k: Annotated[int, typer.Option(help="Latents kept per token.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file, folder, JSON Lines, package:NAME, questions (about invented things), "
            "or self (sampled from the model); repeatable."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to collect.")] = 100_000,
    steps: Annotated[int, typer.Option(help="Steps; 0 chooses by the tokens.")] = 0,
    batch: Annotated[int, typer.Option(help="Tokens per step.")] = 1024,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0,
    sample_tokens: Annotated[int, typer.Option(help="Tokens the model samples itself.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Continue a stopped run, or start over.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="Model's dtype; auto is the checkpoint's.")] = "auto",
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="On a GPU: the model waits in the CPU's memory while the SAE is trained.",
        ),
    ] = False,
    config: Annotated[str | None, config_option("train")] = None,
) -> None:
    """Train an SAE; what it is worth on held-out text is stored in its folder.

    A stopped run is continued by the same command.
    """
    from microedit_trainer.language_model import LanguageModel
    from microedit_trainer.sae import SaeSettings, train_sae

    settings = SaeSettings(
        layer=layer,
        width=width,
        k=k,
        text=tuple(text or ()),
        tokens=tokens,
        steps=steps,
        batch=batch,
        lr=lr,
        seed=seed,
        sample_tokens=sample_tokens,
    )
    announce_sae(Console(stderr=True), model, dtype, settings, offload)
    language_model = LanguageModel.load(model, dtype)
    try:
        with stage_bars() as progress:
            trained = train_sae(language_model, settings, out, not resume, progress, offload)
    except KeyboardInterrupt:
        print("stopped; the same command resumes, with --fresh it starts over", file=sys.stderr)
        raise
    Console().print(report_table(trained.report))
    Console().print(f"{out}: {width:,} latents, k = {k}, layer {layer}", highlight=False)


def report_table(report: dict[str, Any]) -> Table:
    """Held-out quality per text source."""
    table = Table("held-out text", "tokens", "FVU", "latents unused")
    for name, found in report["sources"].items():
        table.add_row(
            name,
            f"{found['held_out_tokens']:,}",
            f"{found['fvu']:.3f}",
            f"{found['dead_share']:.0%}",
        )
    table.add_row(
        "all, and training text", "", f"{report['fvu']:.3f}", f"{report['dead_share']:.1%}"
    )
    return table
