"""What the kernels add to a decode step: alone, and inside the same CUDA graph as the step."""

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.kernel_bench.adapter import Activity, Adapter, Inputs, Wrong
from benchmarks.kernel_bench.decode_step import DecodeStep, Step
from benchmarks.kernel_bench.edit_change import EditChange
from benchmarks.kernel_bench.floors import Rates
from benchmarks.kernel_bench.row_plan import RowPlan
from benchmarks.kernel_bench.shapes import Case, Plan
from benchmarks.kernel_bench.sparse_decode import SparseDecode
from benchmarks.kernel_bench.timing import Timer
from benchmarks.kernel_bench.topk_encode import TopkEncode


@dataclass(frozen=True)
class Traffic:
    """Shares of the rows that are scored (encode, decode, ARD) and that are edited."""

    name: str
    scored: float
    edited: float


IDLE = Traffic("0% active", 0.0, 0.0)
EDITED = Traffic("100% edited", 0.0, 1.0)
TRAFFIC = (IDLE, Traffic("10% edited", 0.0, 0.1), EDITED, Traffic("100% encoded", 1.0, 0.0))


@dataclass(frozen=True)
class Overhead:
    """Of one traffic at one batch size.

    Attributes:
        step: seconds of the plain step.
        step_floor: of reading its weights and cached tokens once.
        alone: the kernels' seconds by themselves, over the step's.
        inside: seconds of the step with the kernels over those of the plain one, less 1; median of
            pairs.
        spread: half of the middle 50% of those pairs.
        noise: what `inside` is for a second graph of the plain step.
    """

    rows: int
    traffic: str
    operators: tuple[str, ...] = ()
    step: float | None = None
    step_floor: float | None = None
    alone: float | None = None
    inside: float | None = None
    spread: float | None = None
    noise: float | None = None
    error: str | None = None


class Pipeline:
    """The launches of a step, in order: scored rows' plan and operators, then edited rows'."""

    def __init__(self, plan: Plan, rows: int, operators: tuple[str, ...], inputs: Inputs) -> None:
        def case(operator: str) -> Case:
            return Case(operator, plan.saes[0], rows, plan.edits[0])

        self.scored, self.edited = (Activity(inputs, rows) for _ in range(2))
        self._parts: list[Adapter] = []
        for operator, make, activity in (
            ("row_plan", lambda c, i: RowPlan(c, i, self.scored), self.scored),
            ("topk_encode", TopkEncode, self.scored),
            ("sparse_decode", SparseDecode, self.scored),
            ("row_plan", lambda c, i: RowPlan(c, i, self.edited), self.edited),
            ("edit_change", EditChange, self.edited),
        ):
            if operator in operators:
                part = make(case(operator), inputs)
                part.activity = activity
                self._parts.append(part)
        self.variants = max(part.variants for part in self._parts)

    def check(self) -> None:
        """Raises `Wrong`."""
        for part in self._parts:
            part.check()

    def launch(self, variant: int) -> None:
        for part in self._parts:
            part.launch(variant % part.variants)

    def set(self, traffic: Traffic) -> None:
        self.scored.draw_keys(traffic.scored)
        self.edited.draw_keys(traffic.edited)


def overheads(
    plan: Plan,
    operators: tuple[str, ...],
    inputs: Inputs,
    timer: Timer,
    rates: Rates,
    progress: Callable[[str], None],
) -> Iterator[Overhead]:
    """Of every batch size and traffic; a batch size whose kernels fail their checks has none."""
    model = DecodeStep(plan.model, inputs)
    for rows in plan.step_rows:
        progress(f"step M = {rows}")
        try:
            pipeline = partial(Pipeline, plan, rows, operators, inputs)
            yield from _of(partial(model.at, rows), pipeline, rows, operators, timer, rates)
        # Of one batch size: the others' figures stand.
        except Exception as error:
            complaint = str(error) if isinstance(error, Wrong) else repr(error)
            yield Overhead(rows, "any", operators, error=complaint.split("\n")[0])
        # The caches of the next batch size need this one's memory.
        gc.collect()
        if inputs.device.type == "cuda":
            torch.cuda.empty_cache()


def _of(
    make_step: Callable[[], Step],
    make_pipeline: Callable[[], Pipeline],
    rows: int,
    operators: tuple[str, ...],
    timer: Timer,
    rates: Rates,
) -> Iterator[Overhead]:
    """Both are made here, so that their memory is free when this ends."""
    pipeline = make_pipeline()
    pipeline.check()
    step = make_step()
    plain, again = (timer.captured(step.launch) for _ in range(2))
    edited = timer.captured(lambda: step.launch(lambda: pipeline.launch(0)))
    noise = _ratio(timer.alternate(plain, again))[0]
    for traffic in TRAFFIC:
        pipeline.set(traffic)
        pairs = timer.alternate(plain, edited)
        seconds = statistics.median(first for first, _ in pairs)
        inside, spread = _ratio(pairs)
        launches = [partial(pipeline.launch, v) for v in range(pipeline.variants)]
        yield Overhead(
            rows,
            traffic.name,
            operators,
            step=seconds,
            step_floor=step.bytes() / rates.read,
            alone=timer(launches) / seconds,
            inside=inside,
            spread=spread,
            noise=noise,
        )


def _ratio(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Median of second over first, less 1, and half of the middle 50%."""
    ratios = [second / first - 1 for first, second in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, (high - low) / 2
