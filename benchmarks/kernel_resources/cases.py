"""Every shipped kernel at real shapes: the paper's two SAEs, and one that is a multiple of nothing.

The functions themselves choose the launch configurations, so a change in a `launch.py` is checked
as it is. Tensors have no memory (torch's `meta` device), batches go through the powers of two, and
so through every row of those tables. A new kernel needs a function here: `recording.py` fails
without. Imports Triton: in a process of its own, made by `pool.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from microedit_kernels.edit_change.grouped_sets import EditRows, GroupedSets
from microedit_kernels.edit_change.kernel import add_edit_change
from microedit_kernels.edit_change.launch_config import launch_config
from microedit_kernels.edit_change.scratch import EditChangeScratch
from microedit_kernels.row_plan.kernel import group_rows
from microedit_kernels.sparse_decode.kernel import (
    Decoder,
    DecodeScratch,
    decode_parts,
    score,
    substitute,
)
from microedit_kernels.switch.kernel import decide
from microedit_kernels.topk_encode.fp8_filter import Fp8Encoder, Fp8Scratch, fp8_topk_encode
from microedit_kernels.topk_encode.kernel import (
    EncodeScratch,
    InputNorm,
    merge_candidates,
    topk_encode,
)
from microedit_kernels.topk_encode.launch import encode_config

_META = torch.device("meta")
BATCHES = tuple(2**i for i in range(14))


@dataclass(frozen=True)
class Shape:
    """An SAE: width of the residual stream, latents, active ones; type of its weights."""

    name: str
    d: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16


LLAMA = Shape("LLaMA-3-8B", d=4096, n=131_072, k=192)
MISTRAL = Shape("Mistral-7B", d=4096, n=65_536, k=400)
ODD = Shape("odd", d=4112, n=40_961, k=37)
FP32 = replace(LLAMA, name="LLaMA-3-8B fp32", dtype=torch.float32)


def _floats(*size: int) -> Tensor:
    return torch.empty(*size, device=_META)


def _halves(*size: int) -> Tensor:
    return _floats(*size).bfloat16()


def _ints(*size: int) -> Tensor:
    return _floats(*size).int()


def _row_plan(rows: int) -> None:
    group_rows(_ints(rows), _ints(rows), _ints(2))


def _encode(shape: Shape, rows: int, hopper: bool, norm: bool = False) -> None:
    d, n, k = shape.d, shape.n, shape.k
    scratch = EncodeScratch.allocate(rows, n, k, _META)
    topk_encode(
        *(_halves(rows, d), _ints(rows), _ints(1), _floats(n, d).to(shape.dtype), _floats(n), k),
        *(_floats(rows, k), _ints(rows, k), scratch),
        norm=InputNorm(_floats(rows), _floats(rows), _floats(n)) if norm else None,
        config=encode_config(len(scratch.pre), shape.dtype == torch.float32, hopper),
    )


def _merge(shape: Shape, rows: int, ranks: int) -> None:
    offers = shape.k * ranks
    merge_candidates(
        *(_floats(rows, offers), _ints(rows, offers), _ints(1), shape.k),
        *(_floats(rows, shape.k), _ints(rows, shape.k)),
    )


def _decode(shape: Shape, rows: int) -> None:
    d, n, k = shape.d, shape.n, shape.k
    # Two places in one storage: without memory, storages cannot be told apart.
    z, hidden_states = _halves(2, rows, d)
    changed = 4096
    decoder = Decoder(_halves(n, d), _halves(d), _ints(n), _halves(changed, d))
    plan = (_ints(rows), _ints(1), _floats(rows, k), _ints(rows, k), decoder)
    slots = 2**20
    state = (_ints(rows).long(), _floats(slots), _floats(slots), _floats(slots).bool())
    scratch = DecodeScratch.allocate(rows, d, k, _META)
    score(z, *plan, *state, 100.0, scratch)
    for placement in ("replace", "delta"):
        substitute(hidden_states, z, *plan, placement, scratch)
    substitute(z, z, *plan, "replace", scratch)
    decode_parts(z, *plan, _floats(2, rows, d), scratch)


def _eight_bits(shape: Shape, rows: int, codes: torch.dtype) -> None:
    d, n, k = shape.d, shape.n, shape.k
    eight = _floats(n, d).to(codes)
    encoder = Fp8Encoder(
        _halves(n, d), _floats(n), eight, *(_floats(n) for _ in "1234"), _floats(d)
    )
    fp8_topk_encode(
        *(_halves(rows, d), _ints(rows), _ints(1), encoder, k, _floats(rows, k), _ints(rows, k)),
        Fp8Scratch.allocate(rows, n, k, _META),
    )


def _edit_change(
    latents: int, rows: int, hopper: bool, dtype: torch.dtype = torch.bfloat16
) -> None:
    d = LLAMA.d
    rows_of_set = _halves(2, latents, d).to(dtype)
    sets = GroupedSets.join([EditRows(rows_of_set[0], _floats(latents), None, rows_of_set[1], 0.0)])
    # Beside fp16 the activations are fp32.
    size = 2 if dtype == torch.bfloat16 else 4
    config = launch_config(rows, latents, d, size, hopper=hopper)
    hidden_states, z = _halves(2, rows, d).to(dtype)
    scratch = EditChangeScratch.allocate(rows, sets)
    add_edit_change(hidden_states, z, _ints(rows), _ints(2), sets, scratch, config)


def _decide(sequences: int, window: int, alpha: float | None) -> None:
    slots = 2**20
    windows = _ints(sequences, window)
    decide(
        *(_floats(slots), _floats(slots), _floats(slots).bool(), windows.long(), windows.bool()),
        *(_ints(sequences).long(), _floats(sequences), _floats(slots).bool()),
        _floats(sequences * 2 * window),
        tau=0.5,
        run=8,
        min_tokens=4,
        alpha=alpha,
    )


def cases(target: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name of the shape, and what launches kernels at it; batches in ascending order."""
    hopper = target in ("sm_90", "sm_100")
    # Eight-bit floats came with Hopper; AMD's are others.
    codes = {"sm_80": (torch.int8,), "gfx942": ()}.get(target, (torch.float8_e4m3fn, torch.int8))
    for shape in (LLAMA, MISTRAL, ODD):
        for rows in BATCHES:
            yield shape.name, partial(_encode, shape, rows, hopper)
            yield shape.name, partial(_decode, shape, rows)
        yield shape.name, partial(_merge, shape, BATCHES[-1], ranks=8)
    for rows in BATCHES:
        for latents in (500, 5000):
            yield f"{latents:,} latents", partial(_edit_change, latents, rows, hopper)
        yield "5,000 latents fp16", partial(_edit_change, 5000, rows, hopper, torch.float16)
        for kind in codes:
            yield LLAMA.name, partial(_eight_bits, LLAMA, rows, kind)
    yield LLAMA.name, partial(_encode, LLAMA, BATCHES[-1], hopper, norm=True)
    yield FP32.name, partial(_encode, FP32, BATCHES[-1], hopper)
    yield "any", partial(_row_plan, BATCHES[-1])
    yield "window 64", partial(_decide, 256, 64, alpha=None)
    yield "window 1024", partial(_decide, 256, 1024, alpha=2.0)
