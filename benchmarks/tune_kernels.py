"""Choose the kernels' launch configurations by measuring them, and write the table that ships.

    python benchmarks/tune_kernels.py --out kernels/microedit_kernels/launch_table.json
    python benchmarks/tune_kernels.py --device cpu --out table.json   # interpreted: no figure

Needs torch and triton alone. Each candidate takes the place of the table's line, so that the
shipped launch is what is checked and timed; one that fails its check, or does not fit the card, is
left out. Run `make kernels-aot` on the new table.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Settings = dict[str, Any]
Line = tuple[int, Settings]


def _named(names: str, *values: tuple[int, ...]) -> list[Settings]:
    return [dict(zip(names.split(), line, strict=False)) for line in values]


_TILE = "rows latents depth warps stages"
_GATHER = "columns latents warps stages"
_EDIT = (
    "rows acts_d acts_splits acts_warps acts_stages delta_d delta_latents delta_warps delta_stages "
    "even ahead"
)
# Per operator: (most, batch to time, candidates). The first of each is what a line falls back to.
CANDIDATES: dict[str, list[tuple[int, int, list[Settings]]]] = {
    "topk_encode": [
        (16, 8, _named(_TILE, (16, 64, 256, 4, 3), (16, 128, 256, 4, 3), (16, 128, 128, 4, 4))),
        (32, 32, _named(_TILE, (32, 64, 256, 4, 3), (32, 128, 128, 4, 4))),
        (
            64,
            64,
            _named(_TILE, (64, 64, 128, 4, 3), (64, 128, 128, 4, 3), (64, 128, 64, 4, 5)),
        ),
        (
            128,
            128,
            _named(_TILE, (128, 128, 128, 8, 3), (128, 128, 64, 8, 6), (128, 256, 64, 8, 4)),
        ),
        (
            16384,
            512,
            _named(_TILE, (128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 4)),
        ),
    ],
    "sparse_decode": [
        (64, 64, _named(_GATHER, (256, 32, 1, 3), (512, 16, 2, 3), (1024, 16, 4, 3))),
        (16384, 512, _named(_GATHER, (512, 16, 2, 3), (256, 16, 1, 3), (1024, 8, 4, 3))),
    ],
    "edit_change": [
        (
            16,
            8,
            _named(
                _EDIT,
                (16, 128, 1, 4, 6, 32, 128, 4, 6, True, 1024),
                (16, 128, 1, 4, 6, 32, 128, 4, 8, True, 1024),
                (16, 128, 2, 4, 4, 64, 64, 4, 4, False, 0),
            ),
        ),
        (
            32,
            32,
            _named(
                _EDIT,
                (32, 128, 1, 4, 6, 32, 128, 4, 6, True, 1024),
                (32, 64, 4, 4, 4, 128, 64, 4, 4, False, 0),
            ),
        ),
        (
            64,
            64,
            _named(
                _EDIT,
                (64, 128, 1, 4, 6, 32, 128, 4, 6, True, 640),
                (64, 64, 1, 4, 12, 32, 64, 4, 10, True, 640),
                (64, 64, 2, 8, 6, 64, 64, 4, 6, False, 0),
            ),
        ),
        (
            16384,
            256,
            _named(
                _EDIT,
                (128, 64, 1, 8, 4, 128, 64, 8, 4, False, 0),
                (128, 64, 2, 8, 4, 128, 64, 8, 3, False, 0),
                (128, 64, 1, 8, 4, 64, 64, 8, 4, False, 0),
            ),
        ),
    ],
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--only", choices=tuple(CANDIDATES), help="one operator; others as they are"
    )
    parser.add_argument("--out", type=Path, required=True, help="the table")
    return parser.parse_args(words)


class Tuner:
    """Times candidates at the size of LLaMA-3-8B, or at a small one in the interpreter."""

    def __init__(self, device: str) -> None:
        import torch

        from benchmarks.kernel_bench import session, shapes
        from benchmarks.kernel_bench.adapter import Inputs
        from benchmarks.kernel_bench.timing import GraphTimer, HostTimer

        self._on_gpu = device == "cuda"
        self._plan = shapes.FULL if self._on_gpu else shapes.SMALL
        self._case, self._adapters = shapes.Case, session.ADAPTERS
        self._timer = GraphTimer(0.1) if self._on_gpu else HostTimer()
        where = torch.device(device)
        cache = torch.cuda.get_device_properties(where).L2_cache_size if self._on_gpu else 1024
        self._inputs = Inputs(where, cache, seed=0)

    def seconds(self, operator: str, settings: Settings, batch: int) -> float | None:
        """Of one launch; None where the candidate is wrong or does not fit."""
        from benchmarks.kernel_bench.adapter import Wrong
        from microedit_kernels import launch_table

        table = {**launch_table.table(), operator: [(batch, settings)]}
        launch_table.replace_table(table)
        edit = self._plan.edits[0] if operator == "edit_change" else None
        case = self._case(operator, self._plan.saes[0], batch, edit)
        try:
            adapter = self._adapters[operator](case, self._inputs)
            adapter.check()
            return self._timer([lambda v=v: adapter.launch(v) for v in range(adapter.variants)])
        except Wrong as wrong:
            print(f"  wrong: {wrong}", file=sys.stderr)
        # Out of shared memory, or no such instruction on this card.
        except Exception as error:
            print(f"  {type(error).__name__}: {error}".split("\n")[0], file=sys.stderr)
        return None

    def lines(self, operator: str) -> Iterator[Line]:
        """The table's lines of an operator, each the fastest of its candidates."""
        for most, batch, candidates in CANDIDATES[operator]:
            batch = batch if self._on_gpu else 3
            print(f"{operator}, up to {most} rows, timed at {batch}", file=sys.stderr, flush=True)
            found = []
            for settings in candidates:
                seconds = self.seconds(operator, settings, batch)
                if seconds is not None:
                    found.append((seconds, settings))
                    print(f"{seconds * 1e6:10.1f} µs  {settings}", file=sys.stderr, flush=True)
            if not found:
                raise RuntimeError(f"no candidate of {operator} runs at {batch} rows")
            yield most, min(found, key=lambda pair: pair[0])[1]


def tune(device: str, only: str | None) -> dict[str, Any]:
    """The new table."""
    import torch
    import triton

    from microedit_kernels import launch_table

    shipped = launch_table.table()
    tuner = Tuner(device)
    name = torch.cuda.get_device_name() if device == "cuda" else "the interpreter"
    table: dict[str, Any] = {
        **shipped,
        "measured_on": f"{name}, Triton {triton.__version__}, torch {torch.__version__}",
    }
    try:
        for operator in [only] if only else CANDIDATES:
            table[operator] = list(tuner.lines(operator))
    finally:
        launch_table.replace_table(shipped)
    return table


def main(words: list[str] | None = None) -> int:
    """Run it; the exit code."""
    options = parse(words)
    # Triton decides at each `@triton.jit` whether a function is interpreted: before every import.
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    import torch

    from benchmarks.kernel_bench.session import write_file

    if options.device == "cuda" and not torch.cuda.is_available():
        print("tune_kernels.py: no CUDA device here; --device cpu interprets", file=sys.stderr)
        return 2
    try:
        table = tune(options.device, options.only)
        write_file(options.out, text(table).encode())
    except (OSError, RuntimeError) as error:
        print(f"tune_kernels.py: {error}", file=sys.stderr)
        return 1
    return 0


def text(table: dict[str, Any]) -> str:
    """JSON, one line of the table a line."""
    parts = []
    for key, value in table.items():
        if isinstance(value, str):
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
        else:
            lines = ",\n".join(f"    {json.dumps(line)}" for line in value)
            parts.append(f"  {json.dumps(key)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
