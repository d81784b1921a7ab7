"""`microedit inspect`: an edit set, shown to a person or to a program."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from microedit_vllm.artifact import EditSet, Manifest

MISSING = "-"


def inspect(
    edit_set: Annotated[Path, typer.Argument(metavar="SET", help="Folder of the edit set.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
) -> None:
    """Show an edit set: model, SAE, switch, size, scores, and every fact's ARD against tau."""
    found = EditSet.load(edit_set)
    summary = summarise(found, edit_set)
    if as_json:
        typer.echo(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    console = Console()
    console.print(_overview(found.manifest, summary))
    console.print(_fact_table(summary["facts"]))


def summarise(edit_set: EditSet, folder: Path) -> dict[str, Any]:
    """What `--json` prints: the manifest, the size, and the facts with the switch decided.

    Each fact gains `on`: whether its own ARD is at most tau; None where it has no ARD.
    """
    manifest = edit_set.manifest
    num_facts = len(edit_set.facts)
    num_bytes = sum(change.num_bytes for change in edit_set.changes.values())
    tau = manifest.decision.tau
    return {
        "folder": str(folder),
        **manifest.model_dump(exclude={"facts"}),
        "num_facts": num_facts,
        "rows_scoring": len(edit_set.scoring.indices),
        "rows_edit": len(edit_set.edit.indices),
        "rows_carried": len(edit_set.carried.indices) if edit_set.carried else 0,
        "rows_shared": edit_set.is_shared,
        "bytes": num_bytes,
        "bytes_per_fact": num_bytes / num_facts if num_facts else None,
        "facts": [fact | {"on": _is_on(fact.get("ard"), tau)} for fact in edit_set.facts],
    }


def _is_on(ard: Any, tau: float) -> bool | None:
    return ard <= tau if isinstance(ard, int | float) else None


def _overview(manifest: Manifest, summary: dict[str, Any]) -> Table:
    table = Table(title=escape(f"Edit set {summary['folder']}"), show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _overview_rows(manifest, summary):
        table.add_row(escape(name), escape(value))
    return table


def _overview_rows(manifest: Manifest, summary: dict[str, Any]) -> list[tuple[str, str]]:
    model, sae, decision = manifest.model, manifest.sae, manifest.decision
    alpha = "" if decision.alpha is None else f", alpha {decision.alpha:g}"
    theta = "" if manifest.theta is None else f", theta {manifest.theta:.4g}"
    changed = f"{summary['rows_scoring']} scoring, {summary['rows_edit']} edit"
    if summary["rows_shared"]:
        changed = f"{summary['rows_scoring']}, one change for scoring and edit"
    if summary["rows_carried"]:
        changed += f", {summary['rows_carried']} carried"
    size = f"{summary['bytes']:,}"
    if summary["bytes_per_fact"] is not None:
        size += f", {summary['bytes_per_fact']:,.0f} per fact"
    rows = [
        ("model", f"{model.name} ({model.fingerprint[:12]}, {model.dtype})"),
        ("SAE", f"{sae.path} ({sae.fingerprint[:12]})"),
        ("layer", f"{manifest.layer} of {model.num_layers}"),
        ("latents, k", f"{sae.num_latents:,}, {sae.k}"),
        ("solver", manifest.solver),
        ("decision", f"{decision.statistic} ARD{alpha}"),
        ("tau", f"{decision.tau:.4g}"),
        ("margin to edited", _number(decision.margin_edited)),
        ("margin to unrelated", _number(decision.margin_unrelated)),
        ("scope", str(decision.scope)),
        ("placement", f"{manifest.placement}, from {manifest.position}"),
        ("activation", f"{manifest.activation}{theta}"),
        ("facts", str(summary["num_facts"])),
        ("rows changed", changed),
        ("bytes", size),
    ]
    return rows + [(name, _number(value)) for name, value in manifest.scores.items()]


def _fact_table(facts: list[dict[str, Any]]) -> Table:
    table = Table(title="Facts")
    table.add_column("prompt", overflow="fold", ratio=3)
    table.add_column("target", overflow="fold", ratio=1)
    for name in ("ARD", "on", "chat ARD", "rel", "chat rel"):
        table.add_column(name, justify="right")
    has_notes = any(fact.get("notes") for fact in facts)
    if has_notes:
        table.add_column("notes", overflow="fold", ratio=2)
    for fact in facts:
        cells = [
            escape(str(fact.get("prompt", MISSING))),
            escape(str(fact.get("target", MISSING))),
            escape(_number(fact.get("ard"))),
            {True: "on", False: "off", None: MISSING}[fact["on"]],
            *(escape(_number(fact.get(name))) for name in ("ard_chat", "rel", "rel_chat")),
        ]
        if has_notes:
            cells.append(escape("; ".join(map(str, fact.get("notes") or []))))
        table.add_row(*cells)
    return table


def _number(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)
