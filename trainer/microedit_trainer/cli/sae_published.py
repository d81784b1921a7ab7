"""`microedit sae import` and `microedit sae check`: use an SAE that somebody else trained."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from microedit_trainer.cli.progress import stage_bars

if TYPE_CHECKING:
    from microedit_trainer.sae.check import Check


def import_command(
    source: Annotated[
        str, typer.Argument(help="Folder, hub id (OWNER/NAME), or OWNER/NAME/FOLDER.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    k: Annotated[
        int | None, typer.Option(help="Latents kept per token; a Top-k SAE brings its own.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Decoder layer, where the folder does not name it.")
    ] = None,
    norm_scale: Annotated[
        float | None,
        typer.Option(help="What z is multiplied by, where that is not stored."),
    ] = None,
    ignore_thresholds: Annotated[
        bool,
        typer.Option(
            "--ignore-thresholds", help="JumpReLU, gated: a Top-k in the thresholds' place."
        ),
    ] = False,
) -> None:
    """Convert a published SAE: sparsify, SAE Lens, Gemma Scope, Llama Scope.

    What the SAE computes stays the same, or the import is refused with the reason.
    """
    from microedit_trainer.sae_import import ImportOptions, import_sae

    console = Console(highlight=False)
    options = ImportOptions(k, layer, norm_scale, ignore_thresholds)
    with Console(stderr=True).status("converting"):
        sae = import_sae(source, out, options)
    about = sae.report["import"]
    where = f"layer {sae.report['layer']}" if "layer" in sae.report else "layer not known: --layer"
    found = f"{sae.num_latents:,} latents of width {sae.d_in:,}, k = {sae.k}, {where}"
    console.print(escape(f"{out}: {about['format']}, {found}"), soft_wrap=True)
    for note in about["notes"]:
        console.print(f"not as published: {escape(note)}", soft_wrap=True)


def check_command(
    sae: Annotated[Path, typer.Argument(help="SAE folder.")],
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file, folder, JSON Lines or package:NAME, not trained on; repeatable."
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Decoder layer; default: what the SAE's folder says.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to measure on.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Chooses the text.")] = 0,
    dtype: Annotated[str, typer.Option(help="Model's dtype; auto is the checkpoint's.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure an SAE on a model, and say whether it suits editing.

    Ends with status 1 where it does not. The limits are guides from small models.
    """
    from microedit_trainer.language_model import LanguageModel
    from microedit_trainer.sae.check import UNSUITABLE, check_sae
    from microedit_vllm.artifact.sae import SparseAutoencoder

    encoder = SparseAutoencoder.load(sae)
    language_model = LanguageModel.load(model, dtype)
    with stage_bars() as progress:
        found = check_sae(
            language_model,
            encoder,
            tuple(text or ()),
            layer,
            tokens,
            seed,
            lambda done, total: progress("collect", done, total, ""),
        )
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        _print(found)
    if found.verdict == UNSUITABLE:
        raise typer.Exit(1)


def _print(found: "Check") -> None:
    table = Table("text", "tokens", "FVU", "L0", "latents unused")
    for name, part in [*found.sources.items(), ("all", found.whole)]:
        table.add_row(
            escape(name),
            f"{part.tokens:,}",
            f"{part.fvu:.3f}",
            f"{part.l0:.1f}",
            f"{part.dead_share:.1%}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"layer {found.layer}, k = {found.k} of {found.num_latents:,} latents, "
        f"median norm of z {found.median_norm:.4g}"
    )
    console.print(f"{found.verdict} (a guide): {escape('; '.join(found.reasons))}", soft_wrap=True)
