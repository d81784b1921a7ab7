"""Triton kernels against their floors on this card, plain torch, and a decode step of an 8B model.

    python benchmarks/kernels.py --device cuda --out results
    python benchmarks/kernels.py --device cpu     # Triton's interpreter, small sizes: no speed

Needs torch and triton alone; with matplotlib it draws a plot too. Every kernel is checked first,
with all, some and none of the rows active: one that fails its check gets no figure, and the exit
code is 1.

A figure is the time of one launch among many in a CUDA graph, median over replays. Launches take
turns at different inputs, so that the L2 cache holds none of what the next one reads; what a model
would have just written (z, the row plan) may stay in it. Columns:

floor      the larger of bytes / read bandwidth and flops / matmul rate, both measured on this card:
           a streaming read of 2 GiB, and a large bf16 `torch.matmul`
streamed   a kernel that only reads as many contiguous bytes, timed in the same way, with its launch
torch      the same result in plain torch, see `Adapter.baseline` of each operator
idle       the same launch with no active row
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("row_plan", "topk_encode", "sparse_decode", "edit_change", "step")
SHORT = {"encode": "topk_encode", "decode": "sparse_decode", "edit": "edit_change"}


def _parts(text: str) -> tuple[str, ...]:
    names = [SHORT.get(name, name) for name in text.split(",")]
    if unknown := sorted(set(names) - set(PARTS)):
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in names)


def _rows(text: str) -> tuple[int, ...]:
    try:
        rows = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from None
    if rows[0] < 1:
        raise argparse.ArgumentTypeError("rows start at 1")
    return rows


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="under 3 minutes: fewer shapes")
    parser.add_argument("--only", type=_parts, default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--rows", type=_rows, help="batch sizes M instead of the usual ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for kernels.json, kernels.md, kernels.png")
    parser.add_argument("--fail-on-bars", action="store_true", help="exit 3 where a bar is missed")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run it; the exit code."""
    options = parse(words)
    # Triton decides at each `@triton.jit` whether a function is interpreted: before every import.
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    # On a GPU machine with torch and triton alone, nothing of ours is installed.
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    from benchmarks.kernel_bench.session import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
