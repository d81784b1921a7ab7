"""Edited facts wherever they may be asked, under several decision scopes."""

from benchmarks.context_bench import report
from benchmarks.context_bench.asking import LANGUAGES, Questions, cases, translations
from benchmarks.context_bench.measuring import Row, measure
from benchmarks.context_bench.picture import draw
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.figures import percent, score
from benchmarks.quality.lab import Lab
from benchmarks.quality.page import Section
from benchmarks.quality.plan import Plan
from benchmarks.quality.records import in_words
from benchmarks.quality.store import Figures
from benchmarks.quality.tables.experiments import main_experiments
from microedit_trainer.cli.progress import counting
from microedit_vllm.artifact import Scope

NAME = "contexts"
# Beside the default one: how many tokens are looked at, and in runs of how many. More of them are
# compared by `benchmarks/contexts.py`.
SCOPES = (Scope(last=64, run=8),)
TEXT = """
{facts}, solved jointly, asked in other ways than they were edited. For what is asked about
nothing edited (after an edited question and its answer in the first turn) the figures are the
share of tokens unchanged and the share of prompts that switch on. Each scope has a set of its
own, with its own τ.
"""


def section(lab: Lab, plan: Plan) -> Section:
    """Build it."""
    experiments = _experiments(lab, plan)
    rows = {name: _rows(lab, name, experiment) for name, experiment in experiments.items()}
    header = ["asked", "context", "prompts"]
    for name in rows:
        header += [name, "on"]
    lines = []
    for same in zip(*rows.values(), strict=True):
        line = [same[0].name, same[0].context, str(same[0].prompts)]
        for row in same:
            line += _cells(row)
        lines.append(line)
    facts = in_words(plan.some)
    pictures = {"contexts": draw(rows, f"{facts} facts by decision scope")}
    return Section(NAME, "Contexts", TEXT.format(facts=facts), header, lines, pictures=pictures)


def _experiments(lab: Lab, plan: Plan) -> dict[str, Experiment]:
    """By the scope's name, the main table's own first."""
    chosen = main_experiments(plan)["some"]
    default = chosen.build_settings()["scope"]
    others = [scope for scope in SCOPES if scope != default]
    found = {str(default): chosen}
    return found | {str(s): Experiment(plan.some, settings={"scope": s}) for s in others}


def _rows(lab: Lab, name: str, experiment: Experiment) -> list[Row]:
    lab.say(f"contexts: {name}")
    found = lab.row("contexts", experiment, lambda: _measure(lab, experiment))
    return [Row.from_json(row) for row in found["rows"]]


def _measure(lab: Lab, experiment: Experiment) -> Figures:
    split, passages = lab.split(experiment), lab.records.text.read_text(encoding="utf-8")
    questions = Questions(
        split.edited,
        split.near,
        [line for line in passages.split("\n") if len(line.split()) > 30],
        {
            code: translations(lab.records.path(f"mzsre_{code}_dev.jsonl"), code, split.edited)
            for code in LANGUAGES
        },
    )
    asked = list(cases(lab.contexts(experiment), questions))
    with counting(lab.console, "asking", sum(len(case.prompts) for case in asked)) as progress:
        (rows,) = measure(lab.lm, [lab.engine(experiment).operator], [asked], progress)
    return {"rows": [row.to_json() for row in rows]}


def _cells(row: Row) -> list[str]:
    """What is right, and what is on; a missed bar stands behind."""
    own = [bar for bar in report.BARS if (bar.case, "chat") == (row.name, row.context)]
    least = next((bar.limit for bar in own if not bar.fires), None)
    most = next((bar.limit for bar in own if bar.fires), 1.0)
    on = percent(row.fire_rate)
    return [score(row.right, least), on if row.fire_rate <= most else f"**{on}** (> {most:.0%})"]
