"""`microedit explain`: why an edit set fires on a prompt, or does not."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from microedit_trainer.cli.progress import counting
from microedit_vllm.errors import MicroEditError

if TYPE_CHECKING:
    from microedit_trainer.audit import Explanation
    from microedit_trainer.audit.explanation import Firing, Row, Token
    from microedit_trainer.evaluation import TorchEngine
    from microedit_vllm.artifact import EditSet

MISSING = "-"
# Of a long head in front of the scored tokens, what is shown.
SHOWN_BEFORE = 4
LONGEST_PROMPT = 32


def explain(
    edit_set: Annotated[Path, typer.Argument(metavar="SET", help="Folder of the edit set.")],
    prompt: Annotated[str, typer.Option(help="What is asked.")],
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a user in a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="The chat's system prompt.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model folder or hub id; default: the set's, beside it or here."),
    ] = None,
    sae: Annotated[Path | None, typer.Option(help="SAE folder, when it was moved.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 20,
    facts: Annotated[int, typer.Option(min=0, help="Compare the first N facts.")] = 1000,
    rows: Annotated[int, typer.Option(min=1, help="Name the N strongest rows.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Also draw it: PICTURE.png.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32 or bfloat16; default: the set's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
) -> None:
    """Say why an edit set fires on a prompt, or does not.

    ARD by token against τ, the changed rows that fire, the facts behind them, and the answer
    before and after.
    """
    from microedit_trainer.audit import Request
    from microedit_trainer.audit import explain as explained
    from microedit_trainer.audit.fact_overlap import stored_facts
    from microedit_trainer.audit.picture import check_picture, draw_explanation
    from microedit_vllm.artifact import EditSet

    request = Request(prompt, chat, system, max_tokens, facts, rows)
    if out is not None:
        check_picture(out)
    loaded = EditSet.load(edit_set)
    engine = _engine(loaded, edit_set, model, sae, dtype)
    # Not in a program's way, nor in a file's.
    waiting = Console(stderr=True)
    waiting.quiet = not waiting.is_terminal
    with counting(waiting, "comparing facts", len(stored_facts(loaded, facts))) as progress:
        found = explained(engine, request, edit_set, progress)
    if out is not None:
        draw_explanation(out, found)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        _print(Console(), found)


def _engine(
    edit_set: "EditSet", folder: Path, model: str | None, sae: Path | None, dtype: str | None
) -> "TorchEngine":
    from microedit_trainer.evaluation import TorchEngine
    from microedit_trainer.language_model import LanguageModel, resolve_folder
    from microedit_vllm.artifact import fingerprint_model

    name = _model_of(edit_set, folder) if model is None else model
    # Before minutes of loading.
    edit_set.check_model(fingerprint_model(resolve_folder(name)), name)
    lm = LanguageModel.load(name, dtype or edit_set.manifest.model.dtype)
    lm.check_layer(edit_set.manifest.layer)
    return TorchEngine.load(lm, edit_set, folder, sae)


def _model_of(edit_set: "EditSet", folder: Path) -> str:
    """The folder of the name that the set remembers: beside the set, else in this folder."""
    name = Path(edit_set.manifest.model.name).name
    for place in (folder.parent / name, Path(name)):
        if name and place.is_dir():
            return str(place)
    raise MicroEditError(
        f"the edit set was made for {edit_set.manifest.model.name}, which lies neither beside "
        "the set nor here; name its folder or hub id with --model"
    )


def _print(console: Console, found: "Explanation") -> None:
    from microedit_trainer.audit.picture import headline, shortened

    console.print(f"[bold]{escape(headline(found))}[/]")
    console.print(_token_table(found))
    run = len(found.scoring.positions)
    where = f"the {run} tokens that decide" if run else "no token"
    console.print(_row_table(f"Rows that score, at {where}", found.scoring, found.top_k))
    where = f"token {found.decision_position}"
    console.print(_row_table(f"Rows that edit, at {where}", found.edit, found.top_k))
    if found.carried is not None:
        where = ", ".join(map(str, found.carried.positions)) or "none"
        title = f"Rows that carry to token {found.decision_position}, at tokens {where}"
        console.print(_row_table(title, found.carried, found.top_k))
    console.print(_fact_table(found))
    for name, answer in (("before", found.before), ("after", found.after)):
        console.print(f"[bold]{name}[/]  {escape(shortened(answer, 400) or '(nothing)')}")


def _token_table(found: "Explanation") -> Table:
    from microedit_trainer.audit.picture import one_line

    table = Table(title="Tokens")
    for name in ("", "token"):
        table.add_column(name, justify="right" if not name else "left")
    for name in ("looked at", f"{found.statistic} ARD", "run", f"changed of {found.top_k}"):
        table.add_column(name, justify="right")
    first = next((t.position for t in found.tokens if t.scored), 0)
    hidden = max(0, first - SHOWN_BEFORE)
    if hidden:
        table.add_row("", f"({hidden} tokens before)")
    for token in found.tokens[hidden:]:
        table.add_row(
            str(token.position),
            escape(one_line(token.text)),
            _role(token, found.decision_position),
            _number(token.ratio),
            _number(token.run_ard),
            str(token.changed),
            style="bold" if token.decides else None,
        )
    return table


def _role(token: "Token", decision_position: int) -> str:
    if token.position == decision_position:
        return "decision"
    if not token.scored:
        return ""
    if token.sink:
        return "sink"
    return "decides" if token.decides else "yes"


def _row_table(title: str, firing: "Firing", top_k: int) -> Table:
    strongest = " ".join(f"{latent.latent}{'*' * latent.changed}" for latent in firing.strongest)
    caption = (
        f"{firing.rows_firing} of {firing.rows_total} changed rows fire; of a token's top {top_k} "
        f"{firing.changed_of_top_k:.1f} are changed\n"
        f"strongest latents (* changed): {strongest or MISSING}"
    )
    table = Table(title=title, caption=caption, caption_justify="left")
    for name in ("row", "h", "h·‖ΔW‖", "share"):
        table.add_column(name, justify="right")
    table.add_column("facts behind it", overflow="fold")
    for row in firing.rows:
        table.add_row(
            str(row.latent),
            f"{row.activation:.1f}",
            f"{row.strength:.2f}",
            f"{row.share:.1%}",
            escape(_behind(row)),
        )
    return table


def _behind(row: "Row") -> str:
    from microedit_trainer.audit.picture import shortened

    if not row.facts:
        return MISSING
    others = [f"{share.share:.0%} of {share.fact}" for share in row.facts[1:]]
    first = row.facts[0]
    named = f"{first.share:.0%} {first.fact}: {shortened(first.prompt, LONGEST_PROMPT)}"
    return "; ".join([named, *others])


def _fact_table(found: "Explanation") -> Table:
    caption = f"{found.facts_compared} of the set's {found.facts_total} facts were compared"
    table = Table(title="Nearest facts", caption=caption, caption_justify="left")
    table.add_column("fact", justify="right")
    table.add_column("overlap: score", justify="right")
    table.add_column("edit", justify="right")
    table.add_column("prompt", overflow="fold")
    table.add_column("target", overflow="fold")
    table.add_column("its ARD", justify="right")
    for fact in found.nearest:
        table.add_row(
            str(fact.fact),
            f"{fact.overlap:.2f}",
            f"{fact.edit_overlap:.2f}",
            escape(fact.prompt),
            escape(fact.target),
            _number(fact.ard),
        )
    return table


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"
