"""What a loaded edit set costs requests that no edit is about: a plain engine against ours.

    python benchmarks/idle_cost.py --model demo/model --edits demo/edits --out idle_cost.json

Both engines are alive and take turns, A B, B A, A B, …, on the same prompts of random tokens, new
ones for every turn, so that the prefix cache has nothing to find. Every request asks for edits, as
by default: the switch scores it, and must leave it off. A run in which it does not, or in which an
answer falls short, gives no figures.

The ratio of a turn is plain seconds over MicroEdit seconds: 1 where edits cost nothing. On a
machine that others use, more repeats help; the CPU seconds of the engines' own processes are given
beside it.
"""

import json
import os
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoConfig

from benchmarks.offline_engine import KINDS, Batch, Kind, OfflineEngine
from benchmarks.serving import vllm_version
from microedit_vllm.artifact.atomic import write_atomically
from microedit_vllm.errors import MicroEditError

# Ids below are often special tokens, which could mark a turn.
FIRST_TOKEN = 100


@dataclass(frozen=True)
class Traffic:
    """Requests of one shape, and the least throughput that edits may leave of the plain one's."""

    name: str
    prompt_tokens: int
    output_tokens: int
    bar: float

    @property
    def tokens(self) -> int:
        """Of one request."""
        return self.prompt_tokens + self.output_tokens

    def prompts(self, requests: int, vocabulary: int, draw: random.Random) -> list[list[int]]:
        """Random tokens: no two requests share a beginning."""
        first = min(FIRST_TOKEN, vocabulary // 2)
        return [
            [draw.randrange(first, vocabulary) for _ in range(self.prompt_tokens)]
            for _ in range(requests)
        ]


TRAFFIC = (Traffic("decode-heavy", 64, 256, 0.98), Traffic("prefill-heavy", 1024, 16, 0.95))
QUICK = (Traffic("decode-heavy", 16, 24, 0.98), Traffic("prefill-heavy", 96, 4, 0.95))


@dataclass(frozen=True)
class Run:
    """One turn of one engine.

    Attributes:
        seconds: from the first request's arrival to the last answer.
        cpu_seconds: CPU time that this engine's processes used in it.
        idle_cpu_seconds: CPU time that the other engine's used meanwhile.
        load: the machine's load average over one minute, before the turn.
    """

    traffic: str
    engine: Kind
    seconds: float
    cpu_seconds: float
    idle_cpu_seconds: float
    load: float


def turns(repeats: int) -> list[tuple[Kind, Kind]]:
    """Who goes first and who second, in turn."""
    return [KINDS if i % 2 == 0 else (KINDS[1], KINDS[0]) for i in range(repeats)]


def check(batch: Batch, traffic: Traffic, kind: Kind) -> None:
    """Refuse a run that measured something else.

    Raises:
        MicroEditError: an answer is too short, tokens came from the prefix cache, or on the
            engine with edits the switch was on or scored nothing.
    """
    for output in batch.outputs:
        if len(output.tokens) != traffic.output_tokens or output.cached:
            raise MicroEditError(
                f"{kind}, {traffic.name}: {len(output.tokens)} of {traffic.output_tokens} tokens, "
                f"{output.cached} of the prompt from the cache; no figures from such a run"
            )
        decision = output.decision or {}
        if kind == "microedit" and (decision.get("on", True) or decision["ard"] is None):
            raise MicroEditError(
                f"{traffic.name}: a request of random tokens was to be scored and left off, but "
                f"its decision was {output.decision}; no figures from such a run"
            )


def measure(
    engines: dict[Kind, OfflineEngine],
    traffic: Traffic,
    prompts: Callable[[], list[list[int]]],
    repeats: int,
    done: Callable[[], object],
) -> list[Run]:
    """A warm-up turn that is not counted, then `repeats` turns of each engine."""

    def turn(kind: Kind, asked: list[list[int]]) -> Run:
        load = os.getloadavg()[0]
        before = {k: engine.cpu_seconds() for k, engine in engines.items()}
        batch = engines[kind].generate(asked, max_tokens=traffic.output_tokens, ignore_eos=True)
        used = {k: engine.cpu_seconds() - before[k] for k, engine in engines.items()}
        check(batch, traffic, kind)
        done()
        idle = sum(used.values()) - used[kind]
        return Run(traffic.name, kind, batch.seconds, used[kind], idle, load)

    runs = []
    for index, order in enumerate(turns(repeats + 1)):
        asked = prompts()
        pair = [turn(kind, asked) for kind in order]
        runs += pair if index else []
    return runs


def ratios(runs: Sequence[Run], traffic: Traffic) -> dict[str, Any]:
    """Plain over MicroEdit by turn, in wall-clock and CPU seconds: median, least, largest."""
    plain, edited = (
        [run for run in runs if run.traffic == traffic.name and run.engine == kind]
        for kind in KINDS
    )
    found: dict[str, Any] = {"bar": traffic.bar}
    for name in ("seconds", "cpu_seconds"):
        paired = [getattr(a, name) / getattr(b, name) for a, b in zip(plain, edited, strict=True)]
        found[name] = {
            "plain": statistics.median(getattr(run, name) for run in plain),
            "microedit": statistics.median(getattr(run, name) for run in edited),
            "ratio": statistics.median(paired),
            "least": min(paired),
            "largest": max(paired),
        }
    both = plain + edited
    found["idle_share"] = sum(r.idle_cpu_seconds for r in both) / sum(r.seconds for r in both)
    found["load"] = [min(r.load for r in both), max(r.load for r in both)]
    found["met"] = found["seconds"]["ratio"] >= traffic.bar
    return found


def show(console: Console, found: dict[str, dict[str, Any]], tokens: dict[str, int]) -> None:
    """Print one row per traffic and clock; `tokens` of one turn, prompts included."""
    table = Table(title="Plain / MicroEdit, paired turns: 1 where edits cost nothing")
    for heading in ("traffic", "clock", *KINDS, "ratio", "least", "largest", "bar"):
        table.add_column(heading, justify="left" if heading in ("traffic", "clock") else "right")
    for name, row in found.items():
        for clock, key in (("wall", "seconds"), ("CPU", "cpu_seconds")):
            cells = row[key]
            table.add_row(
                name,
                clock,
                *(f"{cells[kind]:.2f} s" for kind in KINDS),
                *(f"{cells[part]:.3f}" for part in ("ratio", "least", "largest")),
                f"{row['bar']:.2f}" if clock == "wall" else "",
            )
    console.print(table)
    for name, row in found.items():
        low, high = row["load"]
        speed = tokens[name] / row["seconds"]["plain"]
        console.print(
            f"{name}: bar {'met' if row['met'] else 'MISSED'}; plain {speed:.0f} tokens/s, prompts "
            f"included; the waiting engine used {row['idle_share']:.1%} of a core; load average "
            f"{low:.1f} to {high:.1f}",
            highlight=False,
        )


def main(
    model: Annotated[str, typer.Option(help="What to serve: a folder or a hub id.")],
    edits: Annotated[Path, typer.Option(help="Folder of the edit set.")],
    sae: Annotated[Path | None, typer.Option(help="Folder of its SAE, if it has moved.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each engine and traffic.")] = 5,
    compiled: Annotated[bool, typer.Option("--compiled", help="Not eager: minutes more.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Short requests, for a test.")] = False,
    out: Annotated[Path, typer.Option(help="JSON result.")] = Path(
        "benchmarks/results/idle_cost.json"
    ),
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Measure the throughput that a loaded edit set leaves to requests it does not concern."""
    traffics = QUICK if quick else TRAFFIC
    arguments: dict[str, Any] = {
        "max_model_len": max(t.tokens for t in traffics),
        "max_num_seqs": requests,
        "enforce_eager": not compiled,
        "seed": seed,
    }
    setting = {"edit_set": str(edits), **({"sae": str(sae)} if sae else {})}
    vocabulary, draw = AutoConfig.from_pretrained(model).vocab_size, random.Random(seed)
    runs: list[Run] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        task = progress.add_task("starting", total=len(traffics) * 2 * (repeats + 1))
        engines: dict[Kind, OfflineEngine] = {}
        for kind in KINDS:
            engine_edits = setting if kind == "microedit" else None
            engine = OfflineEngine(model, engine_edits, folder / f"{kind}.log", **arguments)
            engines[kind] = stack.enter_context(engine)
        for traffic in traffics:
            progress.update(task, description=traffic.name)

            def prompts(traffic: Traffic = traffic) -> list[list[int]]:
                return traffic.prompts(requests, vocabulary, draw)

            runs += measure(engines, traffic, prompts, repeats, lambda: progress.advance(task))
    found = {traffic.name: ratios(runs, traffic) for traffic in traffics}
    report = {
        "model": model,
        "edits": str(edits),
        "requests": requests,
        "repeats": repeats,
        "traffic": [vars(traffic) for traffic in traffics],
        "engine": arguments,
        "vllm": vllm_version(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
        "ratios": found,
        "runs": [vars(run) for run in runs],
    }
    write_atomically(out, (json.dumps(report, indent=2) + "\n").encode())
    console = Console()
    show(console, found, {t.name: requests * t.tokens for t in traffics})
    console.print(f"written to {out}", highlight=False)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MicroEditError as error:
        sys.exit(f"idle_cost: {error}")
