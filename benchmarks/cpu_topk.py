"""Ways to choose the k largest latents on a CPU, exactly: which is the fastest?

    python benchmarks/cpu_topk.py --out cpu_topk.json

Rows are what an encoder hands on after its ReLU: "many" positive latents (about 30%), or "few",
fewer than k, the rest a mass of zeros. The ways take turns on the same rows. Each must first choose
what the reference chooses, ties and all; `torch.topk`, which promises nothing on ties, is there as
the floor. A ratio is the seconds of "sorting ties", which releases before this benchmark used, over
those of the way in the same turn: above 1 is faster.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from microedit_kernels.topk_encode import reference, topk_by_key
from microedit_kernels.topk_encode.cpu import GROUP, topk_by_group, topk_on_cpu
from microedit_vllm.artifact.atomic import write_atomically
from microedit_vllm.errors import MicroEditError

Choose = Callable[[Tensor, int], Tensor]
SHAPES = ((4_608, 64), (18_432, 64), (65_536, 400), (131_072, 192))
ROWS = (1, 8, 64, 256)
QUICK = ((2_056, 24),)
BASELINE, FLOOR = "sorting ties", "torch.topk"


def by_sorting_ties(rows: Tensor, k: int) -> Tensor:
    """`torch.topk`, rows with a tie across the k-th place sorted in full: [R, n] → [R, k]."""
    values, indices = rows.topk(k, dim=-1)
    ambiguous = (rows < values[:, -1:]).sum(-1) != rows.shape[-1] - k
    if bool(ambiguous.any()):
        order = rows[ambiguous].sort(dim=-1, descending=True, stable=True).indices
        indices[ambiguous] = order[:, :k]
    indices = indices.sort(dim=-1).values
    order = rows.gather(-1, indices).sort(dim=-1, descending=True, stable=True).indices
    return indices.gather(-1, order)


def by_threshold(rows: Tensor, k: int) -> Tensor:
    """What exceeds a lower bound of the k-th value: the k-th largest of n/32 maxima. No NaN."""
    n = rows.shape[-1]
    groups = n // GROUP
    # Latents that are `groups` apart: such maxima vectorise best.
    maxima = rows[:, : groups * GROUP].view(-1, GROUP, groups).amax(1)
    bounds = maxima.topk(min(k, groups), dim=-1, sorted=False).values.amin(-1)
    return _above(rows, bounds.numpy(), k)


def by_partition(rows: Tensor, k: int) -> Tensor:
    """What exceeds the k-th value, by NumPy's introselect. No NaN."""
    place = rows.shape[-1] - k
    return _above(rows, np.partition(rows.numpy(), place, axis=-1)[:, place], k)


def _above(rows: Tensor, bounds: np.ndarray, k: int) -> Tensor:
    chosen = np.empty((len(rows), k), dtype=np.int64)
    for place, (row, bound) in enumerate(zip(rows.numpy(), bounds, strict=True)):
        indices = np.flatnonzero(row > bound)
        if len(indices) < k:
            ties = np.flatnonzero(row == bound)[: k - len(indices)]
            indices = np.sort(np.concatenate([indices, ties]))
        chosen[place] = indices[np.argsort(-row[indices], kind="stable")[:k]]
    return torch.from_numpy(chosen)


WAYS: dict[str, Choose] = {
    BASELINE: by_sorting_ties,
    FLOOR: lambda rows, k: rows.topk(k, dim=-1).indices,
    "by key": topk_by_key,
    "by group": topk_by_group,
    "by threshold": by_threshold,
    "by partition": by_partition,
    "chosen": topk_on_cpu,
}


def make_rows(num_rows: int, n: int, k: int, positives: str, seed: int) -> Tensor:
    """Activations after a ReLU, [num_rows, n] fp32."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, n, generator=random)
    if positives == "many":
        return (rows - 0.5).relu_()
    kept = torch.rand(num_rows, n, generator=random) < k / (2 * n)
    return rows.abs_().mul_(kept)


def check(name: str, choose: Choose, rows: Tensor, k: int) -> None:
    """Refuse to time what does not choose as the reference does.

    Raises:
        MicroEditError: values differ, or indices where a way promises them.
    """
    top_acts, top_indices = reference.select_topk(rows, k)
    found = choose(rows, k)
    right = torch.equal(rows.gather(-1, found), top_acts)
    if name != FLOOR:
        right = right and torch.equal(found, top_indices)
    if not right:
        raise MicroEditError(f"{name} does not choose the {k} largest; no figures from such a run")


def measure(rows: Tensor, k: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds by way, and their ratios to the baseline turn by turn: median, least, largest."""
    names = list(WAYS)
    for name in names:
        check(name, WAYS[name], rows, k)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            WAYS[name](rows, k)
            seconds[name].append(time.perf_counter() - started)
    found = {}
    for name in names:
        ratios = [b / s for b, s in zip(seconds[BASELINE], seconds[name], strict=True)]
        found[name] = {
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "largest": max(ratios),
        }
    return found


def show(console: Console, cases: list[dict[str, Any]]) -> None:
    """Print one row per case: the baseline's time and what the others make of it."""
    others = [name for name in WAYS if name != BASELINE]
    table = Table(title=f"Seconds of {BASELINE} / seconds of …: above 1 is faster")
    for heading in ("rows", "n", "k", "positive", f"{BASELINE}, µs", *others):
        table.add_column(heading, justify="right")
    for case in cases:
        ways = case["ways"]
        table.add_row(
            *(str(case[name]) for name in ("rows", "n", "k", "positives")),
            f"{ways[BASELINE]['seconds'] * 1e6:,.0f}",
            *(f"{ways[name]['ratio']:.2f}" for name in others),
        )
    console.print(table)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each way and case.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One small shape, for a test.")] = False,
    out: Annotated[Path, typer.Option(help="JSON result.")] = Path(
        "benchmarks/results/cpu_topk.json"
    ),
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Measure exact Top-k selections on this machine's CPU."""
    torch.set_num_threads(threads)
    shapes, counts = (QUICK, (1, 64)) if quick else (SHAPES, ROWS)
    grid = [
        (num_rows, n, k, positives)
        for n, k in shapes
        for num_rows in counts
        for positives in ("many", "few")
    ]
    cases = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for num_rows, n, k, positives in progress.track(grid, description="measuring"):
            rows = make_rows(num_rows, n, k, positives, seed)
            case = {"rows": num_rows, "n": n, "k": k, "positives": positives}
            cases.append({**case, "ways": measure(rows, k, repeats)})
    report = {
        "baseline": BASELINE,
        "repeats": repeats,
        "threads": threads,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            "load": os.getloadavg()[0],
        },
        "cases": cases,
    }
    write_atomically(out, (json.dumps(report, indent=2) + "\n").encode())
    console = Console()
    show(console, cases)
    console.print(f"written to {out}", highlight=False)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MicroEditError as error:
        sys.exit(f"cpu_topk: {error}")
