"""Tables of resources: on a terminal, in JSON, and in the documentation."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.table import Table

from benchmarks.kernel_resources.results import TARGETS, Outcome
from microedit_vllm.errors import MicroEditError

_COLUMNS = (
    *("kernel", "shape", "compiled in", "warps", "stages", "registers"),
    *("spilled, bytes", "in loops", "shared, KiB", "matrix instructions"),
)
_NUMBERS = _COLUMNS[3:9]


def _cells(outcome: Outcome) -> tuple[str, ...]:
    launch, found = outcome.launch, outcome.resources
    name = (launch.kernel, ", ".join(launch.shapes), launch.constants)
    if found is None:
        return (*name, *("–" for _ in _NUMBERS), "does not compile")
    return (
        *name,
        *(str(found.warps), str(found.stages), str(found.registers)),
        *(str(found.spilled), str(found.spills_in_loops), f"{found.shared / 1024:.1f}"),
        ", ".join(f"{count} {kind}" for kind, count in found.matrix.items()),
    )


def _by_run(outcomes: Iterable[Outcome]) -> Iterator[tuple[tuple[str, str], list[Outcome]]]:
    runs = groupby(outcomes, key=lambda outcome: (outcome.target, outcome.triton))
    return ((key, list(group)) for key, group in runs)


def tables(outcomes: Iterable[Outcome]) -> Iterator[Table]:
    """One per target and Triton."""
    for (target, triton), group in _by_run(outcomes):
        table = Table(title=f"{target}, Triton {triton}")
        for column in _COLUMNS:
            table.add_column(column, justify="right" if column in _NUMBERS else "left")
        for outcome in group:
            table.add_row(*_cells(outcome))
        yield table


def as_json(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """One entry per outcome."""
    return [
        {
            "target": outcome.target,
            "triton": outcome.triton,
            "kernel": outcome.launch.kernel,
            "shapes": outcome.launch.shapes,
            "compiled_in": outcome.launch.constants,
            "options": outcome.launch.options,
            "resources": asdict(outcome.resources) if outcome.resources else None,
            "error": outcome.error,
        }
        for outcome in outcomes
    ]


def _markdown(columns: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---:" if column in numbers else "---" for column in columns]
    lines = (f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))
    return "\n".join(lines)


def resource_table(outcomes: Iterable[Outcome]) -> str:
    """Every kernel of one target and one Triton, in Markdown."""
    return _markdown(_COLUMNS, _NUMBERS, map(_cells, outcomes))


def summary_table(outcomes: Iterable[Outcome]) -> str:
    """The most that any kernel takes, a line per target and Triton, in Markdown."""
    columns = (
        *("target", "Triton", "kernels", "registers"),
        *("spilled, bytes", "in loops", "shared, KiB", "of"),
    )
    rows = []
    for (target, triton), group in _by_run(outcomes):
        found = [outcome.resources for outcome in group if outcome.resources]
        rows.append(
            (
                *(target, triton, str(len(group))),
                *(
                    str(max(getattr(resources, name) for resources in found))
                    for name in ("registers", "spilled", "spills_in_loops")
                ),
                f"{max(resources.shared for resources in found) / 1024:.1f}",
                str(TARGETS[target].shared_limit // 1024),
            )
        )
    return _markdown(columns, columns[2:], rows)


def with_block(text: str, name: str, content: str) -> str:
    """A document with other content between its markers `<!-- name -->` and `<!-- /name -->`.

    Raises:
        MicroEditError: it has no such markers.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    block = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not block.search(text):
        raise MicroEditError(f"no {start} … {end} in the document")
    return block.sub(lambda _: f"{start}\n{content}\n{end}", text)
