"""Do edits hold wherever they are asked, and end where something else is?

    python benchmarks/contexts.py --model demo/model --sae SAE --zsre zsre.jsonl --text passages.txt

Edited facts bare and in chat: in their own words, inside a longer message, with typos, in lower
case, in other languages, behind system prompts, in the second turn; and questions that no edit is
about behind a turn that was edited. Records 0 to T-1 are edited, 300 to 399 calibrate τ, 400 to 599
are what else is asked. With several --scope the sets are compared on the same residuals.
"""

import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.context_bench.asking import Questions, cases, translations
from benchmarks.context_bench.measuring import Row, measure
from benchmarks.context_bench.picture import draw
from benchmarks.context_bench.report import BARS, HEADER, table
from benchmarks.context_bench.sets import facts_of, make_set, read_scope
from microedit_trainer.cli.progress import counting
from microedit_trainer.contexts import Contexts
from microedit_trainer.facts import Fact, apart_from, read_facts
from microedit_trainer.language_model import LanguageModel
from microedit_vllm.artifact import EditOperator, EditSet, SparseAutoencoder
from microedit_vllm.artifact.atomic import write_atomically
from microedit_vllm.errors import MicroEditError

HOLD_OUT = slice(300, 400)
OTHERS = slice(400, 600)


def main(
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    zsre: Annotated[Path, typer.Option(help="ZsRE records, at least 600.")],
    text: Annotated[Path, typer.Option(help="Passages for the system prompts.")],
    sae: Annotated[Path | None, typer.Option(help="SAE folder; default: the sets' own.")] = None,
    edits: Annotated[
        list[Path] | None,
        typer.Option(help="Edit set to ask, of ZsRE records; repeatable. Default: make one."),
    ] = None,
    facts: Annotated[int, typer.Option(min=2, max=300, help="Records to edit.")] = 100,
    scope: Annotated[
        list[str] | None,
        typer.Option(metavar="LAST,RUN", help="Scope of a set to make; repeatable. [64,16]"),
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(metavar="CODE=FILE", help="MzsRE records, as de=mzsre_de.jsonl; repeatable."),
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Folder that keeps sets and targets.")] = None,
    out: Annotated[Path, typer.Option(help="JSON result; a picture beside it.")] = Path(
        "benchmarks/results/contexts.json"
    ),
) -> None:
    """Ask edited facts in every context, and other questions behind them."""
    console = Console()
    lm, records = LanguageModel.load(model), read_facts(zsre)
    if len(records) < OTHERS.stop:
        raise MicroEditError(f"{zsre} has {len(records)} records; {OTHERS.stop} are needed")
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if edits:
            sets = [(path, EditSet.load(path)) for path in edits]
        elif sae is not None:
            sets = _made(console, lm, sae, scope or ["64,16"], records, facts, folder)
        else:
            raise MicroEditError("nothing to ask; give --edits SET, or --sae to make a set")
        edited = facts_of(sets[0][1])
        if any(facts_of(other) != edited for _, other in sets):
            raise MicroEditError("the sets must hold the same facts to be compared")
        questions = _questions(edited, records, text, language or [])
        rows = _asked(console, lm, sets, sae, questions)
    _show(console, rows)
    found = {
        "model": lm.name,
        "facts": len(edited),
        "sets": [
            {"scope": name, "rows": [row.to_json() for row in own]} for name, own in rows.items()
        ],
    }
    write_atomically(out, (json.dumps(found, indent=1) + "\n").encode())
    picture = out.with_suffix(".png")
    write_atomically(picture, draw(rows, f"{len(edited)} edited facts"))
    console.print(f"written to {out} and {picture}", highlight=False)


def _made(
    console: Console,
    lm: LanguageModel,
    sae: Path,
    scopes: list[str],
    records: list[Fact],
    count: int,
    folder: Path,
) -> list[tuple[Path, EditSet]]:
    chosen, own = [read_scope(text) for text in scopes], records[:count]
    held_out = apart_from(own, records[HOLD_OUT])
    sets = []
    for scope in chosen:
        out = folder / f"{count}-{scope.last or 'turn'}-{scope.run}"
        # Each fact in two contexts.
        with counting(console, f"editing, {scope}", 2 * count) as progress:
            edit_set = make_set(lm, sae, scope, own, held_out, out, progress)
        sets.append((out, edit_set))
    return sets


def _questions(
    edited: list[Fact], records: list[Fact], text: Path, languages: list[str]
) -> Questions:
    translated = {}
    for given in languages:
        code, _, path = given.partition("=")
        if not path:
            raise MicroEditError(f"--language {given}: write it like de=mzsre_de.jsonl")
        translated[code] = translations(Path(path), code, edited)
    lines = text.read_text(encoding="utf-8").split("\n")
    passages = [line for line in lines if len(line.split()) > 30]
    return Questions(edited, records[OTHERS], passages, translated)


def _asked(
    console: Console,
    lm: LanguageModel,
    sets: list[tuple[Path, EditSet]],
    sae: Path | None,
    questions: Questions,
) -> dict[str, list[Row]]:
    operators, asked, names = [], [], []
    for folder, edit_set in sets:
        encoder = SparseAutoencoder.load(edit_set.sae_folder(folder, sae))
        operators.append(EditOperator.build(edit_set, encoder.to(lm.device)))
        decision = edit_set.manifest.decision
        contexts = Contexts(lm.tokenizer, decision.scope, decision.turn, lm.max_length)
        asked.append(list(cases(contexts, questions)))
        names.append(f"{folder.name}: {decision.scope}, τ {decision.tau:.3f}")
    total = sum(len(case.prompts) for own in asked for case in own)
    with counting(console, "asking", total) as progress:
        return dict(zip(names, measure(lm, operators, asked, progress), strict=True))


def _show(console: Console, rows: dict[str, list[Row]]) -> None:
    for name, own in rows.items():
        shown = Table(*HEADER, title=name)
        for column in shown.columns[1:]:
            column.no_wrap = True
        for line in table(own):
            shown.add_row(*line)
        console.print(shown)
        for bar in BARS:
            console.print(bar.line(own), highlight=False)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MicroEditError as error:
        sys.exit(f"contexts: {error}")
