"""Decoder rows against scores."""

import io
from typing import Any

from benchmarks.quality.experiment import Experiment
from benchmarks.quality.figures import SCORES_HEADER, percent, score, scores, size
from benchmarks.quality.lab import Lab
from benchmarks.quality.page import Section
from benchmarks.quality.plan import Plan
from benchmarks.quality.records import Chosen, in_words
from benchmarks.quality.store import Figures

NAME = "budgets"
TEXT = """
How many decoder rows each change may have. The rows that do the most are kept and solved again
alone. In brackets: all changes as a part of the decoder. 1,000 facts carry their answers: there the
edit change alone has a budget. The sequential solver has one change for both, goes over the facts
once more with the rows that are left, and trains the bare prompt alone.
"""
HEADER = (
    "facts",
    "solver",
    "at most",
    "rows to score + to edit (+ that carry)",
    *SCORES_HEADER,
    "chat Rel",
    "chat Gen",
)
DRAWN = {"rel": "Rel", "gen": "Gen", "near": "near"}


def section(lab: Lab, plan: Plan) -> Section:
    """Build it."""
    lines = []
    measured: dict[Chosen, list[Figures]] = {}
    for facts, budgets in plan.budgets.items():
        for budget in budgets:
            lab.say(f"budgets: {in_words(facts)}, at most {budget or 'all'} rows")
            figures = lab.scores(Experiment(facts, options=options(budget)))
            measured.setdefault(facts, []).append(figures)
            lines.append(_line(facts, "joint", str(budget or "all"), figures))
    for facts, per_facts in plan.sequential_budgets.items():
        for per_fact in per_facts:
            at_most = f"{per_fact} a fact" if per_fact else "all"
            lab.say(f"budgets: {in_words(facts)}, sequential, at most {at_most} rows")
            experiment = Experiment(facts, "sequential", {"rows_per_fact": per_fact})
            lines.append(_line(facts, "sequential", at_most, lab.scores(experiment)))
    pictures = {"rows": _draw(measured)}
    return Section(NAME, "Rows", TEXT, HEADER, lines, pictures=pictures)


def _line(facts: Chosen, solver: str, budget: str, figures: Figures) -> list[str]:
    line = [in_words(facts), solver, budget, size(figures), *scores(figures["bare"])]
    chat = figures.get("chat", {})
    return [*line, *(score(chat.get(name)) for name in ("rel", "gen"))]


def options(budget: int | None) -> dict[str, Any]:
    """Solver fields that keep each change within so many rows; None: without a limit."""
    return {"rows_per_fact": 1, "least_rows": 1 << 30 if budget is None else budget}


def _draw(measured: dict[Chosen, list[Figures]]) -> bytes:
    """A panel for each score, a line for each number of facts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(DRAWN), 3.6), layout="constrained")
    axes = figure.subplots(1, len(DRAWN), squeeze=False)[0]
    for axis, (name, title) in zip(axes, DRAWN.items(), strict=True):
        for facts, rows in measured.items():
            shares = [figures["share_of_decoder"] for figures in rows]
            axis.plot(shares, [f["bare"][name] for f in rows], "o-", label=in_words(facts))
        axis.set(title=title, xlabel="rows, as a part of the decoder")
        axis.xaxis.set_major_formatter(lambda share, _: percent(share))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()
