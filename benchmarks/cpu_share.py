"""How much of a decode step on vLLM's CPU engine goes to edits when every row is on.

    python benchmarks/cpu_share.py --model demo/model --edits demo/edits --out cpu_share.json

The requests are the set's own facts, and every one must be on; a run in which one is off gives no
figures. Measured are steps in which each request decodes one token. Two ways to compute the edit
take turns within each batch, step by step (A B, B A, …): "before", as this project first did (the
rows' k largest by sorting ties, the set's changes converted to fp32 in each step), and "after", as
the engine computes now. Both give the same bits.

By threshold an edit needs the encoder rows of the set alone. A set of which the change goes through
the Top-k needs the whole SAE in each step: where the given set is of the first kind, the same set
is measured in the second form too.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.functional import relu

from benchmarks.cpu_topk import by_sorting_ties
from benchmarks.offline_engine import answer
from benchmarks.serving import vllm_version
from microedit_kernels.topk_encode import pre_acts
from microedit_trainer.demo.server import ENVIRONMENT
from microedit_vllm.artifact import EditOperator, EditSet
from microedit_vllm.artifact.atomic import write_atomically
from microedit_vllm.engine.torch_edit import TorchEdit
from microedit_vllm.errors import MicroEditError

Side = Literal["before", "after"]
SIDES: tuple[Side, Side] = ("before", "after")
Activation = Literal["threshold", "topk"]
# Of a batch, before anything is measured.
WARM_UP_STEPS = 4


@dataclass(frozen=True)
class EarlierOperator(EditOperator):
    """The edit set's operator as it was: the same results, by the ways that were left."""

    @classmethod
    def of(cls, operator: EditOperator) -> "EarlierOperator":
        """The changes are those of the set, in the type that they are stored in."""
        stored = operator.edit_set
        return cls(**{**vars(operator), "scoring": stored.scoring, "edit": stored.edit})

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """See `EditOperator.encode`."""
        sae = self.sae
        acts = relu(pre_acts(z, sae.W_enc, sae.b_enc, sae.b_dec))
        indices = by_sorting_ties(acts.view(-1, sae.num_latents), sae.k)
        indices = indices.view(*acts.shape[:-1], sae.k)
        return acts.gather(-1, indices), indices


def operators(loaded: EditOperator) -> dict[Activation, dict[Side, EditOperator]]:
    """By activation, both ways to compute it."""
    manifest = loaded.edit_set.manifest
    found: dict[Activation, EditOperator] = {manifest.activation: loaded}
    if manifest.activation == "threshold":
        through = manifest.model_copy(update={"activation": "topk", "theta": None})
        found["topk"] = replace(loaded, edit_set=replace(loaded.edit_set, manifest=through))
    return {
        activation: {"before": EarlierOperator.of(operator), "after": operator}
        for activation, operator in found.items()
    }


@dataclass(frozen=True)
class Step:
    """One decode step in which all rows were on: seconds of it, and of these the edit's."""

    activation: Activation
    requests: int
    side: Side
    seconds: float
    edit_seconds: float


class StepClock:
    """Times an engine's steps, and the edit within; swaps the operator between steps.

    Args:
        llm: a `vllm.LLM` whose scheduler and worker live in this process.
    """

    def __init__(self, llm: Any) -> None:
        engine = llm.llm_engine
        self.state = engine.model_executor.driver_worker.worker._edit_state
        self._apply, self._step = self.state.apply, engine.step
        self._edit_seconds, self._rows = 0.0, 0
        self._choose: Callable[[int], tuple[Side, EditOperator]] | None = None
        self._found: list[tuple[Side, int, float, float]] = []
        self.state.apply, engine.step = self._timed_apply, self._timed_step

    def record(
        self, sides: dict[Side, EditOperator], batch: Callable[[], object]
    ) -> list[tuple[Side, int, float, float]]:
        """Run `batch` with the sides in turn.

        Returns:
            Side, rows, seconds and edit seconds of each step that only decoded.
        """
        order = (*SIDES, *reversed(SIDES))

        def choose(index: int) -> tuple[Side, EditOperator]:
            side = order[index % len(order)]
            return side, sides[side]

        usual, self._found, self._choose = self.state.edit, [], choose
        try:
            batch()
        finally:
            self.state.edit, self._choose = usual, None
        return self._found

    def _timed_apply(self, hidden_states: Tensor, z: Tensor | None) -> None:
        plan, started = self.state.plan, time.perf_counter()
        self._apply(hidden_states, z)
        self._edit_seconds += time.perf_counter() - started
        decodes = not len(plan.scored_rows) and not plan.deciding
        self._rows = len(plan.edited_rows) if decodes else 0

    def _timed_step(self) -> Any:
        if self._choose is None:
            return self._step()
        side, operator = self._choose(len(self._found))
        self.state.edit = TorchEdit(operator, self.state.slots)
        self._edit_seconds, self._rows = 0.0, 0
        started = time.perf_counter()
        outputs = self._step()
        seconds = time.perf_counter() - started
        if self._rows:
            self._found.append((side, self._rows, seconds, self._edit_seconds))
        return outputs


def on_prompts(llm: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Those of the prompts that turn the switch on.

    Raises:
        MicroEditError: none does.
    """
    outputs = answer(llm, prompts, edited=True, max_tokens=1).outputs
    on = [p for p, o in zip(prompts, outputs, strict=True) if (o.decision or {}).get("on")]
    if not on:
        raise MicroEditError(f"none of the set's {len(prompts)} facts turns the switch on")
    return on


def measure(
    llm: Any,
    prompts: Sequence[list[int]],
    requests: Sequence[int],
    tokens: int,
    repeats: int,
    done: Callable[[], object] = lambda: None,
) -> list[Step]:
    """Batches of each activation and number of requests in turn, `repeats` times.

    Raises:
        MicroEditError: a request was off.
    """
    clock = StepClock(llm)
    sides = operators(clock.state.edit.operator)
    steps = []
    for _ in range(repeats):
        for activation in sides:
            for count in requests:
                asked = [prompts[i % len(prompts)] for i in range(count)]

                def batch(asked: list[list[int]] = asked) -> None:
                    found = answer(llm, asked, edited=True, max_tokens=tokens, ignore_eos=True)
                    if not all((output.decision or {}).get("on") for output in found.outputs):
                        raise MicroEditError("a request was off; no figures from such a run")

                # Requests that joined in different steps leave steps in which not all decode.
                whole = [s for s in clock.record(sides[activation], batch) if s[1] == count]
                steps += [
                    Step(activation, count, side, seconds, edit)
                    for side, _, seconds, edit in whole[WARM_UP_STEPS:]
                ]
                done()
    return steps


def shares(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """By activation and number of requests: each side's medians, and the edit's before / after.

    The share of a side is the median over its steps, with the first and ninth decile.
    """
    rows = []
    for activation, requests in dict.fromkeys((s.activation, s.requests) for s in steps):
        row: dict[str, Any] = {"activation": activation, "requests": requests}
        for side in SIDES:
            own = [
                s
                for s in steps
                if (s.activation, s.requests, s.side) == (activation, requests, side)
            ]
            found = sorted(s.edit_seconds / s.seconds for s in own)
            row[side] = {
                "steps": len(own),
                "step_seconds": statistics.median(s.seconds for s in own),
                "edit_seconds": statistics.median(s.edit_seconds for s in own),
                "share": statistics.median(found),
                "low": found[len(found) // 10],
                "high": found[-1 - len(found) // 10],
            }
        row["faster"] = row["before"]["edit_seconds"] / row["after"]["edit_seconds"]
        rows.append(row)
    return rows


def show(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print one row per activation, number of requests and side."""
    table = Table(title="The edit's share of a decode step, every row on")
    for heading in ("activation", "requests", "", "step, ms", "edit, ms", "share", "10% to 90%"):
        table.add_column(heading, justify="right")
    for row in rows:
        for side in SIDES:
            cells = row[side]
            table.add_row(
                row["activation"],
                str(row["requests"]),
                side,
                f"{cells['step_seconds'] * 1e3:.2f}",
                f"{cells['edit_seconds'] * 1e3:.3f}",
                f"{cells['share']:.2%}",
                f"{cells['low']:.2%} to {cells['high']:.2%}",
            )
    console.print(table)


def fact_prompts(model: str, edits: Path) -> list[list[int]]:
    """The set's own facts as token ids.

    Raises:
        MicroEditError: see `EditSet.load`; or the set does not tell its facts.
    """
    from transformers import AutoTokenizer

    texts = [fact["prompt"] for fact in EditSet.load(edits).facts if "prompt" in fact]
    if not texts:
        raise MicroEditError(f"{edits} names no facts to ask for")
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(text).input_ids for text in texts]


def start(model: str, setting: dict[str, Any], **arguments: Any) -> Any:
    """A `vllm.LLM` in this process."""
    for name, value in {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    return LLM(model, additional_config={"microedit": setting}, **arguments)


def main(
    model: Annotated[str, typer.Option(help="What to serve: a folder or a hub id.")],
    edits: Annotated[Path, typer.Option(help="Folder of the edit set.")],
    sae: Annotated[Path | None, typer.Option(help="Folder of its SAE, if it has moved.")] = None,
    requests: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests at once; may be repeated. [1, 8]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Of each answer.")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Batches of each kind.")] = 3,
    out: Annotated[Path, typer.Option(help="JSON result.")] = Path(
        "benchmarks/results/cpu_share.json"
    ),
) -> None:
    """Measure the edit's share of a decode step on the CPU engine, before and after."""
    counts = requests or [1, 8]
    prompts = fact_prompts(model, edits)
    arguments: dict[str, Any] = {
        "enforce_eager": True,
        "max_model_len": max(map(len, prompts)) + tokens,
        "max_num_seqs": max(counts),
        "async_scheduling": False,
    }
    setting = {"edit_set": str(edits), **({"sae": str(sae)} if sae else {})}
    llm = start(model, setting, **arguments)
    load = os.getloadavg()[0]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        on = on_prompts(llm, prompts)
        forms = 2 if EditSet.load(edits).manifest.activation == "threshold" else 1
        task = progress.add_task("measuring", total=forms * len(counts) * repeats)
        steps = measure(llm, on, counts, tokens, repeats, lambda: progress.advance(task))
    rows = shares(steps)
    report = {
        "model": model,
        "edits": str(edits),
        "facts": len(prompts),
        "facts_on": len(on),
        "tokens": tokens,
        "repeats": repeats,
        "engine": arguments,
        "vllm": vllm_version(),
        "machine": {
            "cpus": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "platform": platform.platform(),
            "load": [load, os.getloadavg()[0]],
        },
        "shares": rows,
        "steps": [vars(step) for step in steps],
    }
    write_atomically(out, (json.dumps(report, indent=2) + "\n").encode())
    console = Console()
    show(console, rows)
    console.print(f"written to {out}", highlight=False)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    try:
        typer.run(main)
    except MicroEditError as error:
        sys.exit(f"cpu_share: {error}")
