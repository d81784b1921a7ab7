"""One run: checks, measurements, report."""

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.kernel_bench.adapter import Adapter, Inputs, Wrong
from benchmarks.kernel_bench.edit_change import EditChange
from benchmarks.kernel_bench.floors import Floors
from benchmarks.kernel_bench.overhead import Overhead, overheads
from benchmarks.kernel_bench.plot import plot
from benchmarks.kernel_bench.report import Figure, as_json, bars, failures, text
from benchmarks.kernel_bench.row_plan import RowPlan
from benchmarks.kernel_bench.shapes import FULL, OPERATORS, QUICK, SMALL, Case, Plan
from benchmarks.kernel_bench.sparse_decode import SparseDecode
from benchmarks.kernel_bench.timing import GraphTimer, HostTimer, Timer
from benchmarks.kernel_bench.topk_encode import TopkEncode

ADAPTERS: dict[str, type[Adapter]] = dict(
    zip(OPERATORS, (RowPlan, TopkEncode, SparseDecode, EditChange), strict=True)
)


class Session:
    """Measures on one device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._start = time.perf_counter()
        self.device = torch.device(options.device)
        self.on_gpu = self.device.type == "cuda"
        self.plan = self._plan(options)
        # A step of all operators, unless some were chosen.
        self.operators = tuple(name for name in options.only if name in OPERATORS)
        self.step = "step" in options.only
        self.timer: Timer = (
            GraphTimer(0.05 if options.quick else 0.15) if self.on_gpu else HostTimer()
        )
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.on_gpu else 1024
        self.inputs = Inputs(self.device, cache, options.seed)
        pool, matmul = (1 << 31, 8192) if self.on_gpu else (1 << 18, 64)
        self.progress("floors")
        self.floors = Floors(self.timer, self.device, cache, pool, matmul)

    @staticmethod
    def _plan(options: argparse.Namespace) -> Plan:
        plan = SMALL if options.device == "cpu" else QUICK if options.quick else FULL
        if options.rows:
            # More cached tokens than the step's usual ones might not fit.
            most = max(plan.step_rows)
            fit = tuple(M for M in options.rows if most >= M)
            plan = replace(plan, rows=options.rows, step_rows=fit)
        return plan

    def progress(self, what: str) -> None:
        print(f"{time.perf_counter() - self._start:5.0f} s  {what}", file=sys.stderr, flush=True)

    def run(self, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Measure everything; `keep` gets what there is after each figure."""
        figures: list[Figure] = []
        for case in self.plan.cases(self.operators):
            figures.append(self._figure(case))
            keep(self._found(figures, []))
        steps = self._steps() if self.step else []
        return self._found(figures, steps)

    def _found(self, figures: list[Figure], steps: list[Overhead]) -> dict[str, Any]:
        return {
            "environment": self._environment(),
            "rates": self.floors.described(),
            "figures": figures,
            "steps": steps,
            "bars": bars(figures, steps) if self.on_gpu else [],
            "seconds": time.perf_counter() - self._start,
        }

    def _figure(self, case: Case) -> Figure:
        """Checked, then measured; without a figure where the check fails."""
        self.progress(f"{case.operator}, {case.label}, M = {case.rows}")
        try:
            adapter = ADAPTERS[case.operator](case, self.inputs)
            adapter.check()
            return self._measured(case, adapter)
        except Wrong as wrong:
            return Figure(case, error=str(wrong))
        # One kernel that does not compile must not take the other figures with it.
        except Exception as error:
            return Figure(case, error=f"{type(error).__name__}: {error}".split("\n")[0])

    def _measured(self, case: Case, adapter: Adapter) -> Figure:
        work = adapter.work()
        floor, bound = self.floors.rates.floor(work)
        turns = range(adapter.variants)
        seconds = self.timer([partial(adapter.launch, v) for v in turns])
        rival = self._rival(adapter)
        adapter.activity.draw_keys(0.0)
        return Figure(
            case,
            seconds=seconds,
            floor=floor,
            bound=bound,
            streamed=self.floors.streamed(work.bytes),
            torch=rival,
            idle=self.timer([partial(adapter.launch, 0)]),
            bytes=work.bytes,
            distinct_bytes=work.distinct_bytes,
            flops=work.flops,
        )

    def _rival(self, adapter: Adapter) -> float | None:
        rivals = [r for v in range(adapter.variants) if (r := adapter.baseline(v)) is not None]
        try:
            return self.timer(rivals) if rivals else None
        # Its pre-activations may not fit, or torch may not capture it: the kernel's figure stands.
        except RuntimeError as error:
            self.progress(f"no figure of torch: {error}".split("\n")[0])
            return None

    def _steps(self) -> list[Overhead]:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        operators = self.operators or OPERATORS
        rates = self.floors.rates
        return list(overheads(self.plan, operators, self.inputs, self.timer, rates, self.progress))

    def _environment(self) -> dict[str, str]:
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else "CPU"
        return {
            "device": name,
            "torch": f"torch {torch.__version__}",
            "triton": f"triton {triton.__version__}",
            "timing": self.timer.name,
        }


def write_file(target: Path, data: bytes) -> None:
    """Atomically."""
    # `artifact.atomic` does it too, but needs more than torch and triton.
    handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(name, target)


def _keep(folder: Path | None, found: dict[str, Any]) -> None:
    """What was measured so far: a run that is stopped leaves its figures."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "kernels.json", as_json(found).encode())


def _save(folder: Path, found: dict[str, Any]) -> None:
    _keep(folder, found)
    write_file(folder / "kernels.md", text(found, markdown=True).encode())
    try:
        image = plot(found["figures"], found["steps"], found["environment"]["device"])
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    else:
        write_file(folder / "kernels.png", image)


def run(options: argparse.Namespace) -> int:
    """Measure, write, print the tables last; the exit code."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("kernels.py: no CUDA device here; --device cpu interprets", file=sys.stderr)
        return 2
    try:
        found = Session(options).run(partial(_keep, options.out))
        if options.out is not None:
            _save(options.out, found)
    except OSError as error:
        print(f"kernels.py: cannot write {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    print(text(found), end="", flush=True)
    if failures(found["figures"], found["steps"]):
        return 1
    missed = any(bar.verdict == "MISSED" for bar in found["bars"])
    return 3 if missed and options.fail_on_bars else 0
